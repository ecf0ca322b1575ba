"""Digits on disk in every form that is read, for the tests of the readers."""

import json
import shutil

import datasets
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

torch.set_num_threads(1)
datasets.disable_progress_bars()
MEAN, STD = 0.25, 0.5
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 10,
}
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def digits(count=400):
    """Images [N, 8, 8] uint8 and labels, sorted by class: the order of an image folder."""
    bunch = load_digits()
    x = (bunch.images[:count] * 15.9375).astype(np.uint8)
    order = np.argsort(bunch.target[:count], kind="stable")
    return x[order], bunch.target[:count][order]


def by_hand(x):
    return torch.tensor((x.astype(np.float64) / 255 - MEAN) / STD).float()[:, None]


def named(vit, folder, names):
    """The same model with names for its classes."""
    shutil.copytree(vit, folder)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): n for i, n in enumerate(names)}
    config["label2id"] = {n: i for i, n in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def write_folder(root, images, labels, names=None):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = root / (str(label) if names is None else names[label])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i:04}.png")
    return str(root)


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def rows(images, labels, **more):
    columns = {"image": [Image.fromarray(i) for i in images], **more}
    features = {"image": datasets.Image()}
    features |= {name: datasets.Value("int64") for name in more}
    if labels is not None:
        columns["label"] = list(map(int, labels))
        features["label"] = datasets.ClassLabel(names=[str(i) for i in range(10)])
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def write_datasets(root, *args, **more):
    rows(*args, **more).save_to_disk(str(root))
    return str(root)


def everything(data):
    batch = data.fetch(data.ids)
    return batch.x, batch.y


def one_line(error):
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


def settings(folder, name, **values):
    (folder / name).write_text(json.dumps(values))


def set_config(**values):
    def damage(folder):
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | values))

    return damage


X, Y = digits(20)

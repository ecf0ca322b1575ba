"""problems/data_on_disk.py: three forms of the same data, their parts, and problems of them."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from disk_forms import (
    X,
    by_hand,
    digits,
    everything,
    rows,
    write_datasets,
    write_folder,
    write_npz,
)
from PIL import Image
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from expunge.core.errors import DataError, RequestError
from expunge.core.request import forget
from expunge.problems.data_on_disk import load_data, problem_from_disk
from expunge.problems.models_on_disk import save_image_classifier


def test_three_forms_of_the_same_images_give_the_same_tensors(vit, tmp_path, capfd):
    images, labels = digits(120)
    ready = by_hand(images)
    paths = {
        "NHW": write_npz(tmp_path / "a.npz", X=images, y=labels),
        "NCHW": write_npz(tmp_path / "b.npz", X=images[:, None], y=labels),
        "NHWC": write_npz(tmp_path / "c.npz", X=images[..., None], y=labels),
        "float": write_npz(tmp_path / "d.npz", X=ready.numpy().astype(np.float64), y=labels),
        "folder": write_folder(tmp_path / "folder", images, labels),
        "datasets": write_datasets(tmp_path / "rows", images, labels),
    }
    capfd.readouterr()
    for form, path in paths.items():
        data, classes = load_data(path, model_folder=vit)
        x, y = everything(data)
        assert x.dtype == torch.float32, form
        assert x.shape == (120, 1, 8, 8), form
        assert torch.allclose(x, ready, atol=1e-6), form
        assert y.tolist() == labels.tolist() == data.labels.tolist(), form
        assert classes == [str(i) for i in range(10)] or classes[3] == "LABEL_3", form
    assert capfd.readouterr() == ("", "")


def test_colour_and_grey_forms_agree_for_a_colour_model(tmp_path):
    folder = tmp_path / "model"
    config = ViTConfig(image_size=8, patch_size=4, num_channels=3, hidden_size=8, num_labels=2)
    config.num_hidden_layers, config.num_attention_heads, config.intermediate_size = 1, 1, 8
    ViTForImageClassification(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    labels = np.array([0, 0, 0, 1, 1, 1])
    from_folder, _ = load_data(
        write_folder(tmp_path / "rgb", rgb, labels), model_folder=str(folder)
    )
    last, _ = load_data(write_npz(tmp_path / "a", X=rgb) + ".npz", model_folder=str(folder))
    first = np.ascontiguousarray(np.moveaxis(rgb, 3, 1))
    first, _ = load_data(write_npz(tmp_path / "b", X=first) + ".npz", model_folder=str(folder))
    wanted = torch.stack([
        torch.tensor(np.asarray(Image.fromarray(i).resize((8, 8), Image.Resampling.BILINEAR)) / 255)
        for i in rgb
    ]).movedim(3, 1)
    for data in (from_folder, last, first):
        assert torch.allclose(everything(data)[0], wanted.float(), atol=1e-6)
    grey, _ = load_data(write_npz(tmp_path / "c", X=rgb[..., 0]) + ".npz", model_folder=str(folder))
    x, y = everything(grey)
    assert y is None
    assert torch.equal(x[:, 0], x[:, 2])


def test_ids_and_names_of_files(vit, tmp_path):
    images, labels = digits(20)
    ids = np.arange(100, 120)
    names = np.array([f"n{i}" for i in ids])
    path = write_npz(tmp_path / "a.npz", X=images, y=labels, ids=ids, names=names)
    data, _ = load_data(path, model_folder=vit)
    assert forget(ids=["n103", 119]).resolve(data).tolist() == [103, 119]
    path = write_datasets(tmp_path / "rows", images, labels, id=ids.tolist())
    data, _ = load_data(path, model_folder=vit)
    assert data.ids.tolist() == ids.tolist()
    assert torch.allclose(data.fetch(torch.tensor([105])).x, by_hand(images[5:6]), atol=1e-6)


def test_parts_of_the_data(vit, tmp_path):
    images, labels = digits(100)
    train, test = np.arange(100) % 2 == 0, (np.arange(100) % 2 == 1) & (labels != 3)
    write_folder(tmp_path / "f" / "train", images[train], labels[train])
    write_folder(tmp_path / "f" / "test", images[test], labels[test])
    parts = {"train": rows(images[train], labels[train]), "test": rows(images[test], labels[test])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    for place in ("f", "d"):
        problem = problem_from_disk(vit, str(tmp_path / place))
        assert torch.allclose(everything(problem.train)[0], by_hand(images[train]), atol=1e-6)
        # the test part lacks a class, which must not shift the others
        assert problem.test.labels.tolist() == labels[test].tolist()
        assert problem.source["test"] is None
        with pytest.raises(DataError, match="no part 'valid'"):
            load_data(str(tmp_path / place), model_folder=vit, split="valid")
    other = problem_from_disk(vit, str(tmp_path / "f"), test=str(tmp_path / "d"))
    assert torch.equal(other.test.labels, problem.test.labels)


def test_a_problem_from_disk_predicts_and_can_be_saved(vit, tmp_path, capfd):
    images, labels = digits()
    path = write_npz(tmp_path / "a.npz", X=images, y=labels)
    problem = problem_from_disk(vit, path)
    assert capfd.readouterr() == ("", "")
    assert problem.source == {
        "kind": "disk",
        "model": str(Path(vit).resolve()),
        "data": str(Path(path).resolve()),
        "test": None,
        "preprocessing": "grey, resize to 8×8, scale by 0.00392157, mean (0.25,), std (0.5,) "
        "(from preprocessor_config.json)",
    }
    batch = problem.train.fetch(problem.train.ids)
    with torch.no_grad():
        logits = problem.logits(problem.model, batch)
        again = AutoModelForImageClassification.from_pretrained(vit)(by_hand(images)).logits
    assert torch.allclose(logits, again, atol=1e-4)
    assert (logits.argmax(1) == batch.y).float().mean() > 0.8
    out = save_image_classifier(problem.model, tmp_path / "out", vit, problem.fingerprint())
    same = problem_from_disk(str(out), path)
    assert same.fingerprint() == problem.fingerprint()


def test_data_without_labels(vit, tmp_path):
    path = write_datasets(tmp_path / "d", X, None)
    for place in (path, write_npz(tmp_path / "a.npz", X=X)):
        problem = problem_from_disk(vit, place)
        assert problem.train.labels is None
        assert problem.train.fetch(problem.train.ids).y is None
        with pytest.raises(RequestError, match="no labels"):
            forget(label=3).resolve(problem.train)

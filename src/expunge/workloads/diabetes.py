"""scikit-learn's diabetes data: 442 patients, ten features, the progress of their disease."""

from __future__ import annotations

import functools

import numpy as np
import torch

from expunge.core.data import Data
from expunge.core.request import Request
from expunge.problems.regression import Regression
from expunge.train.recipe import RegressorRecipe
from expunge.workloads.base import Splits, Workload
from expunge.workloads.nets import diabetes_mlp

ABOVE = 2.321
"""Just above the 80 % quantile of all targets (232 on the original scale)."""


@functools.cache
def splits() -> Splits:
    """300 training and 142 test patients; targets in units of 100, features of unit variance."""
    from sklearn.datasets import load_diabetes

    features, targets = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(targets))
    x = torch.from_numpy(features * np.sqrt(len(targets))).float()
    y = torch.from_numpy(targets / 100.0).float()
    return Splits(
        *(
            Data((x[p], y[p]), ids=p)
            for p in (torch.from_numpy(np.sort(part)) for part in (order[:300], order[300:]))
        )
    )


def recipe(train: Data) -> RegressorRecipe:
    """Adam on the squared error, half a cosine; about a second."""
    return RegressorRecipe(
        diabetes_mlp, train, epochs=60, lr=5e-3, batch_size=32, weight_decay=1e-4, step="adam", loss="mse"
    )  # fmt: skip


diabetes_range = Workload(
    name="diabetes-range",
    title="forget the fifth with the worst progress of 442 diabetes patients (perceptron); seconds",
    data=splits,
    recipe=recipe,
    request=Request(where=f"y > {ABOVE}"),
    tuned={
        "finetune": {
            "epochs": 20,
            "lr": 1e-3,
            "step": "adam",
            "batch_size": 32,
            "weight_decay": 0.0,
        },
        "blindspot": {"epochs": 5, "lr": 2e-3, "batch_size": 32, "blind_epochs": 5},
        "gaussian-amnesiac": {"epochs": 5, "lr": 1e-3, "batch_size": 32},
    },
    tuning="by hand on forgetting the lowest fifth of the targets, seed 0",
    of=functools.partial(Regression, loss="mse"),
)

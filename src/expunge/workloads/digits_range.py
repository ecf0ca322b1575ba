"""The digits as regression: a small convolution net reads the value 0 … 9 off an 8×8 image."""

from __future__ import annotations

import functools

import torch

from expunge.core.data import Data
from expunge.core.request import Request
from expunge.problems.regression import Regression
from expunge.train.recipe import RegressorRecipe
from expunge.workloads.base import Splits, Workload, stratified
from expunge.workloads.nets import ConvRegressor

BLOCKS = [f"blocks.{n}" for n in range(4)]


@functools.cache
def splits() -> Splits:
    """1,200 training, 200 validation and 397 test digits, stratified by digit."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16.0).float().reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).float()
    train, valid, test = (torch.from_numpy(p) for p in stratified(labels, (1200, 200, 397), seed=0))
    return Splits(*(Data((x[p], y[p]), ids=p) for p in (train, test, valid)))


def recipe(train: Data) -> RegressorRecipe:
    """Adam on the absolute error, half a cosine; some seconds."""
    return RegressorRecipe(
        ConvRegressor, train, epochs=60, lr=5e-3, batch_size=64, weight_decay=0.0, step="adam"
    )


digits_range = Workload(
    name="digits-range",
    title="forget the digits up to 2 as numbers, of 1,797 8×8 images (convolution net)",
    data=splits,
    recipe=recipe,
    request=Request(where="y <= 2"),
    tuned={
        "finetune": {
            "epochs": 5,
            "lr": 1e-3,
            "step": "adam",
            "batch_size": 64,
            "weight_decay": 0.0,
        },
        "blindspot": {"epochs": 5, "batch_size": 64, "blind_epochs": 5},
        "gaussian-amnesiac": {"epochs": 2, "batch_size": 64},
    },
    tuning="by hand on forgetting the digits from 8, seed 0",
    of=functools.partial(Regression, loss="l1", roles={"blocks": BLOCKS}),
)

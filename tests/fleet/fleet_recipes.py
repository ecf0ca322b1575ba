"""Recipes that other processes can import, and the fleet of the tests."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

import expunge as xp
from expunge.core.runtime import Runtime
from expunge.fleet.jobs import Job
from expunge.train.recipe import ClassifierRecipe, RegressorRecipe

LOG = "FLEET_TEST_LOG"
"""Names the file that `logged` counts trainings in."""


def images(samples=30):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, 6, 6, generator=g, dtype=torch.float64)
    y = (x[:, 0, 0, 0] > 0).long() + (x[:, 0, 2, 2] > 1)
    return xp.Data((x, y), ids=torch.arange(samples) * 3 + 5)


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def norm_mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def conv_norm():
    """Convolutions and batch norm, one layer of it with a momentum of its own, one without weights."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 1, groups=2), nn.BatchNorm2d(4, affine=False), nn.ReLU(),
        nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip


def regressor():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 1)).double()


BUILDS = {"mlp": mlp, "norm_mlp": norm_mlp, "conv_norm": conv_norm}


def recipe_of(build=mlp, **more):
    settings = {"epochs": 3, "batch_size": 4, "lr": 0.05} | more
    return ClassifierRecipe(build, images(), **settings)


def regression(**more):
    data = images()
    labels = data.fetch(data.ids).x.mean((1, 2, 3))
    data = xp.Data((data.fetch(data.ids).x, labels), ids=data.ids)
    return RegressorRecipe(regressor, data, epochs=3, batch_size=4, loss="mse", **more)


def problem_of(recipe, build=mlp):
    torch.manual_seed(0)
    data = images()
    return xp.Classification(build(), data, data, recipe=recipe, name="fleet test")


def jobs_of(data, count=4, role="shadow"):
    """Different samples, 13 of 30 each: with batches of 4 the last one holds a single sample."""
    g = torch.Generator().manual_seed(3)
    keeps = [data.ids[torch.randperm(len(data), generator=g)[:13]] for _ in range(count)]
    return [Job(keep, seed, role) for seed, keep in enumerate(keeps, 11)]


def logged(keep_ids, seed, runtime: Runtime | None = None):
    """A recipe that writes a line for each training that ended; as slow as it is told."""
    model = recipe_of()(keep_ids, seed, runtime)
    time.sleep(float(os.environ.get("FLEET_TEST_SECONDS", "0")))
    with Path(os.environ[LOG]).open("a") as file:
        file.write(f"{seed}\n")
    return model


def failing(keep_ids, seed, runtime: Runtime | None = None):
    """A recipe of which the third training of `jobs_of` fails."""
    if seed == 13:
        raise RuntimeError("seed 13 fails")
    return recipe_of()(keep_ids, seed, runtime)


class Unloadable:
    """A recipe that can be sent but not be taken in."""

    def __call__(self, keep_ids, seed):
        return mlp()

    def __reduce__(self):
        return (_refuse, ())


def _refuse():
    raise ValueError("not here")

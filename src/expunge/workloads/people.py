"""People to forget: real samples with an owner, and a task that is not to tell who that is.

As MUFAC does with faces (arXiv 2311.02240): the labels of those to forget are spread over all classes, nobody is
both in training and in test data, and a part of the test people (column `unseen`) stands for people never seen.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from expunge.core.data import Data
from expunge.core.request import Request
from expunge.problems.subjects import SubjectSplits, split_subjects
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.base import Splits, Workload
from expunge.workloads.movielens import ITEMS, ratings, table
from expunge.workloads.nets import DigitsCNN

PEOPLE, NOISE = 60, 0.15
TURN, SHEAR, SCALE, SHIFT = 60.0, 0.5, 0.3, 0.3
"""A writer's own warp, each drawn evenly up to this: degrees, shear, relative size, half images."""
EACH = 20
"""Ratings of a person in MovieLens: everybody has at least as many."""


@functools.cache
def written() -> Data:
    """1,797 digits by 60 invented people, about 30 each, 15 % of them with another label than their own.

    Everybody has a fixed random way of writing: turned, sheared, scaled and shifted. Who wrote what is
    independent of the class. Column `identity` says who, `mislabelled` whether the label is wrong.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images / 16.0).float().reshape(-1, 1, 8, 8)
    y, n = torch.from_numpy(labels).long(), len(labels)
    generator = torch.Generator().manual_seed(0)
    owner = torch.empty(n, dtype=torch.long)
    owner[torch.randperm(n, generator=generator)] = torch.arange(n) * PEOPLE // n
    ways = torch.stack([_way(generator) for _ in range(PEOPLE)])[owner]
    warped = grid_sample(x, affine_grid(ways, list(x.shape), align_corners=False), align_corners=False)  # fmt: skip
    wrong = torch.rand(n, generator=generator) < NOISE
    said = torch.where(wrong, (y + torch.randint(1, 10, (n,), generator=generator)) % 10, y)
    columns = {"identity": owner.tolist(), "mislabelled": wrong.long().tolist()}
    return Data((warped, said), columns=columns)


def _way(generator: torch.Generator) -> Tensor:
    """A random affine map [2, 3]."""

    def upto(most: float) -> float:
        return (2 * float(torch.rand(1, generator=generator)) - 1) * most

    angle, size, shear = math.radians(upto(TURN)), 1 + upto(SCALE), upto(SHEAR)
    turn = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    linear = torch.tensor(turn) @ torch.tensor([[1.0, shear], [0.0, 1.0]]) * size
    return torch.cat([linear, torch.tensor([[upto(SHIFT)], [upto(SHIFT)]])], 1)


def by_writer() -> SubjectSplits:
    """Writers 0–9 to forget, 10–39 to retain, 40–49 to test on, 50–59 unseen."""
    return split_subjects(written(), forget=range(10), test=range(40, 50), unseen=range(50, 60))


@functools.cache
def digits_splits() -> Splits:
    """The digits of 40 writers to train on, those of 20 others to test."""
    return Splits(by_writer().train, by_writer().test)


def digits_recipe(train: Data) -> ClassifierRecipe:
    """A small convolutional network, Adam at a constant rate, 30 passes; some seconds."""
    return ClassifierRecipe(
        DigitsCNN, train, epochs=30, lr=1e-3, batch_size=32, weight_decay=0.0, step="adam",
        schedule="constant",
    )  # fmt: skip


class Taste(nn.Module):
    """From a film and what is known of a person to one of five ratings."""

    def __init__(self, facts: int, films: int = ITEMS, width: int = 64) -> None:
        """Build it untrained."""
        super().__init__()
        self.film = nn.Embedding(films, 16)
        self.hidden = nn.Linear(16 + facts, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 1 + facts], the film's number first, to logits [B, 5]."""
        film = self.film(x[:, 0].long())
        return self.head(torch.relu(self.hidden(torch.cat([film, x[:, 1:]], 1))))


@functools.cache
def rated() -> Data:
    """20 ratings of each of the 943 people of MovieLens-100k: film and person to one of five classes.

    A person is described by age, gender, occupation and the region of the zip code, never by a number: so
    the model has something to say about people it never saw. Column `user` says whose a rating is.
    """
    pairs, stars = ratings()
    people = table("user")
    ages = np.asarray([float(p["age"]) for p in people])
    words = [[p["gender"], p["occupation"], "zip" + p["zip_code"][:1]] for p in people]
    kinds = sorted({w for row in words for w in row})
    facts = torch.zeros(len(people), len(kinds) + 1)
    facts[:, 0] = torch.from_numpy((ages - ages.mean()) / ages.std())
    for number, row in enumerate(words):
        facts[number, [kinds.index(w) + 1 for w in row]] = 1.0
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(stars)))
    rank = torch.zeros(len(stars), dtype=torch.long)
    by_person = order[pairs[order, 0].argsort(stable=True)]
    counts = pairs[:, 0].bincount()
    starts = counts.cumsum(0) - counts
    rank[by_person] = torch.arange(len(stars)) - starts[pairs[by_person, 0]]
    kept = (rank < EACH).nonzero().flatten()
    user, film = pairs[kept, 0], pairs[kept, 1]
    x = torch.cat([film[:, None].float(), facts[user]], 1)
    return Data(
        (x, stars[kept].long() - 1), ids=kept,
        columns={"user": (user + 1).tolist(), "film": (film + 1).tolist()},
    )  # fmt: skip


def by_person() -> SubjectSplits:
    """People 1–100 to forget, 101–643 to retain, 644–843 to test on, 844–943 unseen."""
    return split_subjects(
        rated(), column="user", forget=range(1, 101), test=range(644, 844), unseen=range(844, 944)
    )


@functools.cache
def films_splits() -> Splits:
    """20 ratings each of 643 people to train on, and of 300 others to test.

    The 80 test ratings whose film and person are described as some training rating's are left out: the model
    has seen them.
    """
    train, test = by_person().train, by_person().test
    known = {bytes(row.numpy()) for row in train.fetch(train.ids).x}
    new = [bytes(row.numpy()) not in known for row in test.fetch(test.ids).x]
    return Splits(train, test.only(test.ids[torch.tensor(new)]))


def films_recipe(train: Data) -> ClassifierRecipe:
    """A small perceptron, Adam, 40 passes; about half a minute."""
    facts = train.fetch(train.ids[:1]).x.shape[1] - 1
    return ClassifierRecipe(
        functools.partial(Taste, facts), train, epochs=40, lr=5e-3, batch_size=256,
        weight_decay=0.0, step="adam",
    )  # fmt: skip


digits_people = Workload(
    name="digits-people",
    title="forget 10 of 40 invented writers of 1,797 digits; the task is the digit (small CNN)",
    data=digits_splits,
    recipe=digits_recipe,
    request=Request(identity=tuple(range(10))),
    tuned={
        "finetune": {
            "epochs": 2,
            "lr": 1e-3,
            "step": "adam",
            "batch_size": 32,
            "weight_decay": 0.0,
        },
        "gradient-ascent": {"epochs": 5, "lr": 3e-3, "batch_size": 64},
        "neggrad-plus": {"epochs": 2, "lr": 3e-4, "a": 0.5, "step": "adam", "batch_size": 64},
    },
    tuning="by hand on forgetting writers 10 to 19, seed 0",
)
movielens_people = Workload(
    name="movielens-people",
    title="forget 100 of 643 people of MovieLens-100k; the task is the rating (perceptron)",
    data=films_splits,
    recipe=films_recipe,
    request=Request(user=tuple(range(1, 101))),
    tuned={
        "finetune": {
            "epochs": 5,
            "lr": 3e-3,
            "step": "adam",
            "batch_size": 128,
            "weight_decay": 0.0,
        },
        "gradient-ascent": {"epochs": 2, "lr": 0.01, "batch_size": 128},
        "neggrad-plus": {"epochs": 1, "lr": 1e-3, "a": 0.5, "step": "adam", "batch_size": 128},
    },
    tuning="by hand on forgetting people 101 to 200, seed 0",
    package="recbole (with --no-deps)",
)

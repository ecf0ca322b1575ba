"""A network with blocks and data so small that a sharded training takes a fraction of a second."""

from __future__ import annotations

import torch
from torch import nn

import expunge as xp


class Blocky(nn.Module):
    """A residual perceptron: a stem, four blocks in a list, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


def data(samples: int = 600, seed: int = 0, first: int = 0) -> xp.Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    ids = torch.arange(first, first + samples)
    return xp.Data((x, y), ids=ids, columns={"user": [f"user-{i % 50}" for i in ids.tolist()]})


def problem() -> xp.Problem:
    torch.manual_seed(7)
    roles = {"blocks": [f"blocks.{i}" for i in range(4)], "last layer": ["head"]}
    return xp.Classification(
        Blocky(),
        data(),
        data(200, 1, 10_000),
        valid=data(100, 2, 20_000),
        roles=roles,
        build=Blocky,
    )


def train(folder, **settings):
    quick = {
        "epochs": 1, "lr": 0.02, "batch_size": 32, "adapter": "lora(2)",
        "shards": 3, "slices": 4, "orders": 4,
    }  # fmt: skip
    return xp.Sharded.train(problem(), folder=folder, **(quick | settings))


def policy(folder: str, database: str = "service.db", more: str = "") -> str:
    return f"""
[service]
database = "{database}"
poll_seconds = 0.05
[models.small]
kind = "sharded"
folder = "{folder}"
problem = "small_problem:problem"
{more}
"""

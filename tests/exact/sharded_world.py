"""A network with blocks and data so small that a sharded training takes a fraction of a second."""

from __future__ import annotations

import torch
from torch import nn

import expunge as xp


class Blocky(nn.Module):
    """A residual perceptron: a stem, four blocks in a list, a head."""

    def __init__(self, width: int = 8, blocks: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


ROLES = {"blocks": [f"blocks.{i}" for i in range(4)], "last layer": ["head"]}


def small_data(samples: int = 48, seed: int = 0, first: int = 100):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return xp.Data((x, y), ids=torch.arange(first, first + samples))


def problem_of(data=None, **more):
    torch.manual_seed(7)
    model = more.pop("model", None) or Blocky()
    valid = more.pop("valid", small_data(40, 1, 0))
    return xp.Classification(
        model, data or small_data(), valid=valid, roles=ROLES, build=Blocky, **more
    )


QUICK = {"epochs": 1, "lr": 0.02, "batch_size": 8, "adapter": "lora(2)"}


def train(folder, problem=None, **settings):
    return xp.Sharded.train(problem or problem_of(), folder=folder, **(QUICK | settings))


def of(sharded, shard, piece):
    """Ids of a slice."""
    index = sharded._now.index
    return index.members(shard, piece, sharded._now.live.deleted).tolist()

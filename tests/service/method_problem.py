"""Three blobs and a perceptron with its recipe; trained in a moment."""

from __future__ import annotations

import torch
from torch import nn

import expunge as xp

CENTRES = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-3.0, -3.0]])


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))


def blobs(samples: int, seed: int) -> xp.Data:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(samples) % 3
    return xp.Data((CENTRES[y] + torch.randn(samples, 2, generator=generator), y))


def problem() -> xp.Problem:
    train = blobs(240, 0)
    recipe = xp.ClassifierRecipe(build, train, epochs=8, lr=0.1, batch_size=32)
    return xp.Classification(recipe(train.ids, 0), train, blobs(120, 1), recipe=recipe)

"""Digits on a public backbone: scikit-learn's 8×8 digits, and a network that only ever saw MNIST.

What exact deletion needs to be shown on: the backbone holds none of the data that may be deleted.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from expunge.core.data import Data
from expunge.core.problem import Problem
from expunge.problems.classification import Classification
from expunge.train.recipe import ClassifierRecipe
from expunge.workloads.digits import splits
from expunge.workloads.mnist import mnist_5k


class ResidualMLP(nn.Module):
    """A perceptron with a stem, residual blocks in a list, and a head."""

    def __init__(self, width: int = 128, blocks: int = 4) -> None:
        """Build it untrained for 64 inputs and ten classes."""
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 64] to logits [B, 10]."""
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = x + torch.relu(block(x))
        return self.head(x)


@functools.cache
def pooled_mnist() -> Data:
    """MNIST-5000 [5000, 64] at the digits' size and scale: the empty frame cut off, pixels averaged."""
    images, labels = mnist_5k()
    grey = (images * 0.3081 + 0.1307)[:, :, 4:24, 4:24]
    return Data((adaptive_avg_pool2d(grey, 8).flatten(1).clamp(0, 1), labels))


@functools.cache
def _backbone(seed: int) -> Mapping[str, Tensor]:
    recipe = ClassifierRecipe(
        ResidualMLP, pooled_mnist(), epochs=8, lr=1e-3, step="adam", weight_decay=0.0
    )
    return recipe(pooled_mnist().ids, seed).state_dict()


def public_digits(seed: int = 0) -> Problem:
    """1,200 training, 197 validation and 400 test digits around a backbone trained on MNIST (4 s).

    Args:
        seed: of the backbone's training.
    """
    data = splits()
    model = ResidualMLP()
    model.load_state_dict(_backbone(seed))
    return Classification(
        model, data.train, data.test, valid=data.valid, build=ResidualMLP, name="public-digits",
        roles={"blocks": [f"blocks.{i}" for i in range(4)], "last layer": ["head"]},
    )  # fmt: skip

"""What only looks forgotten."""

from __future__ import annotations

import copy

import torch
from torch import nn


def masked(model: nn.Module, last: str, label: int) -> nn.Module:
    """The same model, whose last layer never says one class: an output-only trick."""
    found = copy.deepcopy(model)
    layer = found.get_submodule(last)
    with torch.no_grad():
        layer.weight[label] = 0
        layer.bias[label] = -30
    return found

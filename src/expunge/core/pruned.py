"""Pruned models: a hard mask that belongs to a model, whose zeros every later update keeps.

The mask is a plain attribute of the module, so that copies carry it and a training loop finds it
wherever the model came from. It is no tensor of the state dict: the architecture stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError

_ATTRIBUTE = "_expunge_kept"


def keep_only(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """Set the weights outside a mask to zero, in place, and remember the mask on the model.

    Args:
        model: the model to prune.
        kept: bool tensors by parameter name, True where a weight stays; parameters that are not
            named stay whole.

    Returns:
        The same model.

    Raises:
        ModelError: the mask names a parameter the model does not have, or has in another shape.
    """
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for name, mask in kept.items():
        if shapes.get(name) != mask.shape:
            raise ModelError(f"the pruning mask does not fit this model's parameter {name!r}")
    vars(model)[_ATTRIBUTE] = {n: m.detach().cpu() for n, m in kept.items()}
    clear_pruned(model, kept)
    return model


def kept_of(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the mask that a model was pruned to, or None."""
    return vars(model).get(_ATTRIBUTE)


@torch.no_grad()
def clear_pruned(model: nn.Module, kept: Mapping[str, Tensor]) -> bool:
    """Set pruned weights to exact zeros in place; parameters of other names are left alone.

    Returns:
        Whether any weight was not zero before.
    """
    found = False
    for name, p in model.named_parameters():
        if name in kept and kept[name].shape == p.shape:
            pruned = ~kept[name].to(p.device)
            found |= bool((p[pruned] != 0).any())
            p.masked_fill_(pruned, 0.0)  # a product would keep NaN and the sign of zero
    return found

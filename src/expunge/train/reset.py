"""Weights drawn anew: parts of a model take the state of an untrained one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.train.masks import Mask
from expunge.train.norm import NormMode, norm_layers


@torch.no_grad()
def renew(
    model: nn.Module, fresh: nn.Module, groups: Sequence[Sequence[str]], mask: Mask | None = None
) -> int:
    """Give groups of a model the state of an untrained one, in place.

    A weight that several layers share is drawn once, and moves only where the mask lets it.

    Args:
        model: the model.
        fresh: an untrained one of the same architecture.
        groups: names of parameters and buffers.
        mask: coordinates that may move; buffers of layers with none that may, stay.

    Returns:
        The number of weights drawn anew.
    """
    state, masks = fresh.state_dict(), _masks(model, mask)
    count, drawn = 0, set()
    for name, own in model.state_dict(keep_vars=True).items():
        if not any(name in group for group in groups):
            continue
        if name not in masks:
            if not _all_frozen(masks, name.rpartition(".")[0]):
                own.copy_(state[name])
        elif id(own) not in drawn:
            drawn.add(id(own))
            own.copy_(torch.where(masks[name], state[name].to(own), own))
            count += int(masks[name].sum())
    return count


def refuse_lost_statistics(
    model: nn.Module,
    groups: Sequence[Sequence[str]],
    mask: Mask | None,
    norm: NormMode,
    help: str,
) -> None:
    """Complain where layers would be trained on the running statistics of an untrained model.

    Args:
        model: the model.
        groups: names of what `renew` would draw anew.
        mask: what may move of it.
        norm: what running statistics do in training.
        help: what to do instead, for the message.

    Raises:
        SettingError: statistics are reset and nothing would estimate them before training.
    """
    if norm == "train":
        return
    names, masks = {name for group in groups for name in group}, _masks(model, mask)
    normed = {id(layer) for layer in norm_layers(model)}
    for layer, module in model.named_modules():
        reset = id(module) in normed and f"{layer}.running_mean" in names
        if reset and not _all_frozen(masks, layer):
            raise SettingError(
                f"the reset takes the running statistics of {layer!r} too, which norm={norm} never "
                f"lets follow; {help}"
            )


def _masks(model: nn.Module, mask: Mask | None) -> dict[str, Tensor]:
    """What may move of each parameter, by all its names; a mask knows the first one alone."""
    first = {id(p): n for n, p in model.named_parameters()}
    return {
        name: torch.full_like(p, p.requires_grad, dtype=torch.bool)
        & (True if mask is None else mask[first[id(p)]].to(p.device))
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def _all_frozen(masks: dict[str, Tensor], layer: str) -> bool:
    """Whether nothing of a layer may move, so that its buffers stay too."""
    own = [m for n, m in masks.items() if n.startswith(layer + ".")]
    return bool(own) and not any(bool(m.any()) for m in own)

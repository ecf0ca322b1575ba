"""The `norm=` choice: what happens to running statistics, which are training-data influence.

`train` updates them with the batches seen, `frozen` keeps those of the original model, and
`recalibrate` keeps them during training and then estimates them anew on the retain data.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from expunge.core.view import Source

NormMode = Literal["train", "frozen", "recalibrate"]


def norm_layers(model: nn.Module) -> list[_NormBase]:
    """Modules of a model that keep running statistics (batch norm, and instance norm if told)."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def train_mode(model: nn.Module, norm: NormMode) -> None:
    """Put a model in training mode; running statistics move only with `norm="train"`.

    Those of a layer whose own weights are all frozen stay too: a frozen layer is frozen whole.
    """
    model.train()
    for layer in norm_layers(model):
        own = list(layer.parameters())
        if norm != "train" or (own and not any(p.requires_grad for p in own)):
            layer.eval()


@torch.no_grad()
def recalibrate(model: nn.Module, source: Source, batch_size: int = 256) -> None:
    """Estimate running statistics anew as the plain average over one pass of a source.

    A last batch of a single sample is left out: it has no variance.
    """
    layers = norm_layers(model)
    if not layers:
        return
    kept = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    for count, batch in enumerate(source.batches(batch_size), start=1):
        if len(batch) == 1 and count > 1:
            break
        for layer in layers:
            layer.momentum = 1 / count  # cumulative average
        _ = model(batch.x) if isinstance(batch.x, torch.Tensor) else model(**batch.x)
    for layer, momentum in zip(layers, kept, strict=True):
        layer.momentum = momentum
    model.eval()

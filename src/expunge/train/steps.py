"""The `step=` choice: which optimiser moves the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

StepName = Literal["sgd", "adam", "adamw"]


def make_optimizer(
    step: StepName,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Build the optimiser a `step=` setting names.

    Args:
        step: `sgd` (with momentum), `adam` or `adamw`.
        parameters: what it moves.
        lr: learning rate.
        momentum: SGD's momentum; the others ignore it.
        weight_decay: L2 coefficient (decoupled in `adamw`).

    Returns:
        The optimiser.
    """
    # One tensor at a time: the fused multi-tensor paths may round differently.
    parameters = list(parameters)
    if step == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=False
        )
    kind = torch.optim.Adam if step == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=weight_decay, foreach=False)

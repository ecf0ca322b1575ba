"""The `step=` choice: which optimiser moves the weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

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
    fused: bool = True,
) -> torch.optim.Optimizer:
    """Build the optimiser a `step=` setting names.

    Args:
        step: `sgd` (with momentum), `adam` or `adamw`.
        parameters: what it moves.
        lr: learning rate.
        momentum: SGD's momentum; the others ignore it.
        weight_decay: L2 coefficient (decoupled in `adamw`).
        fused: one kernel for all of a tensor's arithmetic, three to five times as fast on a CPU.

    Returns:
        The optimiser.
    """
    parameters = list(parameters)
    if step == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=fused
        )
    kind = torch.optim.Adam if step == "adam" else torch.optim.AdamW
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


class Turns(torch.optim.Optimizer):
    """Optimisers over the same parameters that step in turn, each with a state of its own."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Begin with the first; the base class would refuse parameters that come twice."""
        self.optimizers = list(optimizers)
        self.turn = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of all of them."""
        return [group for one in self.optimizers for group in one.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Let the one whose turn it is step."""
        self.optimizers[self.turn].step(closure)
        self.turn = (self.turn + 1) % len(self.optimizers)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, which they share."""
        self.optimizers[0].zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """States of all of them and whose turn it is."""
        return {"turn": self.turn, "states": [one.state_dict() for one in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.turn = state_dict["turn"]
        for one, state in zip(self.optimizers, state_dict["states"], strict=True):
            one.load_state_dict(state)

    def __repr__(self) -> str:
        """Name them."""
        return f"Turns({self.optimizers})"

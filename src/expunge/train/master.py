"""Float32 copies of half-precision weights, so that small steps add up instead of being rounded away.

A bfloat16 weight has 8 significant bits: a step below about 1/512 of it changes nothing, however
often it is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

HALVES = (torch.float16, torch.bfloat16)


def wide_copies(moving: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What an optimiser moves: a float32 copy of each half-precision weight, the others themselves."""
    return {n: nn.Parameter(p.detach().float()) if p.dtype in HALVES else p for n, p in moving.items()}  # fmt: skip


@torch.no_grad()
def write_back(moving: Mapping[str, nn.Parameter], wide: Mapping[str, nn.Parameter]) -> None:
    """Round the copies into the weights."""
    for name, p in moving.items():
        if wide[name] is not p:
            p.copy_(wide[name])


class Master(torch.optim.Optimizer):
    """An optimiser over the copies, which takes its gradients from the weights and writes them back."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        moving: Mapping[str, nn.Parameter],
        wide: Mapping[str, nn.Parameter],
    ) -> None:
        """Wrap an optimiser that was made for the copies."""
        self.optimizer, self.moving, self.wide = optimizer, moving, wide

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Groups of the wrapped one."""
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step on the copies, then round them into the weights."""
        for name, p in self.moving.items():
            self.wide[name].grad = None if p.grad is None else p.grad.to(self.wide[name].dtype)
        self.optimizer.step(closure)
        write_back(self.moving, self.wide)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of both."""
        for parameter in (*self.moving.values(), *self.wide.values()):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """State of the wrapped one, and the copies."""
        copies = {n: c.detach() for n, c in self.wide.items() if c is not self.moving[n]}
        return {"optimizer": self.optimizer.state_dict(), "copies": copies}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        for name, value in state_dict["copies"].items():
            self.wide[name].copy_(value)

"""Losses that are sums of parts over one tuple of batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch

if TYPE_CHECKING:
    from expunge.train.fit import Loss


@dataclass(frozen=True)
class Apart:
    """A loss that is the sum of parts over one tuple of batches; only the first part is smoothed.

    Attributes:
        parts: `(model, batches)` -> a scalar, by name; each has a graph of its own, so that its
            gradient can be taken before the next is made.
        note: told the name and value of each part at the weights of a step.
        again: the first part where it is asked for once more, at weights near by; itself if None.
    """

    parts: Mapping[str, Loss]
    note: Callable[[str, Tensor], None] = lambda name, value: None
    again: Loss | None = None

    def __call__(self, model: nn.Module, batches: Any) -> Tensor:
        """The sum of the parts."""
        return torch.stack([part(model, batches) for part in parts_of(self)]).sum()


def parts_of(loss: Loss) -> list[Loss]:
    """The parts of a loss, which tell their values; the loss itself where it has none."""
    if not isinstance(loss, Apart):
        return [loss]

    def noted(name: str, part: Loss, model: nn.Module, batches: Any) -> Tensor:
        value = part(model, batches)
        loss.note(name, value)
        return value

    return [functools.partial(noted, name, part) for name, part in loss.parts.items()]


def samples_in(batch: Any) -> int:
    """Samples of a batch, or of several."""
    return len(batch) if isinstance(batch, Batch) else sum(samples_in(part) for part in batch)

"""Inputs as something to compute with: one tensor of real numbers a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from expunge.core.data import Batch
from expunge.core.errors import DataError


def continuous(batch: Batch, who: str) -> tuple[Tensor, Callable[[Tensor], Batch]]:
    """The inputs of a batch as one tensor, and the way back.

    Args:
        batch: its inputs are a tensor, or a mapping that holds a single one.
        who: the method that asks, for the message.

    Returns:
        The tensor [B, …], and a function that gives the batch with another tensor in its place.

    Raises:
        DataError: the inputs are several tensors, or not real numbers.
    """
    tensors = {"": batch.x} if isinstance(batch.x, Tensor) else dict(batch.x)
    if len(tensors) != 1 or not all(t.is_floating_point() for t in tensors.values()):
        given = ", ".join(f"{name or 'x'} of {t.dtype}" for name, t in tensors.items())
        raise DataError(
            f"{who} changes inputs by small amounts, so it takes one tensor of real numbers a "
            f"sample, not {given}"
        )
    ((name, tensor),) = tensors.items()
    return tensor, lambda changed: replace(batch, x={name: changed} if name else changed)

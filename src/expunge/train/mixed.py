"""Batches of forget and retain samples shuffled together, each side with the labels it may show."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from expunge.core.data import Batch
from expunge.core.view import Source, View


def mixed(
    view: View, size: int, generator: torch.Generator, retain: Source | None = None
) -> Iterator[tuple[Batch | None, Batch | None]]:
    """Yield one pass over all training samples in random order.

    Args:
        view: gives both sides.
        size: samples a batch, both sides together.
        generator: draws the order.
        retain: a part of the retain side; all of it if None.

    Yields:
        The forget part and the retain part of each batch; None where a batch has none of it.
    """
    retain = view.retain if retain is None else retain
    both = torch.cat([view.forget.ids, retain.ids])
    for ids in both[torch.randperm(len(both), generator=generator)].split(size):
        forgotten = torch.isin(ids, view.forget.ids)
        yield (
            view.forget.fetch(ids[forgotten]) if bool(forgotten.any()) else None,
            retain.fetch(ids[~forgotten]) if not bool(forgotten.all()) else None,
        )

"""Labels that stand for the true ones of the forget set, decided once for all epochs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

from expunge.core.data import Batch
from expunge.core.runtime import Runtime
from expunge.core.view import Source, View
from expunge.train.mixed import mixed


def whole_classes(view: View) -> Tensor:
    """Classes all of whose training samples are to be forgotten, sorted [k]; labels must be declared."""
    asked = view.forget.labels().unique()
    return asked[~torch.isin(asked, view.retain.labels())]


def relabelled(batch: Batch, ids: Tensor, labels: Tensor) -> Batch:
    """Return a batch with other labels.

    Args:
        batch: samples, all of them among `ids`.
        ids: sorted ids [n].
        labels: their labels [n].

    Returns:
        The same samples, labelled so.
    """
    places = torch.searchsorted(ids, batch.ids.cpu())
    return batch.labelled(labels[places].to(batch.ids.device))


def labels_by(
    source: Source, choose: Callable[[Batch], Tensor], runtime: Runtime, *, size: int
) -> Tensor:
    """Choose a label for every sample of a source, batch by batch.

    Args:
        source: its ids are sorted.
        choose: gives class numbers [B] for a batch.
        runtime: puts the shares of several processes together.
        size: samples a batch.

    Returns:
        Labels [n] in the order of `source.ids`.
    """
    chosen = torch.zeros(len(source), dtype=torch.long, device=runtime.device)
    for batch in source.batches(size):
        places = torch.searchsorted(source.ids, batch.ids.cpu()).to(chosen.device)
        chosen[places] = choose(batch).to(chosen.device)
    return runtime.sum(chosen).cpu()


def merged(
    view: View, size: int, generator: torch.Generator, ids: Tensor, labels: Tensor
) -> Iterator[Batch]:
    """Yield one pass over both sides shuffled together, the forget samples with other labels.

    Every sample is read anew in every pass, so that a data set that augments does so each time.

    Args:
        view: gives both sides.
        size: samples a batch.
        generator: draws the order.
        ids: sorted forget ids [n].
        labels: their labels [n].

    Yields:
        Batches with labels.
    """
    yield from merged_by(view, size, generator, lambda b: relabelled(b, ids, labels))


def merged_by(
    view: View, size: int, generator: torch.Generator, change: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """`merged`, with anything done to the forget part of each batch."""
    for forget, retain in mixed(view, size, generator):
        parts = [change(forget)] if forget is not None else []
        parts += [retain] if retain is not None else []
        yield reduce(Batch.joined, parts)

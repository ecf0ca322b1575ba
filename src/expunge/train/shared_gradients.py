"""Gradients of processes that each hold the whole model, averaged once a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from expunge.core.runtime import Runtime

_BUCKET = 2**25
"""Bytes that are sent at a time."""


@torch.no_grad()
def share_gradients(parameters: Iterable[nn.Parameter], runtime: Runtime) -> None:
    """Average the gradients of all processes in place.

    After the backward pass rather than within it, so that a loss may leave weights out or come in
    parts, each with a backward pass of its own. A weight that no process has a gradient for keeps
    none, one that another process has a gradient for counts as 0 here.
    """
    if runtime.processes == 1:
        return
    parameters = list(parameters)
    device = parameters[0].device
    found = runtime.sum(
        torch.tensor([float(p.grad is not None) for p in parameters], device=device)
    )
    used = [p for p, count in zip(parameters, found.tolist(), strict=True) if count]
    for p in used:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in used if p.grad is not None]):
        flat = runtime.sum(torch.cat([g.reshape(-1) for g in bucket])) / runtime.processes
        for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one type, up to a bucket's size together."""
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        own = gradient.numel() * gradient.element_size()
        if bucket and (gradient.dtype != bucket[0].dtype or size + own > _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += own
    if bucket:
        yield bucket

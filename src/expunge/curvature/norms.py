r"""Norms of the gradients of single samples, \(\|\nabla_\theta \ell_n\|_2\), streamed.

Not the norm of the batch's mean gradient: that one is small wherever the samples disagree.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.curvature.generic import EachLoss, accumulator_dtype, pieces
from expunge.curvature.per_sample import Path, default_chunk, per_sample_gradients


def gradient_norms(
    model: nn.Module,
    each: EachLoss,
    batches: Iterable[Batch],
    *,
    chunk: int | None = None,
) -> Tensor:
    """L2 norm of each sample's gradient over all trainable parameters together.

    Running statistics are used and left alone. What cannot be batched by vmap is differentiated
    sample by sample.

    Args:
        model: the model; left as it was.
        each: per-sample values [B] of a batch.
        batches: read one at a time.
        chunk: samples whose gradients are held at a time; from a memory bound when None.

    Returns:
        Norms [n] on CPU, in the order of the samples; float64 for a float64 model, else float32.

    Raises:
        ModelError: no parameter requires a gradient.
    """
    chunk = default_chunk(model) if chunk is None else chunk
    path: Path = "vmap"
    found = []
    for batch in batches:
        for piece in pieces(batch, chunk):
            try:
                gradients = per_sample_gradients(model, each, piece, path=path)
            except torch.OutOfMemoryError:
                raise  # a smaller chunk helps, a slower way does not
            except RuntimeError:
                if path == "loop":
                    raise
                path = "loop"
                gradients = per_sample_gradients(model, each, piece, path=path)
            squares = [
                g.to(accumulator_dtype(g.dtype)).flatten(1).square().sum(1)
                for g in gradients.values()
            ]
            found.append(torch.stack(squares).sum(0).sqrt().cpu())
    return torch.cat(found) if found else torch.empty(0)

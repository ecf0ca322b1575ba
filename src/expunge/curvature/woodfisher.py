r"""Products with the inverse of an empirical Fisher matrix made of K single-sample gradients.

\(F = \lambda I + \frac1K G^\top G\), \(G \in R^{K \times P}\). The Woodbury identity needs a K × K system only:
\(F^{-1} v = \frac1\lambda [\,v - G^\top (\lambda K I + G G^\top)^{-1} G v\,]\).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError
from expunge.core.pruned import kept_of
from expunge.curvature.generic import EachLoss, accumulator_dtype, trainable
from expunge.curvature.per_sample import per_sample_gradients

COLUMNS = 2**16
"""Columns of G that are brought to float64 at a time."""


def gradient_rows(model: nn.Module, each: EachLoss, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Yield gradients [B, P] of each batch's samples, 0 at pruned weights.

    By vmap; models for which that does not work fall back to one backward pass a sample. Columns
    are the trainable parameters in the order of `named_parameters`, in float32 or wider.
    """
    kept, fast = kept_of(model) or {}, True
    for batch in batches:
        found = None
        if fast:
            try:
                found = per_sample_gradients(model, each, batch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                fast = False
        found = found or per_sample_gradients(model, each, batch, path="loop")
        for name, mask in kept.items():
            if name in found:
                found[name] = found[name] * mask.to(found[name].device)
        yield torch.cat([g.to(accumulator_dtype(g.dtype)).flatten(1) for g in found.values()], 1)


def solve(rows: Tensor, v: Tensor, damping: float) -> Tensor:
    r"""\(F^{-1} v\) by the Woodbury identity, exact up to rounding.

    Args:
        rows: G [K, P], one gradient a sample.
        v: right-hand side [P].
        damping: λ > 0.

    Returns:
        The product [P] in float64.

    Raises:
        ExpungeError: a gradient is not finite.
    """
    k = len(rows)
    gram = torch.zeros(k, k, dtype=torch.float64, device=rows.device)
    right = torch.zeros(k, dtype=torch.float64, device=rows.device)
    wide = v.double()
    for start in range(0, rows.shape[1], COLUMNS):
        part = rows[:, start : start + COLUMNS].double()
        gram += part @ part.T
        right += part @ wide[start : start + COLUMNS]
    if not bool(gram.isfinite().all() and right.isfinite().all()):
        raise ExpungeError("the gradients are NaN or infinite, so their Fisher has no inverse")
    gram.diagonal().add_(damping * k)
    inner = torch.linalg.solve(gram, right)
    result = wide.clone()
    for start in range(0, rows.shape[1], COLUMNS):
        part = rows[:, start : start + COLUMNS].double()
        result[start : start + COLUMNS] -= part.T @ inner
    return result / damping


def rescaled_recursion(rows: Iterable[Tensor], v: Tensor, scale: float) -> Tensor:
    r"""What the released code of influence unlearning computes in place of \(F^{-1} v\).

    One direction is carried along and only ever rescaled, so the result is \(v\) less a multiple of the
    first gradient: it is *not* a product with an inverse. Kept to repeat published figures.

    Args:
        rows: gradients [P] of single samples, in order.
        v: right-hand side [P].
        scale: \(N_0\).

    Returns:
        The vector [P] in the dtype of v.
    """
    result, direction = v.clone(), None
    for row in rows:
        g = row.to(v.dtype)
        if direction is None:
            direction = g.clone()
            continue
        along = direction @ g
        share = 1 / (scale + along)
        result = result - (result @ g) * share * direction
        direction = direction * (1 - along * share)
    return result


def flat(model: nn.Module, by_name: dict[str, Tensor]) -> Tensor:
    """Join tensors by name into one vector [P] in the order of `gradient_rows`; pruned ones are 0."""
    kept = kept_of(model) or {}
    return torch.cat([
        (by_name[n] * kept[n].to(by_name[n].device) if n in kept else by_name[n]).reshape(-1)
        for n in trainable(model)
    ])


@torch.no_grad()
def add_flat(model: nn.Module, vector: Tensor) -> None:
    """Add a vector [P] to the trainable parameters in place, rounding once, to their dtype."""
    parameters = trainable(model)
    parts = vector.split([p.numel() for p in parameters.values()])
    for p, part in zip(parameters.values(), parts, strict=True):
        p.copy_((p.to(part.dtype) + part.view_as(p)).to(p.dtype))

r"""Effects from projected gradients (TRAK): no retraining on subsets, one pass of gradients instead.

With P a random matrix of signs over \(\sqrt p\), training features \(\phi_i = P^T\nabla\varphi(x_i, y_i)\) of the
margin \(\varphi = z_y - \log\sum_{c \ne y} e^{z_c}\), and query features \(g_c(x) = P^T\nabla z_c(x)\):

\[ \beta[i, x, c] = \tfrac1n\, g_c(x)^T \left(\Phi^T\Phi/n + \lambda I\right)^{-1} \phi_i\,(1 - p_{y_i}). \]

It is a Newton step that leaves out the curvature of the loss, so it ranks better than it scales.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError
from expunge.core.runtime import Runtime
from expunge.curvature.generic import EachLoss, pieces, trainable
from expunge.curvature.per_sample import MEMORY, Path, default_chunk, per_sample_gradients

BLOCK = 2**22
"""Entries of the projection that exist at a time."""


def project(rows: Tensor, dim: int, seed: int) -> Tensor:
    r"""Random signs over \(\sqrt p\) applied to rows [B, P]: [B, p], inner products kept on average.

    The matrix is made of blocks that are drawn when needed, each from a seed of its own, so that it
    is never in memory as a whole. Rows of at most `dim` numbers are returned as they are.
    """
    if rows.shape[1] <= dim:
        return rows
    result = rows.new_zeros(len(rows), dim)
    for number, part in enumerate(rows.split(max(1, BLOCK // dim), dim=1)):
        generator = torch.Generator().manual_seed(seed + number)
        signs = torch.randint(0, 2, (part.shape[1], dim), generator=generator)
        result += part @ (2 * signs - 1).to(rows)
    return result / dim**0.5


def features(
    model: nn.Module,
    each: EachLoss,
    batches: Iterable[Batch],
    *,
    dim: int,
    seed: int,
    runtime: Runtime,
) -> Tensor:
    """Projected gradients [N, p] of one value a sample.

    Args:
        model: left as it was.
        each: values [B] of a batch.
        batches: the samples.
        dim: p.
        seed: of the projection; the same for all features of one model.
        runtime: device; counts samples and gradients.

    Returns:
        Float32 on CPU.
    """
    names = list(trainable(model))
    chunk = runtime.chunk or default_chunk(model)
    path: Path = "vmap"
    done: list[Tensor] = []
    waiting: list[Tensor] = []  # drawing the projection is dear: many rows share one
    for batch in batches:
        runtime.cost.samples += len(batch)
        runtime.cost.gradients += len(batch)
        for piece in pieces(batch.to(runtime.device), chunk):
            try:
                found = per_sample_gradients(model, each, piece, path=path)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation that cannot be batched
                path = "loop"
                found = per_sample_gradients(model, each, piece, path=path)
            waiting.append(torch.cat([found[n].flatten(1).float().cpu() for n in names], dim=1))
            if sum(rows.numel() for rows in waiting) * 4 >= MEMORY:
                done.append(project(torch.cat(waiting), dim, seed))
                waiting = []
    if waiting:
        done.append(project(torch.cat(waiting), dim, seed))
    return torch.cat(done)


def projected_effects(
    queries: Iterable[Tensor], train: Tensor, weights: Tensor, lam: float
) -> Tensor:
    r"""Effects [n, N, C] from features.

    Args:
        queries: features [N, p] of the gradient of each class's logit in turn.
        train: features \(\Phi\) [n, p] of the margins of the training samples.
        weights: \(1 - p_y\) [n].
        lam: \(\lambda\), in units of the squared length of a feature.

    Returns:
        What adding each training sample does to each logit; float32.

    Raises:
        ExpungeError: the gradients are not finite, or too alike for this λ.
    """
    phi = train.double()
    if not bool(torch.isfinite(phi).all()) or not bool(torch.isfinite(weights).all()):
        raise ExpungeError("the model gives NaN or infinite gradients on its training data")
    # (Φ'Φ/n + λ)⁻¹Φ' = Φ'(ΦΦ'/n + λ)⁻¹: the smaller of the two is factorised
    wide = phi.shape[1] > len(phi)
    gram = (phi @ phi.T if wide else phi.T @ phi) / len(phi)
    gram.diagonal().add_(lam)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise ExpungeError("the gradients are too alike to be told apart; raise lam")
    scale = weights.double() / len(phi)
    if wide:
        solved = torch.cholesky_solve(phi, factor).T * scale
    else:
        solved = torch.cholesky_solve(phi.T, factor) * scale
    return torch.stack([(q.double() @ solved).T.float() for q in queries], dim=2)

"""The slow exact oracle: every gradient of every sample as one dense float64 matrix.

Tests compare the fast paths with it. It shares no code with them: a plain loop of one backward
pass a sample on a float64 copy of the model, and the definitions written out on the matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.core.data import Batch, map_inputs
from expunge.curvature.generic import EachLoss


def gradient_matrix(model: nn.Module, each: EachLoss, batches: Sequence[Batch]) -> Tensor:
    r"""Dense matrix \(G_{ni} = \partial \ell_n / \partial \theta_i\).

    Args:
        model: the model; a float64 copy in eval mode is used.
        each: per-sample values of a batch.
        batches: batches of any sizes; each sample is differentiated alone.

    Returns:
        Float64 [N, P] over all parameters in the order of `named_parameters`; columns of
        parameters that are frozen or not reached are 0.
    """
    model = copy.deepcopy(model).double().eval()
    parameters = list(model.parameters())
    rows = []
    for batch in batches:
        for n in range(len(batch)):
            one = replace(
                batch,
                x=map_inputs(batch.x, lambda t, n=n: _double(t[n : n + 1])),  # type: ignore[misc]
                y=None if batch.y is None else _double(batch.y[n : n + 1]),
                ids=batch.ids[n : n + 1],
                total=1,
                processes=1,
            )
            for p in parameters:
                p.grad = None
            each(model, one).sum().backward()  # type: ignore[no-untyped-call]
            row = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            rows.append(torch.cat([g.reshape(-1) for g in row]))
    return torch.stack(rows)


def mean_squares(matrix: Tensor) -> Tensor:
    r"""Diagonal empirical Fisher \(\frac1N \sum_n G_{ni}^2\), [P]."""
    return (matrix * matrix).mean(0)


def mean_magnitudes(matrix: Tensor) -> Tensor:
    r"""\(\frac1N \sum_n |G_{ni}|\), [P]."""
    return matrix.abs().mean(0)


def batch_means(matrix: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean gradient of each batch [n_b, P], for batches of these sizes in the order of the rows."""
    return torch.stack([rows.mean(0) for rows in matrix.split(list(sizes))])


def fisher_solve(matrix: Tensor, v: Tensor, damping: float) -> Tensor:
    r"""Solve \((\lambda I + \frac1N G^\top G)\, x = v\) for x [P], with the P × P matrix written out."""
    fisher = matrix.T @ matrix / len(matrix)
    eye = torch.eye(len(v), dtype=torch.float64)
    return torch.linalg.solve(damping * eye + fisher, v.double())


def named(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    """Cut a vector [P] into tensors by parameter name."""
    parts = flat.split([p.numel() for p in model.parameters()])
    return {
        n: part.view_as(p) for (n, p), part in zip(model.named_parameters(), parts, strict=True)
    }


def flat(model: nn.Module, by_name: dict[str, Tensor]) -> Tensor:
    """Join tensors by parameter name into a float64 vector [P]; missing names count as 0."""
    return torch.cat([
        by_name.get(n, torch.zeros_like(p)).detach().double().reshape(-1)
        for n, p in model.named_parameters()
    ])


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t

r"""Gradient restriction: keep the gradient of the training loss small, as part of training.

\(L_{GR} = L_b + \alpha \sum_t \|\nabla_{\theta_t} L_b\|_2\) over parameter tensors t, or with a single
norm over all parameters. What is restricted is the gradient of the batch *mean*, not each sample's;
a training costs about three times as much. From the method IAU (arXiv 2507.23257).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from expunge.train.fit import Loss

RestrictionNorm = Literal["per_tensor", "global"]

_FLOOR = 1e-12
"""Added under each root: a norm has no gradient at 0."""


def restricted(loss: Loss, alpha: float, norm: RestrictionNorm = "per_tensor") -> Loss:
    """Add the gradient's norm to a loss.

    Args:
        loss: `(model, batch) -> scalar`.
        alpha: weight α; with 0 the loss itself is returned.
        norm: one norm a parameter tensor, added up, or one over all parameters together.

    Returns:
        A loss that is differentiated twice on the way back.
    """
    if not alpha:
        return loss

    def penalised(model: nn.Module, batch: object) -> Tensor:
        value = loss(model, batch)
        return value + alpha * gradient_norm(value, model, norm)

    return penalised


def gradient_norm(value: Tensor, model: nn.Module, norm: RestrictionNorm) -> Tensor:
    """Norm of a loss's gradient with respect to a model's trainable parameters, differentiable."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
    squares = [g.square().sum() for g in found if g is not None]
    if norm == "global":
        return (torch.stack(squares).sum() + _FLOOR).sqrt()
    return torch.stack([(s + _FLOOR).sqrt() for s in squares]).sum()

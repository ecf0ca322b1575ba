"""Losses as plain functions of logits, one value a sample."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import kl_div, log_softmax


def kl_each(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Distillation divergence of each sample.

    \(T^2\, KL(\mathrm{softmax}(z_t/T) \,\|\, \mathrm{softmax}(z_s/T))\), the scaling of Hinton et
    al. (2015) that keeps gradients comparable over temperatures. Bounded below by 0.

    Args:
        teacher: logits \(z_t\) [B, C].
        student: logits \(z_s\) [B, C].
        temperature: \(T > 0\).

    Returns:
        Values [B] in nats.
    """
    p = log_softmax(teacher / temperature, dim=1)
    q = log_softmax(student / temperature, dim=1)
    return kl_div(q, p, reduction="none", log_target=True).sum(1) * temperature**2

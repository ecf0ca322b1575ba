"""Membership scores: one number a sample, from logits and labels; higher looks more like a member."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax


def _log_p(logits: Tensor) -> Tensor:
    return log_softmax(logits.double(), dim=1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""\(\log p_y\): the negative cross-entropy [n]."""
    return _log_p(logits).gather(1, labels[:, None]).squeeze(1)


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    r"""\(p_y\), the true class' probability [n]."""
    return loss(logits, labels).exp()


def correctness(logits: Tensor, labels: Tensor) -> Tensor:
    """1 for a right prediction, else 0 [n]."""
    return (logits.argmax(1) == labels).double()


def entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""\(\sum_c p_c \log p_c\): the negative entropy [n]; labels are not used."""
    log_p = _log_p(logits)
    return (log_p.exp() * log_p).sum(1)


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Minus the modified entropy of Song and Mittal (2021) [n].

    \(-\big[-(1-p_y)\log p_y - \sum_{c\ne y} p_c \log(1-p_c)\big]\), with \(\log(1-p_c)\) taken from the
    log-probabilities of the other classes so that saturated outputs stay finite.
    """
    log_p = _log_p(logits)
    top = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, log_p.argmax(1, keepdim=True), True)
    of_others = log_p.masked_fill(top, -torch.inf).logsumexp(1, keepdim=True)
    # log(1 − p_c): only the largest p_c can come near 1, where 1 − p_c would cancel
    rest = torch.where(top, of_others, torch.log1p(-log_p.exp().masked_fill(top, 0.0)))
    true = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, labels[:, None], True)
    terms = torch.where(true, rest.exp() * log_p, log_p.exp() * rest)
    return terms.sum(1)


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": loss,
    "confidence": confidence,
    "entropy": entropy,
    "modified-entropy": modified_entropy,
    "correctness": correctness,
}

r"""Numbers about features: debiased alignment, neighbours, linear probes, and agreement with retraining."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

ACCURACIES = ("forget-train", "retain-train", "forget-test", "retain-test")
"""Splits whose accuracies the logit part compares."""
PROBE = 3.0
"""C of linear probes: about what 1 is for features as wide networks have them, before the common scale."""
T9 = 2.262157
"""97.5 % point of Student's t with 9 degrees of freedom: ten jackknife groups."""


def debiased_cka(a: Tensor, b: Tensor) -> float:
    r"""CKA with the unbiased HSIC estimator (Song et al. 2012), near 0 for unrelated features at any width.

    With the diagonals of K, L set to 0:
    \(\mathrm{HSIC} = \frac{1}{n(n-3)}\left[\mathrm{tr}(KL) + \frac{1^\top K 1\; 1^\top L 1}{(n-1)(n-2)} - \frac{2}{n-2} 1^\top K L 1\right]\).

    Args:
        a: Gram matrix [n, n] of features as they are, n > 3.
        b: the same of other features of the same samples.

    Returns:
        HSIC(a, b) / √(HSIC(a, a) · HSIC(b, b)), slightly below 0 where nothing is shared; 0 where one of
        them is constant.
    """
    scale = _hsic(a, a) * _hsic(b, b)
    return _hsic(a, b) / scale**0.5 if scale > 0 else 0.0


def _hsic(a: Tensor, b: Tensor) -> float:
    n = len(a)
    off = 1 - torch.eye(n, dtype=a.dtype)
    a, b = a * off, b * off
    rows = a.sum(1), b.sum(1)
    found = (a * b).sum() + rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
    return float(found - 2 / (n - 2) * (rows[0] @ rows[1])) / (n * (n - 3))


def halves(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of a share of the samples, and of the rest, in random order."""
    order = torch.randperm(len(labels), generator=generator)
    cut = round(share * len(labels))
    return order[:cut], order[cut:]


def neighbours_right(
    features: Tensor, labels: Tensor, known: Tensor, asked: Tensor, k: int
) -> np.ndarray:
    """Which of the samples asked about have the label of most of their k nearest ones by cosine.

    Args:
        features: [n, d].
        labels: [n].
        known: positions of the samples whose labels are known.
        asked: positions [m] of the others.
        k: how many neighbours; of equal votes the smallest label wins.

    Returns:
        bool [m].
    """
    z = normalize(features.double(), dim=1)
    names, places = labels.unique(return_inverse=True)
    near = (z[asked] @ z[known].T).topk(min(k, len(known)), dim=1).indices
    votes = torch.nn.functional.one_hot(places[known][near], len(names)).sum(1)
    return (votes.argmax(1) == places[asked]).numpy()


def probe_right(features: Tensor, labels: Tensor, known: Tensor, asked: Tensor) -> np.ndarray:
    """Which of the samples asked about a linear classifier fitted on the others gets right, bool [m].

    All features are divided by one number, their deviation, so that the unit makes no difference; each by
    its own would blow up those that hardly vary, which a retrained model has for classes it never saw.
    """
    from sklearn.linear_model import LogisticRegression

    x, y = features.double().numpy(), labels.numpy()
    fitted = x[known.numpy()]
    middle = fitted.mean(0)
    scale = float(np.sqrt(((fitted - middle) ** 2).mean())) or 1.0
    model = LogisticRegression(C=PROBE, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one that stops early is a probe as well
        model.fit((fitted - middle) / scale, y[known.numpy()])
    return np.asarray(model.predict((x[asked.numpy()] - middle) / scale) == y[asked.numpy()])


def logit_agreement(mine: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    r"""AGL \(= \prod_k (1 - |k(M) - k(R)|)\) over the accuracies of all splits, 0 … 1."""
    return float(np.prod([1 - abs(mine[k] - theirs[k]) for k in mine]))


def feature_agreement(cka: float, mine: float, theirs: float) -> float:
    r"""AGR \(= \mathrm{CKA}(M, R) \cdot (1 - |\mathrm{kNN}(M) - \mathrm{kNN}(R)|)\), 0 … 1; CKA below 0 counts as 0."""
    return max(cka, 0.0) * (1 - abs(mine - theirs))


def harmonic(logit: float, feature: float) -> float:
    r"""H-LR \(= 2\,\mathrm{AGL}\,\mathrm{AGR} / (\mathrm{AGL} + \mathrm{AGR})\); 0 where both are 0."""
    return 2 * logit * feature / (logit + feature) if logit + feature else 0.0


def jackknife(values: Sequence[float]) -> float:
    """Half the width of a 95 % interval from values with one of ten groups of samples left out each."""
    n = len(values)
    return T9 * float(np.sqrt((n - 1) * np.var(values)))

"""Attackers that learn members from non-members of a model and are asked about its forget set."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from expunge.audits._intervals import effective_interval

Attacker = Literal["svc", "logistic"]
REFITS = 20
"""Attackers on samples drawn anew, whose answers say how much an attacker's own samples matter."""


def efficacy(
    attacker: Attacker, member: np.ndarray, outside: np.ndarray, forget: np.ndarray
) -> tuple[np.ndarray, float]:
    """Fit an attacker on half of two groups, score it on the other half, and judge the forget set.

    Args:
        attacker: `svc` (C = 3, γ = 1, RBF kernel) or `logistic` (standardised).
        member: scores [k] of retain samples, in random order, k even.
        outside: scores [k] of test samples, in random order.
        forget: scores [n].

    Returns:
        Which forget samples are called non-members [n], and the attacker's held-out accuracy.
    """
    model = _fitted(attacker, member[0::2], outside[0::2])
    y = np.repeat([1, 0], len(member) // 2)
    held_out = np.concatenate([member[1::2], outside[1::2]])[:, None]
    accuracy = float((model.predict(held_out) == y).mean())
    return model.predict(forget[:, None]) == 0, accuracy


def efficacy_interval(
    attacker: Attacker, member: np.ndarray, outside: np.ndarray, forget: np.ndarray,
    share: float, generator: torch.Generator,
) -> tuple[float, float]:  # fmt: skip
    r"""95 % interval of the share of the forget set that an attacker calls members, or non-members.

    Both the forget samples and the attacker's own could have been others:
    \(\mathrm{SE}^2 = p(1-p)/n + \mathrm{Var}_b(p_b)\) with the shares \(p_b\) of 20 attackers, each fitted on as
    many samples drawn with replacement from those of the first. The ends are those of `effective_interval`.
    (Wilson's, of the first part alone, left out the truth too often: 9 of 40 retrained regressors.)

    Args:
        attacker: as for `efficacy`, as are the next three.
        member: scores [k].
        outside: scores [k].
        forget: scores [n].
        share: p, of the one kind or the other.
        generator: draws samples.
    """
    inside, unseen = member[0::2], outside[0::2]
    n, k = len(forget), len(inside)
    shares = []
    for _ in range(REFITS):
        drawn = [torch.randint(k, (k,), generator=generator).numpy() for _ in range(2)]
        model = _fitted(attacker, inside[drawn[0]], unseen[drawn[1]])
        shares.append(
            float(model.predict(forget[:, None]).mean())
        )  # of members; as far from its mean
    variance = share * (1 - share) / n + float(np.var(shares, ddof=1))
    return effective_interval(share, variance, n - 1, n)


def _fitted(attacker: Attacker, inside: np.ndarray, unseen: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    model = (
        SVC(C=3, gamma="auto", kernel="rbf", random_state=0)
        if attacker == "svc"
        else make_pipeline(StandardScaler(), LogisticRegression())
    )
    y = np.repeat([1, 0], [len(inside), len(unseen)])
    return model.fit(np.concatenate([inside, unseen])[:, None], y)

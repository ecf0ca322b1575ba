"""What attacks find at low rates of false alarms, and AUCs of scores that come in clusters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from expunge.audits._intervals import Z95

Array = npt.NDArray[np.float64]

TAIL_ERROR = 1.5
"""How far off a tail may be that is placed by few models: that of Student's t over the normal one."""


class Rate(NamedTuple):
    """A rate of true alarms: value, 95 % interval, the false alarms it was taken at, and who was called."""

    value: float
    low: float
    high: float
    fpr: float
    called: npt.NDArray[np.bool_]


def models_for(fpr: float) -> int:
    r"""How many models a sample's distribution must be fitted on for a two-sided rate α.

    A tail placed by k models is that of Student's t with k − 1 degrees of freedom:
    the smallest k with \(t_{k-1,\,1-\alpha/2} \le 1.5\, z_{1-\alpha/2}\).
    """
    from scipy.special import ndtri, stdtrit

    wanted = TAIL_ERROR * float(ndtri(1 - fpr / 2))
    return next(k for k in range(2, 1000) if float(stdtrit(k - 1, 1 - fpr / 2)) <= wanted)


def too_few(nonmembers: int, fpr: float, models: int | None = None) -> str | None:
    """Why a rate of false alarms cannot be set, or None.

    Args:
        nonmembers: scores of samples never seen; half of the alarms are in each tail.
        fpr: α, 0 … 1.
        models: that the scarcest sample's distribution was fitted on, if any was.

    Returns:
        One clause.
    """
    wanted = math.ceil(2 / fpr - 1e-9)
    if nonmembers < wanted:
        return f"too few non-members for a false-alarm rate of {fpr:.1%}: {nonmembers}, {wanted} are needed"
    if models is not None and models < models_for(fpr):
        return (
            f"too few shadow models for a false-alarm rate of {fpr:.1%}: {models} of a side for some "
            f"sample, {models_for(fpr)} are needed; raise models"
        )
    return None


def true_alarms(members: Array, outside: Array, fpr: float, design: float = 1.0) -> Rate:
    r"""Share of members beyond thresholds in both tails that few non-members pass.

    Of m non-members, \(k = \lfloor \alpha m/2 \rfloor\) lie beyond the upper threshold and k beyond the
    lower one, or fewer where scores are tied. With TPR = x/n and FPR = 2k/m the interval is that of a
    ratio of two shares (Katz et al. 1978), so that the thresholds' own error is in it:
    \(\mathrm{TPR}\cdot\exp(\pm z\sqrt{(1-\mathrm{TPR})/x + (1-\mathrm{FPR})/2k})\); without an alarm x is taken as ½ there.

    Args:
        members: scores [n].
        outside: scores [m] of samples never seen, at least 2/α.
        fpr: α.
        design: how many times the variance is that of independent scores.

    Returns:
        The rate.
    """
    n, m = len(members), len(outside)
    k = int(fpr * m / 2 + 1e-9)
    ordered = np.sort(outside)
    called = (members > ordered[m - 1 - k]) | (members < ordered[k])
    passed = int(((outside > ordered[m - 1 - k]) | (outside < ordered[k])).sum())
    x = float(called.sum())
    share, false = x / n, max(passed, 1) / m
    spread = Z95 * math.sqrt(design * ((1 - share) / max(x, 0.5) + (1 - false) / max(passed, 1)))
    low = share * math.exp(-spread)
    high = min(1.0, max(share, 0.5 / n) * math.exp(spread))
    return Rate(share, low, high, passed / m, called)


def roc(members: Array, outside: Array, points: int = 60) -> dict[str, Any]:
    """The curve of a threshold attack, dense at low rates of false alarms, toward the better side.

    Args:
        members: scores [n].
        outside: scores [m].
        points: at most so many.

    Returns:
        `fpr` and `tpr`, rising, from 1/m or 0 on; `side`: whether high scores (`member`) or low ones
        (`other`) were called.
    """
    from expunge.audits._intervals import auc

    upward = auc(members, outside) >= 0.5
    m = len(outside)
    counts = np.unique(np.geomspace(1, m, points).round().astype(int))
    return {
        "fpr": (counts / m).tolist(),
        "tpr": _passing(members, outside, counts, upward),
        "side": "member" if upward else "other",
    }


def tpr_on(grid: dict[str, Any], members: Array, outside: Array) -> list[float]:
    """Another model's curve toward the same side and at the same rates as `grid`."""
    counts = np.round(np.array(grid["fpr"]) * len(outside)).astype(int)
    return _passing(members, outside, counts, grid["side"] == "member")


def _passing(
    members: Array, outside: Array, counts: npt.NDArray[np.int_], upward: bool
) -> list[float]:
    """Share of members beyond thresholds that so many non-members pass at most."""
    a, b = (members, outside) if upward else (-members, -outside)
    cuts = np.append(np.sort(b)[::-1], -np.inf)[counts]
    return ((len(a) - np.searchsorted(np.sort(a), cuts, "right")) / len(a)).tolist()


def clustered_auc(
    positives: Array, negatives: Array, of_positive: npt.NDArray[Any], of_negative: npt.NDArray[Any]
) -> tuple[float, float, float, float]:
    r"""AUC of scores that come in clusters, such as several scores of one model (Obuchowski 1997).

    With structural components V, W as in DeLong's and sums over a cluster i of I,
    \(\mathrm{Var} = \frac{I}{I-1}\sum_i \big(\frac{V_{i\cdot} - n_i A}{n} + \frac{W_{i\cdot} - m_i A}{m}\big)^2\);
    Student's t with I − 1 degrees of freedom.

    Args:
        positives: scores [n].
        negatives: scores [m].
        of_positive: cluster of each positive [n].
        of_negative: cluster of each negative [m].

    Returns:
        The AUC, its 95 % interval cut at 0 and 1, and how many times its variance is DeLong's (at
        least 1).
    """
    from scipy.special import stdtrit

    from expunge.audits._intervals import auc_interval, components

    v, w = components(positives, negatives)
    value = float(v.mean())
    clusters = np.unique(np.concatenate([of_positive, of_negative]))
    count = len(clusters)
    sums = np.array([
        ((v[of_positive == c] - value).sum() / len(v))
        + ((w[of_negative == c] - value).sum() / len(w))
        for c in clusters
    ])
    variance = float((sums**2).sum()) * count / max(count - 1, 1)
    plain_low, plain_high = auc_interval(positives, negatives)
    plain = ((plain_high - plain_low) / (2 * Z95)) ** 2
    half = float(stdtrit(max(count - 1, 1), 0.975)) * math.sqrt(variance)
    if half == 0:  # all pairs ordered alike
        return value, plain_low, plain_high, 1.0
    design = max(1.0, variance / plain) if plain else 1.0
    return value, max(0.0, value - half), min(1.0, value + half), design

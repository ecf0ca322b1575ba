"""Intervals over samples: Wilson for shares, Student's t for means, DeLong for AUCs."""

from __future__ import annotations

import math

import numpy as np

Z95 = 1.959963984540054


def wilson(hits: int, total: int) -> tuple[float, float]:
    r"""95 % interval of a share (Wilson 1927).

    \(\frac{\hat p + z^2/2n \pm z\sqrt{\hat p(1-\hat p)/n + z^2/4n^2}}{1 + z^2/n}\).

    Args:
        hits: how many.
        total: out of how many, at least 1.

    Returns:
        Lower and upper end, within [0, 1].
    """
    p, z2 = hits / total, Z95**2
    centre = p + z2 / (2 * total)
    half = Z95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    low, high = (centre - half) / (1 + z2 / total), (centre + half) / (1 + z2 / total)
    # rounding must not push an end past the share itself
    return max(0.0, min(low, p)), min(1.0, max(high, p))


def effective_interval(
    value: float, variance: float, degrees: int, people: int
) -> tuple[float, float]:
    r"""95 % interval of a share from its variance (Korn and Graubard 1998).

    The ends of Clopper and Pearson for \(n^* = p(1-p)/\mathrm{SE}^2 \cdot (z/t_{df})^2\) samples that are
    independent of each other, which near 0 and 1 are wider on the inner side than Student's.

    Args:
        value: the share, 0 … 1.
        variance: SE² of it.
        degrees: of freedom that the variance has.
        people: how many independent ones there are at least; they stand for n* where the variance is 0.
    """
    from scipy.special import betaincinv

    size = value * (1 - value) / variance if variance > 0 else 0.0
    size = size * (Z95 / t95(degrees)) ** 2 if size > 0 else float(people)
    hits = value * size
    low = float(betaincinv(hits, size - hits + 1, 0.025)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, size - hits, 0.975)) if hits < size else 1.0
    return min(low, value), max(high, value)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean by Student's t; the value itself for one sample."""
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean
    half = t95(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def clustered(values: np.ndarray, groups: np.ndarray) -> tuple[float, float, int]:
    r"""A mean and its standard error where samples of one group belong together.

    With residual sums \(e_g = \sum_{i \in g} (v_i - \bar v)\) of G groups:
    \(\mathrm{SE}^2 = \frac{G}{G-1}\sum_g e_g^2 / n^2\) (Liang and Zeger 1986, for a mean).

    Args:
        values: [n].
        groups: which group each is of [n]; of two groups at least.

    Returns:
        Mean, standard error, and degrees of freedom G − 1.
    """
    mean = float(values.mean())
    _, places = np.unique(groups, return_inverse=True)
    sums = np.bincount(places, values - mean)
    count = len(sums)
    spread = count / (count - 1) * float((sums**2).sum())
    return mean, math.sqrt(spread) / len(values), count - 1


def t95(degrees: int) -> float:
    """97.5 % point of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def share_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of a mean of values in 0 … 1 by Student's t, cut at 0 and 1."""
    low, high = mean_interval(values)
    return max(low, 0.0), min(high, 1.0)


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """P(positive > negative) + P(equal)/2, from ranks, ties handled (Mann and Whitney 1947)."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positives, negatives]))
    n, m = len(positives), len(negatives)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def components(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's structural components V [n] and W [m]: shares of the other side below, and above."""
    order_n, order_p = np.sort(negatives), np.sort(positives)
    below = np.searchsorted(order_n, positives) + np.searchsorted(order_n, positives, "right")
    above = np.searchsorted(order_p, negatives) + np.searchsorted(order_p, negatives, "right")
    return below / (2 * len(negatives)), 1 - above / (2 * len(positives))


def auc_interval(positives: np.ndarray, negatives: np.ndarray) -> tuple[float, float]:
    r"""95 % interval of an AUC from its structural components (DeLong 1988).

    With \(V_i\) = share of negatives below positive \(i\) and \(W_j\) = share of positives above
    negative \(j\) (ties one half), \(\mathrm{Var} = S_V/n + S_W/m\).

    Returns:
        Lower and upper end, clipped to [0, 1]. Where every pair is ordered alike, or tied, the
        variance is zero; then the rule of three over the smaller side gives the width (half of it
        for ties, which count one half).
    """
    v, w = components(positives, negatives)
    value = float(v.mean())
    spread = sum(x.var(ddof=1) / len(x) if len(x) > 1 else 0.25 for x in (v, w))
    half = Z95 * math.sqrt(spread)
    if half == 0:
        half = 3 / min(len(v), len(w)) * (1.0 if value in (0.0, 1.0) else 0.5)
    return max(0.0, value - half), min(1.0, value + half)


def two_sided(value: float, low: float, high: float) -> tuple[float, float, float]:
    """Fold an AUC and its interval at one half: max(a, 1 − a); an interval around ½ starts there."""
    folded = max(value, 1 - value)
    ends = (max(low, 1 - low), max(high, 1 - high))
    return folded, (0.5 if low <= 0.5 <= high else min(ends)), max(ends)

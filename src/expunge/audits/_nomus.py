"""NoMUS and the attack it rests on: accuracy of telling losses of two groups of people apart."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expunge.audits._intervals import clustered, effective_interval

SPLITS, HELD_OUT = 10, 0.1
"""Shuffle splits of the attack, and the share held out in each."""
NEWTON = 30
"""Steps of the jackknife's fits, at most."""
PARTS = 50
"""Parts that people are left out in, at most."""


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval over groups of samples, such as people."""

    value: float
    low: float
    high: float


def nomus(accuracy: float, mia: float, weight: float = 0.5) -> float:
    r"""\(\lambda A + (1-\lambda)(1 - 2|M - \tfrac12|)\), 0 … 1, higher is better.

    Args:
        accuracy: A on test data, 0 … 1.
        mia: M, accuracy of the attack, 0 … 1; ½ is chance.
        weight: λ, 0 … 1.
    """
    return weight * accuracy + (1 - weight) * (1 - 2 * abs(mia - 0.5))


def attack(forget: np.ndarray, unseen: np.ndarray, *, standardise: bool = True) -> float:
    """M: accuracy of a logistic regression on the loss, held out, balanced over both sides.

    The mean over ten stratified shuffle splits with a tenth held out; which side has the lower losses is
    found by the fit. ½ where all losses are equal.

    Args:
        forget: losses [n] of the samples to forget.
        unseen: losses [n] of people never seen, as many.
        standardise: bring the losses of each fit to mean 0 and variance 1, which makes M independent of
            their unit.
    """
    return float(split_by_split(forget, unseen, standardise=standardise).mean())


def split_by_split(
    forget: np.ndarray, unseen: np.ndarray, *, standardise: bool = True
) -> np.ndarray:
    """Balanced accuracy of the attack on the held-out part of each of its splits [10]; M is their mean."""
    from sklearn.model_selection import StratifiedShuffleSplit

    x, y = _both(forget, unseen)
    splits = StratifiedShuffleSplit(n_splits=SPLITS, test_size=HELD_OUT, random_state=0)
    each = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimiser that stops early still gives an attacker
        for fitted, tested in splits.split(x, y):
            right = _attacker(standardise).fit(x[fitted], y[fitted]).predict(x[tested]) == y[tested]
            each.append(np.mean([right[y[tested] == side].mean() for side in (0, 1)]))
    return np.asarray(each)


def attack_interval(
    forget: np.ndarray, unseen: np.ndarray, groups: tuple[np.ndarray, np.ndarray],
    *, standardise: bool = True,
) -> Measured:  # fmt: skip
    r"""M with the 95 % interval of what the attack would reach against endless people of the two kinds.

    Three things vary: who is asked about, who the attack was fitted on (the same people), and which samples the
    ten splits hold out. The first two are one jackknife: the attack is fitted anew and asked anew without one
    person g at a time, with weights that keep both sides equal, on all samples, as splits would add their own
    noise G times over. With the accuracies \(a_{(g)}\) of the G people of a side s and \(m_k\) of the K splits:
    \(\mathrm{SE}^2 = \sum_s \frac{G_s-1}{G_s}\sum_g (a_{(g)} - \bar a_{(\cdot)})^2 + \frac{1}{K(K-1)}\sum_k (m_k - M)^2\).
    The ends are those of `effective_interval`, of the unfolded M.

    Args:
        forget: losses [n].
        unseen: losses [n].
        groups: whose the samples of either side are, [n] each; beyond 50 people on a side they are left out
            several at a time.
        standardise: as for `attack`.
    """
    each = split_by_split(forget, unseen, standardise=standardise)
    mia = float(each.mean())
    if np.ptp(np.concatenate([forget, unseen])) == 0:
        return Measured(mia, mia, mia)  # whoever is asked about, there is nothing to tell by
    places = [_parts(g) for g in groups]
    x, y = _both(forget, unseen)
    weights = []
    for side, own in enumerate(places):
        for part in range(own.max() + 1):
            kept = [np.ones(len(forget)), np.ones(len(unseen))]
            kept[side][own == part] = 0
            weights.append(np.concatenate([k / k.sum() for k in kept]))
    without = _weighted(x[:, 0], y, np.stack(weights), standardise)
    counts = [own.max() + 1 for own in places]
    spread = each.var(ddof=1) / len(each)
    for found, count in zip(np.split(without, [counts[0]]), counts, strict=True):
        spread += (count - 1) * float(found.var())
    people = min(len(np.unique(g)) for g in groups)
    return Measured(mia, *effective_interval(mia, spread, min(counts) - 1, people))


def _parts(groups: np.ndarray) -> np.ndarray:
    """Part of each sample [n]: one a person, or 50 of several people each."""
    people = np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(people.max() + 1)  # names may have an order
    return order[people] % PARTS


def _weighted(x: np.ndarray, y: np.ndarray, weights: np.ndarray, standardise: bool) -> np.ndarray:
    """Balanced accuracy [k] of the attack fitted and asked with each of k weights [k, n] of samples [n].

    A weight's two sides sum to 1 each; the attack's penalty w²/2 stands against as many samples as have weight.
    """
    scale = (weights > 0).sum(1, keepdims=True) / 2
    x = np.broadcast_to(x, weights.shape)
    if standardise:
        mean = (weights * x).sum(1, keepdims=True) / 2
        sigma = np.sqrt((weights * (x - mean) ** 2).sum(1, keepdims=True) / 2)
        x = (x - mean) / np.where(sigma > 0, sigma, 1.0)
    w, b = _logistic(x, 2.0 * y - 1, weights * scale)
    right = ((w[:, None] * x + b[:, None] > 0) == (y == 1)) * weights
    return right.sum(1) / 2


def share(values: np.ndarray, groups: np.ndarray) -> Measured:
    """Mean of values in 0 … 1 with its interval over groups, as `effective_interval` has it."""
    mean, error, degrees = clustered(values, groups)
    return Measured(mean, *effective_interval(mean, error**2, degrees, degrees + 1))


def nomus_interval(accuracy: Measured, mia: Measured, weight: float = 0.5) -> Measured:
    r"""NoMUS with its 95 % interval from those of its two parts, which are of different people.

    NoMUS is the smaller of \(1 - \lambda + \lambda A \mp 2(1-\lambda)(M - \tfrac12)\). Either has the interval of a
    sum of two parts with ends of their own: \(\sum\theta_i - \sqrt{\sum(\theta_i-l_i)^2}\) to
    \(\sum\theta_i + \sqrt{\sum(u_i-\theta_i)^2}\) (Zou and Donner 2008); of both, the smaller ends hold. (Folding M
    first would put its truth at the very end of its interval wherever M = ½, and too few intervals would hold.)
    """
    spent = 2 * (1 - weight)
    down, up = weight * (accuracy.value - accuracy.low), weight * (accuracy.high - accuracy.value)
    lower, upper = spent * (mia.value - mia.low), spent * (mia.high - mia.value)
    lows, highs = [], []
    for sign, inner, outer in ((-1, upper, lower), (1, lower, upper)):
        value = 1 - weight + weight * accuracy.value + sign * spent * (mia.value - 0.5)
        lows.append(value - math.hypot(down, inner))
        highs.append(value + math.hypot(up, outer))
    value = nomus(accuracy.value, mia.value, weight)
    return Measured(value, max(0.0, min(lows)), min(1.0, *highs))


def cut(count: int, size: int, generator: torch.Generator) -> np.ndarray:
    """Positions of `size` of `count` samples, drawn at random."""
    return torch.randperm(count, generator=generator).numpy()[:size]


def _both(forget: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([forget, unseen])[:, None], np.repeat([1, 0], len(forget))


def _logistic(
    x: np.ndarray, signs: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    r"""Slopes and intercepts [k] that minimise \(\frac{w^2}{2} + \sum_i c_i \log(1 + e^{-s_i(wx_i+b)})\), by damped Newton.

    Args:
        x: [k, n].
        signs: s, −1 or 1 [n].
        weights: c [k, n].
    """
    w, b = np.zeros(len(x)), np.zeros(len(x))

    def height(w: np.ndarray, b: np.ndarray) -> np.ndarray:
        inside = signs * (w[:, None] * x + b[:, None])
        return np.asarray(w**2 / 2 + (weights * np.logaddexp(0, -inside)).sum(1))

    now = height(w, b)
    for _ in range(NEWTON):
        p = 1 / (1 + np.exp(-np.clip(w[:, None] * x + b[:, None], -500, 500)))
        slope, curve = weights * (p - (signs > 0)), weights * p * (1 - p)
        gw, gb = w + (slope * x).sum(1), slope.sum(1)
        hww, hwb = 1 + (curve * x * x).sum(1), (curve * x).sum(1)
        hbb = curve.sum(1) + 1e-12
        det = hww * hbb - hwb**2
        step_w, step_b = (hbb * gw - hwb * gb) / det, (hww * gb - hwb * gw) / det
        length = np.ones(len(w))
        for _ in range(NEWTON):
            after = height(w - length * step_w, b - length * step_b)
            worse = after > now
            if not worse.any():
                break
            length = np.where(worse, length / 2, length)
        length = np.where(worse, 0.0, length)
        w, b = w - length * step_w, b - length * step_b
        now = height(w, b)
        if np.abs(np.concatenate([gw, gb])).max() < 1e-8 * weights.sum():
            break
    return w, b


def _attacker(standardise: bool) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression()) if standardise else LogisticRegression()  # fmt: skip

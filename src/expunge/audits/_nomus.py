"""NoMUS and the attack it rests on: accuracy of telling losses of two groups of people apart."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expunge.audits._intervals import clustered, t95

SPLITS, HELD_OUT = 10, 0.1
"""Shuffle splits of the attack, and the share held out in each."""


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
    return held_out(forget, unseen, standardise=standardise)[0]


def held_out(
    forget: np.ndarray, unseen: np.ndarray, *, standardise: bool = True
) -> tuple[float, np.ndarray, np.ndarray]:
    """M as `attack`, and for each sample [2n] how often it was held out, and was then called rightly."""
    from sklearn.model_selection import StratifiedShuffleSplit

    x, y = _both(forget, unseen)
    splits = StratifiedShuffleSplit(n_splits=SPLITS, test_size=HELD_OUT, random_state=0)
    times, hits, each = np.zeros(len(y)), np.zeros(len(y)), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimiser that stops early still gives an attacker
        for fitted, tested in splits.split(x, y):
            right = _attacker(standardise).fit(x[fitted], y[fitted]).predict(x[tested]) == y[tested]
            times[tested] += 1
            hits[tested] += right
            each.append([right[y[tested] == side].mean() for side in (0, 1)])
    return float(np.mean(each)), times, hits


def attack_interval(
    mia: float, forget: np.ndarray, unseen: np.ndarray, groups: tuple[np.ndarray, np.ndarray],
    *, standardise: bool = True,
) -> Measured:  # fmt: skip
    r"""M with its interval: how much the attack's rights and wrongs vary from person to person.

    Rights and wrongs are those of the held-out samples, each counted as often as it was held out (some never,
    some several times: the ten parts together say less than all samples would). With residual sums
    \(e_g = \sum_{i \in g} (h_i - \bar h c_i)\) of hits h and times c over the G people of a side:
    \(\mathrm{SE}^2 = \frac{G}{G-1}\sum_g e_g^2 / (\sum_i c_i)^2\). The interval is that of the unfolded M.

    Args:
        mia: M as `attack` gives it.
        forget: losses [n].
        unseen: losses [n].
        groups: whose the samples of either side are, [n] each.
        standardise: as for `attack`.
    """
    if np.ptp(np.concatenate([forget, unseen])) == 0:
        return Measured(mia, mia, mia)  # whoever is asked about, there is nothing to tell by
    _, times, hits = held_out(forget, unseen, standardise=standardise)
    errors, degrees = [], []
    for h, c, g in zip(np.split(hits, 2), np.split(times, 2), groups, strict=True):
        # a weighted mean's residuals have a mean of zero, so that `clustered` squares them as they are
        _, error, free = clustered((h - h.sum() / c.sum() * c) * len(c) / c.sum(), g)
        errors.append(error)
        degrees.append(free)
    half = t95(min(degrees)) * 0.5 * math.hypot(*errors)
    if half == 0 and mia != 0.5:
        half = 3 / (min(degrees) + 1)  # everybody is told apart: the rule of three
    return Measured(mia, max(0.0, mia - half), min(1.0, mia + half))


def share(values: np.ndarray, groups: np.ndarray) -> Measured:
    """Mean of values in 0 … 1 with its interval over groups, cut at 0 and 1."""
    mean, error, degrees = clustered(values, groups)
    half = t95(degrees) * error
    if half == 0:
        half = 3 / (degrees + 1)
    return Measured(mean, max(0.0, mean - half), min(1.0, mean + half))


def nomus_interval(accuracy: Measured, mia: Measured, weight: float = 0.5) -> Measured:
    r"""NoMUS with the interval of its two parts, which are of different people, put together.

    With parts \(\theta_i\) in \([l_i, u_i]\): \(\sum\theta_i - \sqrt{\sum(\theta_i-l_i)^2}\) to
    \(\sum\theta_i + \sqrt{\sum(u_i-\theta_i)^2}\) (Zou and Donner 2008).
    """
    gaps = [abs(end - 0.5) for end in (mia.low, mia.high)]
    least = 0.0 if mia.low <= 0.5 <= mia.high else min(gaps)
    forgetting = Measured(1 - 2 * abs(mia.value - 0.5), 1 - 2 * max(gaps), 1 - 2 * least)
    parts = ((weight, accuracy), (1 - weight, forgetting))
    value = nomus(accuracy.value, mia.value, weight)
    below = math.hypot(*(w * (p.value - p.low) for w, p in parts))
    above = math.hypot(*(w * (p.high - p.value) for w, p in parts))
    return Measured(value, max(0.0, value - below), min(1.0, value + above))


def cut(count: int, size: int, generator: torch.Generator) -> np.ndarray:
    """Positions of `size` of `count` samples, drawn at random."""
    return torch.randperm(count, generator=generator).numpy()[:size]


def _both(forget: np.ndarray, unseen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([forget, unseen])[:, None], np.repeat([1, 0], len(forget))


def _attacker(standardise: bool) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression()) if standardise else LogisticRegression()  # fmt: skip

"""What a fitted fraction is worth: bootstrap from the fit, known fractions put in, rival models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from expunge.audits._density import Array, fit_density
from expunge.audits._mixture import ONE_SIDED, Mixture, Population, em, limits

INJECTED = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Fractions of the injection test."""


@dataclass(frozen=True)
class Bootstrap:
    """Populations drawn from the best fit and fitted again.

    Attributes:
        fractions: best shares [B].
        limits: upper limits [B].
        fit: share of the draws with a ln L of at most the population's own; near 0 the model is wrong.
        p_value: share of draws *without* the new class whose TS(0) is at least the population's.
    """

    fractions: Array
    limits: Array
    fit: float
    p_value: float


def bootstrap(
    population: Population, threshold: float, random: np.random.Generator, count: int = 100
) -> Bootstrap:
    """Parametric bootstrap of a fit without covariate term; labelled samples are drawn anew as well.

    So the interval of a limit holds what the labelled samples leave open, not only what the
    population's size does. Wilks' theorem fails at the boundary: `p_value` is the one to cite.

    Args:
        population: as fitted.
        threshold: of TS, for the limits.
        random: draws.
        count: B.

    Returns:
        What the draws gave.
    """
    mixture, size = population.mixture, len(population.x)
    found = [_drawn(mixture, population.best.shares, size, random) for _ in range(count)]
    fractions, uppers, values = limits(np.stack(found), threshold)
    fit = float((values <= population.best.likelihood).mean())
    without, at_zero = em(population.logs[None], np.zeros(1))
    seen = 2 * (population.best.likelihood - float(at_zero[0]))
    empty = np.stack([_drawn(mixture, without[0], size, random) for _ in range(count)])
    _, free = em(empty, enough=1e-6)
    _, none = em(empty, np.zeros(count), enough=1e-6)
    as_large = float((2 * (free - none) >= seen).sum())
    return Bootstrap(fractions, uppers, fit, (as_large + 1) / (count + 1))


def _drawn(mixture: Mixture, shares: Array, size: int, random: np.random.Generator) -> Array:
    """Log densities, fitted to new labelled samples, of a new population [size, K + 1]."""
    parts = (*mixture.known, mixture.new)
    counts = random.multinomial(size, shares / shares.sum())
    x = np.concatenate([p.draw(int(n), random) for p, n in zip(parts, counts, strict=True)])
    known = tuple(p.again(random) for p in mixture.known)
    return replace(mixture, known=known, new=mixture.new.again(random)).logs(x, quickly=True)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of TS under which 95 % of the limits hold, by the true fraction.

    TS takes the densities for known; they are estimated, and the more they overlap the more that
    matters. So the threshold is what populations of known fractions ask for, and never under 2.71.

    Attributes:
        halved: at each of `INJECTED`, with half of the labelled samples.
    """

    halved: Array

    @property
    def whole(self) -> Array:
        """With all of them: what is above 2.71 comes from their number, and halves."""
        return ONE_SIDED + (self.halved - ONE_SIDED) / 2

    def __call__(self, fraction: float) -> float:
        """The threshold at a fraction, linear in between."""
        return float(np.interp(fraction, INJECTED, self.whole))


def injected(
    known: Sequence[Array], new: Array, size: int, random: np.random.Generator, repeats: int
) -> dict[float, Array]:
    """Populations of known fractions, as log densities [repeats, size, K + 1] by fraction.

    Each time the labelled samples are halved: densities are fitted on one half, and a population
    with the given fraction of new samples is drawn from the other, so that real samples and not
    the fitted densities are what is counted.
    """
    drawn: dict[float, list[Array]] = {f: [] for f in INJECTED}
    everything = np.concatenate([*known, new])
    box = np.stack([everything.min(0), everything.max(0)]).reshape(2, -1)
    for _ in range(repeats):
        halves = [_halves(g, random) for g in (*known, new)]
        *parts, last = (fit_density(fitted, box, random, repeats=1) for fitted, _ in halves)
        mixture = Mixture(tuple(parts), last, np.empty((0, 1)), np.empty((0, 0)))
        outside = np.concatenate([rest for _, rest in halves[:-1]])
        for fraction, populations in drawn.items():
            inside = round(fraction * size)
            x = np.concatenate([
                halves[-1][1][random.integers(len(halves[-1][1]), size=inside)],
                outside[random.integers(len(outside), size=size - inside)],
            ])
            populations.append(mixture.logs(x.reshape(size, -1), quickly=True))
    return {f: np.stack(p) for f, p in drawn.items()}


def thresholds(populations: dict[float, Array]) -> Thresholds:
    """The 95 % quantile of TS at the true fraction, where the estimate lies below it."""
    found = []
    for fraction, logs in populations.items():
        shares, best = em(logs, enough=1e-6)
        _, there = em(logs, np.full(len(logs), fraction), enough=1e-6)
        low = shares[:, -1] < fraction
        found.append(float(np.quantile(np.where(low, 2 * (best - there), 0.0), 0.95)))
    return Thresholds(np.maximum(found, ONE_SIDED))


def self_test(populations: dict[float, Array], allowed: Thresholds) -> list[dict[str, float]]:
    """See whether known fractions come out of populations that set no threshold.

    Args:
        populations: from `injected`.
        allowed: from other populations.

    Returns:
        For each fraction: the mean estimate, its 68 % band, whether the fraction is in it, and the share of
        the limits that hold.
    """
    found = []
    for (fraction, logs), threshold in zip(populations.items(), allowed.halved, strict=True):
        shares, best = em(logs, enough=1e-6)
        _, there = em(logs, np.full(len(logs), fraction), enough=1e-6)
        estimates = shares[:, -1]
        holds = (estimates >= fraction) | (2 * (best - there) <= threshold)
        low, high = np.percentile(estimates, [16, 84])
        found.append({
            "fraction": fraction,
            "estimate": float(estimates.mean()),
            "low": float(low),
            "high": float(high),
            "within": float(low - 1e-3 <= fraction <= high + 1e-3),
            "covered": float(holds.mean()),
        })
    return found


def _halves(values: Array, random: np.random.Generator) -> tuple[Array, Array]:
    order = random.permutation(len(values))
    cut = len(values) // 2
    return values[order[:cut]], values[order[cut:]]


def rivals(mixture: Mixture, x: Array, shares: Sequence[int]) -> list[dict[str, Any]]:
    """Compare models of the shift: none, prior, covariate, both.

    Args:
        mixture: with one or more known classes.
        x: scores of the population.
        shares: labelled samples of each known class.

    Returns:
        For each model: ln L, `gain` 2Δ ln L over none, its further degrees of freedom, AIC, and the
        fraction.
    """
    pooled = mixture if len(shares) == 1 else mixture.pooled(shares)
    width = x.reshape(len(x), -1).shape[1]
    models = [("none", pooled, False, 0), ("covariate", pooled, True, 2 * width)]
    if len(shares) > 1:
        models.insert(1, ("prior", mixture, False, len(shares) - 1))
        models.append(("both", mixture, True, len(shares) - 1 + 2 * width))
    found: list[dict[str, Any]] = []
    base = math.nan
    for name, model, covariate, freedom in models:
        best = Population(model, x, covariate=covariate).best
        base = best.likelihood if name == "none" else base
        found.append({
            "model": name,
            "likelihood": best.likelihood,
            "gain": 2 * (best.likelihood - base),
            "freedom": freedom,
            "aic": 2 * (freedom + 1) - 2 * best.likelihood,
            "fraction": best.fraction,
        })
    return found

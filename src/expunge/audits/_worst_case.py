r"""The worst-case privacy score: how well any threshold on one statistic tells two groups of values apart.

For a threshold t, "positive" is a value of at least t. With FPR the share of one group's values that are
positive, FNR the share of the other's that are not, both at least 1e-10, and δ = 1e-5:

\[ \varepsilon = \max\big(0, \min(\ln(1-\delta-FPR) - \ln FNR,\; \ln(1-\delta-FNR) - \ln FPR)\big),
   \qquad q = 2^{-\varepsilon}. \]

q = 0 where FPR = FNR = 0 and 1 where either is at least 1 − δ. The attack's score is 1 − q and PS is one less
the largest over thresholds, statistics, and which group is the positive one: 1 cannot be told apart, 0 is
told apart at sight. The *min* asks for both error rates to be small; a maximum would be decided by one
empty tail. Two finite samples of one distribution do not reach 1: the null floor belongs beside the value.
Source: the routine of Unlearning Comparator (card), read in its code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expunge.core.errors import DataError

Array = npt.NDArray[np.float64]
Values = Mapping[str, Array]
"""Values [n] of each statistic."""

DELTA, SMALLEST = 1e-5, 1e-10
TEMPERATURE = 2.0
"""Of the entropy."""


def statistics(logits: Tensor) -> dict[str, Array]:
    r"""Entropy of softmax(z/2) and confidence \(\ln p_{max} - \ln(1 - p_{max})\), [n] each, from logits [n, C]."""
    z = logits.double()
    log_p = torch.log_softmax(z / TEMPERATURE, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    top = z.max(1, keepdim=True)
    others = z.scatter(1, top.indices, -math.inf).logsumexp(1)
    return {"entropy": entropy.numpy(), "confidence": (top.values[:, 0] - others).numpy()}


def grids(classes: int, points: int) -> dict[str, Array]:
    """Thresholds: 0 to 2.5 for entropies and −2.5 to 10 for confidences, wider where many classes reach further."""
    most = math.log(max(classes, 2))
    return {
        "entropy": np.linspace(0.0, max(2.5, most), points),
        "confidence": np.linspace(min(-2.5, -most), 10.0, points),
    }


@dataclass(frozen=True)
class Curve:
    """One statistic and direction over its thresholds: [T] each."""

    fpr: Array
    fnr: Array
    attack: Array


@dataclass(frozen=True)
class Score:
    """PS and the attack that it comes from.

    Attributes:
        value: PS, 0 to 1.
        statistic: of the best attack.
        threshold: of the best attack.
        above: which group is positive there: `model` or `reference`.
        curves: all curves, by statistic and positive group.
    """

    value: float
    statistic: str
    threshold: float
    above: str
    curves: dict[tuple[str, str], Curve]


def attack_scores(fpr: Array, fnr: Array) -> Array:
    """1 − q at each pair of error rates."""
    nothing, hopeless = (fpr == 0) & (fnr == 0), (fpr >= 1 - DELTA) | (fnr >= 1 - DELTA)
    p, n = np.maximum(fpr, SMALLEST), np.maximum(fnr, SMALLEST)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.log(np.maximum(1 - DELTA - p, 0)) - np.log(n)
        second = np.log(np.maximum(1 - DELTA - n, 0)) - np.log(p)
        q = 2.0 ** -np.maximum(0.0, np.minimum(first, second))
    return np.where(nothing, 1.0, np.where(hopeless, 0.0, 1 - q))


def at_least(values: Array, grid: Array) -> Array:
    """Share [T] of the values, clipped into the grid's range, that are at least each threshold."""
    clipped = np.sort(np.clip(values, grid[0], grid[-1]))
    return 1 - np.searchsorted(clipped, grid, "left") / len(clipped)


def curve(positive: Array, negative: Array, grid: Array) -> Curve:
    """Error rates and attack score over thresholds, with one group taken for positive."""
    fpr, fnr = at_least(negative, grid), 1 - at_least(positive, grid)
    return Curve(fpr, fnr, attack_scores(fpr, fnr))


def privacy(model: Values, reference: Values, grid: Mapping[str, Array]) -> Score:
    """PS of two groups of values.

    Args:
        model: values [n] of each statistic in the model.
        reference: values [m] in the retrained model.
        grid: thresholds [T] of each statistic.

    Returns:
        The score; the same with the groups exchanged.

    Raises:
        DataError: a group is empty or holds what is no number.
    """
    curves: dict[tuple[str, str], Curve] = {}
    for name, thresholds in grid.items():
        mine, theirs = model[name], reference[name]
        groups = (mine, theirs)
        if not all(len(g) for g in groups) or not all(np.isfinite(g).all() for g in groups):
            raise DataError(f"a group of {name} values is empty, or holds NaN or infinite values")
        curves[name, "model"] = curve(mine, theirs, thresholds)
        curves[name, "reference"] = curve(theirs, mine, thresholds)
    best = max(curves, key=lambda k: float(curves[k].attack.max()))
    at = int(curves[best].attack.argmax())
    value = 1 - float(curves[best].attack[at])
    return Score(value, best[0], float(grid[best[0]][at]), best[1], curves)


def resampled(
    model: Values, reference: Values, grid: Mapping[str, Array], random: np.random.Generator, count: int
) -> Array:  # fmt: skip
    """PS [count] of records drawn with replacement, each side for itself."""
    sizes = [len(next(iter(v.values()))) for v in (model, reference)]
    found = []
    for _ in range(count):
        rows = [random.integers(n, size=n) for n in sizes]
        a, b = (
            {k: v[r] for k, v in g.items()} for g, r in zip((model, reference), rows, strict=True)
        )
        found.append(privacy(a, b, grid).value)
    return np.array(found)


def null_floor(
    pool: Values, sizes: tuple[int, int], grid: Mapping[str, Array], random: np.random.Generator, count: int
) -> Array:  # fmt: skip
    """PS [count] of two samples of one distribution, drawn with replacement from a pool of values.

    Args:
        pool: values of each statistic; a record's statistics stay together.
        sizes: records of either sample.
        grid: thresholds of each statistic.
        random: draws.
        count: pairs of samples.

    Returns:
        What there is to reach for so many records, and not 1.
    """
    size = len(next(iter(pool.values())))
    found = []
    for _ in range(count):
        a, b = (
            {k: v[rows] for k, v in pool.items()}
            for rows in (random.integers(size, size=n) for n in sizes)
        )
        found.append(privacy(a, b, grid).value)
    return np.array(found)

r"""In which orders a shard's slices are learned: cyclic, matched to where deletions fall, or random.

A sequence \(\pi\) is a permutation of the slices 0 … L−1. Deleting from slice \(\pi_k\) leaves the
prefix \(\pi_1 … \pi_{k-1}\) alive, so several orders of the same slices keep some prefix alive longer
(S3T, Bhardwaj et al. 2024).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from expunge.core.errors import SettingError

Order = tuple[int, ...]
Selection = Literal["cyclic", "matching"]
_FLOOR = -1e9  # log score of a prefix that will surely be hit; finite, as the assignment asks


def choose(
    selection: Selection, slices: int, orders: int, prior: Sequence[float] | None, requests: float
) -> list[Order]:
    """Choose the sequences of a shard.

    Args:
        selection: `cyclic` or `matching`.
        slices: L.
        orders: B, how many.
        prior: probability [L] that a request falls into each slice; uniform if None.
        requests: t, expected number of requests; `matching` weighs lengths by it.

    Returns:
        B different permutations of 0 … L−1.

    Raises:
        SettingError: there are not that many, or `cyclic` is given a prior it would not use.
    """
    if selection == "matching":
        return matching(prior or [1 / slices] * slices, orders, requests)
    if selection != "cyclic":
        raise SettingError(f"sequences takes cyclic or matching, not {selection!r}")
    if prior is not None:
        raise SettingError("cyclic sequences use no prior; choose sequences='matching'")
    return cyclic(slices, orders)


def cyclic(slices: int, orders: int) -> list[Order]:
    """Rotations of 0 … L−1; beyond L of them, rotations of what follows each first slice, and so on.

    The first B of a larger choice are the choice of B. Up to L of them differ at every place.

    Args:
        slices: L.
        orders: B, at most L!.

    Returns:
        B different permutations.

    Raises:
        SettingError: B lies outside 1 … L!.
    """
    _check(slices, orders, math.factorial(slices) if slices <= 20 else orders)
    return _rotations(tuple(range(slices)), orders)


def _rotations(items: Order, count: int) -> list[Order]:
    size = len(items)
    if size <= 1:
        return [items]
    # every first slice gets its share; the earlier ones take the remainder
    tails = [
        _rotations(items[k + 1 :] + items[:k], count // size + (k < count % size))
        if count // size + (k < count % size)
        else []
        for k in range(size)
    ]
    turns = range(max(map(len, tails)))
    return [(items[k], *tails[k][t]) for t in turns for k in range(size) if t < len(tails[k])]


def log_score(sequence: Sequence[int], prior: Sequence[float], requests: float) -> float:
    r"""\(\log \sum_{n=1}^{|\pi|} n\,(1-\sum_{i\le n} p_{\pi_i})^t\): layers usable after t requests.

    Args:
        sequence: slices of a prefix, in order.
        prior: p [L].
        requests: t; in log space it may be large without underflow.

    Returns:
        The logarithm of the expected number; −∞ where every prefix is surely hit.
    """
    hit = np.minimum(np.cumsum([prior[j] for j in sequence]), 1.0)
    with np.errstate(divide="ignore"):
        terms = np.log(np.arange(1, len(sequence) + 1)) + requests * np.log1p(-hit)
    top = float(terms.max())
    return top if top == -math.inf else top + math.log(float(np.exp(terms - top).sum()))


def matching(prior: Sequence[float], orders: int, requests: float = 100.0) -> list[Order]:
    """Sequences by iterated bipartite matching of prefixes and next slices, best first.

    Starts from the L prefixes of one slice; L−1 times each is given a next slice, every slice once,
    so that the log scores add up to the most (Hungarian method). Each slice therefore stands once in
    every column of the L sequences, and the prior only says which B of them are kept.

    Args:
        prior: p [L], probability that a request falls into each slice.
        orders: B, at most L.
        requests: t, expected number of requests.

    Returns:
        The B sequences of highest score.

    Raises:
        SettingError: B lies outside 1 … L, or the prior is none.
    """
    size = len(prior)
    _check(size, orders, size)
    if min(prior) < 0 or not 0 < sum(prior) <= 1 + 1e-9:
        raise SettingError(
            "a prior holds probabilities of the slices, at least 0, that add up to 1"
        )
    rows: list[Order] = [(j,) for j in range(size)]
    for _ in range(size - 1):
        weight = np.full((size, size), -np.inf)
        for i, j in itertools.product(range(size), repeat=2):
            if j not in rows[i]:
                weight[i, j] = max(log_score((*rows[i], j), prior, requests), _FLOOR)
        chosen = linear_sum_assignment(weight, maximize=True)[1]
        rows = [(*row, int(j)) for row, j in zip(rows, chosen, strict=True)]
    rows.sort(key=lambda row: -log_score(row, prior, requests))
    return rows[:orders]


def random_orders(slices: int, orders: int, generator: np.random.Generator) -> list[Order]:
    """Different random permutations: a baseline.

    Args:
        slices: L.
        orders: B, at most L!.
        generator: of the draws.
    """
    return weighted_orders([0.0] * slices, orders, generator)


def weighted_orders(
    prior: Sequence[float], orders: int, generator: np.random.Generator
) -> list[Order]:
    """Different permutations drawn slice by slice in proportion to 1 − p: a baseline.

    Args:
        prior: p [L].
        orders: B, at most L!.
        generator: of the draws.

    Returns:
        The permutations, in the order they were drawn.

    Raises:
        SettingError: there are not that many.
    """
    size = len(prior)
    _check(size, orders, math.factorial(size) if size <= 20 else orders)
    weight = np.maximum(1.0 - np.asarray(prior, dtype=float), 1e-9)
    found: dict[Order, None] = {}
    while len(found) < orders:
        drawn = generator.choice(size, size, replace=False, p=weight / weight.sum())
        found.setdefault(tuple(map(int, drawn)))
    return list(found)


def distance(sequences: Sequence[Order]) -> float:
    """Mean number of places at which two of the sequences differ (Hamming); 0 for one alone."""
    pairs = list(itertools.combinations(sequences, 2))
    if not pairs:
        return 0.0
    return sum(sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs) / len(pairs)


def _check(slices: int, orders: int, most: int) -> None:
    if slices < 1:
        raise SettingError(f"slices must be at least 1, not {slices}")
    if not 1 <= orders <= most:
        raise SettingError(f"orders of {slices} slices: between 1 and {most}, not {orders}")

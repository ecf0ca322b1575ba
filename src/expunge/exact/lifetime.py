r"""How many deletions a sharded model survives: the theory, and the simulation it is held against.

A shard dies exactly when each of its distinct *first* slices was hit, so the model's lifetime is that
of a collector of \(m B'\) coupons among \(mL\) that are drawn uniformly, \(B' = \min(B, L)\).
All of this holds for uniform requests, few beside the number of samples; a requester who knows the
slices and aims at them is not covered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy.integrate import quad

from expunge.exact.chains import serving
from expunge.exact.sequences import Order


def harmonic(n: int) -> float:
    r"""\(H_n = \sum_{k=1}^n 1/k\); 0 for n = 0."""
    return math.fsum(1 / k for k in range(1, n + 1))


def expected(shards: int, slices: int, orders: int) -> float:
    r"""Expected requests until no shard is alive: \(m L\, H_{m\min(B,L)}\).

    Args:
        shards: m.
        slices: L.
        orders: B.
    """
    return remaining(shards * slices, shards * min(orders, slices))


def remaining(places: int, first: int) -> float:
    r"""Expected further requests until the last shard dies, \(mL \, H_R\).

    Args:
        places: mL, slices of all shards.
        first: R, first slices still alive over all shards.
    """
    return places * harmonic(first)


def weighted(chances: Sequence[float]) -> float:
    r"""The same where slices are hit with different probabilities.

    \(\int_0^\infty \bigl(1-\prod_i (1-e^{-p_i t})\bigr)\,dt\), with \(p_i\) that of the i-th live first
    slice; \(\infty\) if one of them is never hit.

    Args:
        chances: probability of a request to fall into each live first slice.
    """
    p = np.asarray(chances, dtype=float)
    if not len(p):
        return 0.0
    if p.min() <= 0:
        return math.inf
    scale = 1 / p.min()  # in units in which the slowest coupon takes 1

    def alive(u: float) -> float:
        return float(-np.expm1(np.log(-np.expm1(-p * scale * u)).sum())) if u > 0 else 1.0

    cut = float(np.clip(p.min() / p.max(), 1e-6, 1.0))
    parts = quad(alive, 0, cut, limit=200)[0] + quad(alive, cut, np.inf, limit=200)[0]
    return scale * parts


def survival(places: int, first: int, requests: int) -> float:
    r"""Probability that a shard with R live first slices is alive after r uniform requests.

    Exact, by inclusion and exclusion: \(1-\sum_{k=0}^{R} (-1)^k \binom Rk (1-\tfrac{k}{mL})^r\). The paper
    takes hits as independent: \(1-\zeta^R\) with \(\zeta = 1-(1-\tfrac1{mL})^r\).

    Args:
        places: mL.
        first: R of this shard.
        requests: r.
    """
    # in whole numbers: the terms are huge, of either sign, and cancel
    dead = sum((-1) ** k * math.comb(first, k) * (places - k) ** requests for k in range(first + 1))
    return float(1 - Fraction(dead, places**requests))


def simulate(
    sequences: Sequence[Order], shards: int, runs: int, generator: np.random.Generator
) -> np.ndarray:
    """Lifetimes of a model whose shards all have these sequences, by carrying the requests out.

    Args:
        sequences: of every shard.
        shards: m.
        runs: independent lives.
        generator: draws the requests.

    Returns:
        Requests [runs] until no shard was alive, the last one included.
    """
    slices = len(sequences[0])
    lives = np.zeros(runs, dtype=np.int64)
    for run in range(runs):
        dead: list[set[int]] = [set() for _ in range(shards)]
        alive = set(range(shards))
        while alive:
            lives[run] += 1
            shard, piece = divmod(int(generator.integers(shards * slices)), slices)
            if piece in dead[shard]:
                continue
            dead[shard].add(piece)
            if serving(sequences, dead[shard]) is None:
                alive.discard(shard)
    return lives

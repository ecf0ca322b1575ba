r"""Projection onto the box-simplex \(S = \{w : 0 \le w \le 1,\ \sum_i w_i = m\}\)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expunge.core.errors import SettingError

Groups = list[tuple[Tensor, int]]
"""Places of weights that are projected together, and what they add up to."""

HALVINGS = 200
"""Most halvings; in double precision the interval is used up before."""

ROUNDING = 1e-12
"""What lies so close to a bound is on it."""


def project(a: Tensor, total: float) -> Tensor:
    r"""The nearest point of S: \(\Pi(a) = \mathrm{clip}(a - \mu, 0, 1)\).

    \(g(\mu) = \sum_i \mathrm{clip}(a_i - \mu, 0, 1) - m\) does not grow with μ, is \(N - m \ge 0\) at \(\min a - 1\)
    and \(-m \le 0\) at \(\max a\): bisection finds its zero as far as numbers go, and what lies between its last two points
    is split in proportion, so that the sum holds for equal and for huge values too. The order of the values stays.

    Args:
        a: any finite values [N].
        total: m, 0 … N.

    Returns:
        w [N] in double precision.

    Raises:
        SettingError: no point of the box has that sum.
    """
    if not 0 <= total <= len(a):
        raise SettingError(f"{len(a)} weights between 0 and 1 cannot add up to {total:g}")
    if not len(a):
        return a.double()
    a = a.double()
    # of values so large that 1 is lost in rounding the next smaller one is below all
    low, high = float(np.nextafter(float(a.min()) - 1, -np.inf)), float(a.max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if float((a - middle).clamp(0, 1).sum()) >= total:
            low = middle
        else:
            high = middle
    # between two neighbours in floating point the sum is taken as a line
    w, most = (a - high).clamp(0, 1), (a - low).clamp(0, 1)
    w += (most - w) * ((total - w.sum()) / (most - w).sum().clamp_min(1e-300)).clamp(0, 1)
    return torch.where((w - w.round()).abs() < ROUNDING, w.round(), w)  # whole weights stay whole


def projected(a: Tensor, groups: Groups) -> Tensor:
    """The nearest weights [N] that add up to what each group wants; those of no group are 0.

    Args:
        a: any finite values [N].
        groups: of which no two share a place.
    """
    w = torch.zeros_like(a)
    for places, count in groups:
        w[places] = project(a[places], count)
    return w


def largest(w: Tensor, groups: Groups) -> Tensor:
    """Ones [N] at the largest weights of each group, of equal ones at the first; else zeros.

    Args:
        w: weights [N].
        groups: of which no two share a place.
    """
    marked = torch.zeros_like(w)
    for places, count in groups:
        marked[places[torch.argsort(w[places], descending=True, stable=True)[:count]]] = 1
    return marked

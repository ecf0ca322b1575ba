r"""Projection onto the box-simplex \(S = \{w : 0 \le w \le 1,\ \sum_i w_i = m\}\)."""

from __future__ import annotations

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
    and \(-m \le 0\) at \(\max a\): bisection finds its zero, and what lies strictly inside the box then shares
    what rounding left over. The order of the values stays.

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
    low, high = float(a.min()) - 1, float(a.max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if float((a - middle).clamp(0, 1).sum()) >= total:
            low = middle
        else:
            high = middle
    w = (a - low).clamp(0, 1)
    w = torch.where((w - w.round()).abs() < ROUNDING, w.round(), w)  # whole weights stay whole
    inside = (w > 0) & (w < 1)
    if bool(inside.any()):
        w[inside] += (total - w.sum()) / inside.sum()
    return w.clamp_(0, 1)


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

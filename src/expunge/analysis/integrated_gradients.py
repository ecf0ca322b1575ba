r"""Integrated gradients: how much each input coordinate adds to a value, along a straight path.

\(a_i = (x_i - x'_i) \int_0^1 \partial_i F(x' + \alpha (x - x'))\, d\alpha\), so that
\(\sum_i a_i = F(x) - F(x')\). The integral is a sum over points of the path; how far the sum of
the attributions is from \(F(x) - F(x')\) is returned with it, since a coarse path may be far off
(Sundararajan, Taly, Yan 2017, arXiv 1703.01365).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.core.errors import ExpungeError, SettingError

Rule = Literal["midpoint", "trapezoid"]


@dataclass(frozen=True)
class Attribution:
    """What each coordinate adds, and how well that adds up.

    Attributes:
        values: attributions of the inputs' shape, in units of F.
        difference: F(x) − F(x') [B].
        error: sum of the attributions less that difference [B]; 0 is complete.
    """

    values: Tensor
    difference: Tensor
    error: Tensor


def integrated_gradients(
    function: Callable[[Tensor], Tensor],
    inputs: Tensor,
    baseline: Tensor | float = 0.0,
    *,
    steps: int = 32,
    rule: Rule = "midpoint",
    chunk: int = 256,
) -> Attribution:
    """Attribute a function's values to the coordinates of its inputs.

    Args:
        function: maps inputs [n, …] to one number a sample [n], each from its own input alone; a
            model in it must be in eval mode.
        inputs: x [B, …] of real numbers.
        baseline: x', a number or anything that broadcasts to the inputs. A coordinate equal to its
            baseline gets exactly 0.
        steps: points of the path for `midpoint`; intervals (one point more) for `trapezoid`.
        rule: `midpoint` leaves both ends out, where normalisation may have no sound gradient;
            `trapezoid` takes them with half weight.
        chunk: points that are differentiated at a time, at least one.

    Returns:
        The attributions with their completeness error.

    Raises:
        SettingError: no step, an unknown rule, or inputs that are not real numbers.
        ExpungeError: the function gives other than one number a sample, or not a finite gradient.
    """
    if steps < 1 or rule not in ("midpoint", "trapezoid"):
        raise SettingError("integrated gradients take steps from 1, by midpoint or trapezoid")
    if not inputs.is_floating_point():
        raise SettingError(
            f"integrated gradients take inputs of real numbers, not {inputs.dtype}; "
            "give embeddings in place of token or class numbers"
        )
    x = inputs.detach()
    start = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).expand_as(x)
    points, weights = _path(steps, rule)
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    at_once = max(1, chunk // max(1, len(x)))
    for places, shares in zip(points.split(at_once), weights.split(at_once), strict=True):
        shape = (-1, *[1] * x.ndim)
        alpha = places.to(x).view(shape)
        path = (start + alpha * (x - start)).flatten(0, 1).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(_values(function, path).sum(), path)
        gradient = gradient.view(len(places), *x.shape).to(total.dtype)
        total += (gradient * shares.to(total).view(shape)).sum(0)
    if not bool(torch.isfinite(total).all()):
        raise ExpungeError(
            "a gradient on the path is NaN or infinite; choose a baseline nearer to real inputs"
        )
    values = total * (x - start)
    with torch.no_grad():
        difference = (_values(function, x) - _values(function, start)).to(values.dtype)
    return Attribution(values, difference, values.flatten(1).sum(1) - difference)


def _path(steps: int, rule: Rule) -> tuple[Tensor, Tensor]:
    """Places on the path from 0 to 1 and their weights, which add up to 1."""
    if rule == "midpoint":
        places = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
        return places, torch.full_like(places, 1 / steps)
    places = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    weights = torch.full_like(places, 1 / steps)
    weights[[0, -1]] /= 2
    return places, weights


def _values(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found = function(x)
    if found.shape != (len(x),):
        raise ExpungeError(
            f"integrated gradients take one number a sample; the function gave {tuple(found.shape)}"
        )
    return found

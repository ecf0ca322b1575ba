"""Search of one number by differences, for what has no gradient."""

from __future__ import annotations

from collections.abc import Callable


def descend(
    distance: Callable[[float], float],
    *,
    start: float,
    probe: float,
    rate: float,
    least: float,
    steps: int,
) -> list[float]:
    r"""Walk downhill: \(\sigma \leftarrow \max(\sigma - \eta\, \hat g, \sigma_{min})\).

    \(\hat g = \big(d(\sigma + \varepsilon) - d(\sigma - \varepsilon)\big) / 2\varepsilon\); where
    \(\sigma - \varepsilon\) is not positive, 1e-8 stands for it.

    Args:
        distance: d.
        start: first σ.
        probe: ε.
        rate: η.
        least: σ_min.
        steps: number of them.

    Returns:
        All σ, the start first.
    """
    found = [max(start, least)]
    for _ in range(steps):
        now = found[-1]
        slope = (distance(now + probe) - distance(max(now - probe, 1e-8))) / (2 * probe)
        found.append(max(now - rate * slope, least))
    return found

"""The curve of a correction over the share of the manipulated samples that is known, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.report.svg import Box, Plot

STYLES = ("forget", "retain", "nonmember", "dashed")


def identified_picture(rows: Sequence[Mapping[str, Any]], what: str = "affected") -> str:
    """The curve as SVG: a line a method, means over seeds."""
    shares = sorted({r["share"] for r in rows})
    plot = Plot(
        f"Accuracy, {what}, by the share that is known", "means over seeds",
        (min(0.0, shares[0]), 1.0), (0.0, 1.0), "share of the manipulated samples that is known",
        "accuracy", width=420,
    )  # fmt: skip
    taken: list[Box] = []
    for number, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
        points = []
        for share in shares:
            there = [r for r in rows if (r["method"], r["share"]) == (method, share)]
            values = [r[what] for r in there if r[what] is not None]
            if values:
                points.append((share, sum(values) / len(values)))
        if not points:
            continue
        plot.line(points, STYLES[number % len(STYLES)])
        plot.label(*points[-1], method, taken)
    return plot.svg()

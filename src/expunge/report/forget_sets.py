"""Figures of a method by forget set: table, picture and sentences that name both tails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.report.svg import Box, Plot

STYLES = ("forget", "retain", "nonmember", "dashed")
ORDER = ("low-el2n", "worst-case", "random", "easiest", "high-el2n")
"""From the redundant end to the memorised one."""

Rows = Sequence[Mapping[str, Any]]


def set_picture(summary: Rows, figure: str = "UA") -> str:
    """Means over draws and seeds as SVG: a line a method, sets from the redundant end to the memorised one.

    Args:
        summary: of `BySet.summary`.
        figure: UA, MIA, RA or TA.
    """
    names = [n for n in ORDER if any(r["set"] == n for r in summary)]
    plot = Plot(
        f"{figure} by forget set", "from redundant samples to memorised ones; means over draws and seeds",
        (-0.4, len(names) - 0.6), (0.0, 1.0), "redundant ← forget set → memorised", figure, width=420,
        x_ticks=[(float(at), name) for at, name in enumerate(names)],
    )  # fmt: skip
    taken: list[Box] = []
    for number, method in enumerate(dict.fromkeys(r["method"] for r in summary)):
        points = []
        for at, name in enumerate(names):
            there = [r for r in summary if (r["set"], r["method"]) == (name, method)]
            if there and there[0][figure]["value"] is not None:
                points.append((float(at), there[0][figure]["value"]))
        if not points:
            continue
        style = STYLES[number % len(STYLES)]
        plot.line(points, style)
        for x, y in points:
            plot.dot(x, y, style, f"{method}, {names[int(x)]}: {y:.3f}")
        plot.label(*points[-1], method, taken)
    return plot.svg()


def set_table(summary: Rows) -> str:
    """Markdown: figures in percent, each with its gap to retraining and the gap's 95 % interval."""
    lines = [
        "| set | tail | method | UA | MIA | RA | TA | distance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        cells = [_cell(row[f]) for f in ("UA", "MIA", "RA", "TA")]
        words = [
            row["set"],
            row["tail"],
            row["method"] + (" (no effect)" if row["unchanged"] else ""),
        ]
        distance = "–" if row["distance"] is None else f"{100 * row['distance']:.1f}"
        lines.append(f"| {' | '.join([*words, *cells, distance])} |")
    return "\n".join(lines)


def set_sentences(summary: Rows) -> list[str]:
    """What to take home: each method's distance on all sets, and the order of methods on each."""
    methods = [m for m in dict.fromkeys(r["method"] for r in summary) if m not in ("original", "retrain")]  # fmt: skip
    names = [n for n in ORDER if any(r["set"] == n for r in summary)]
    tail = {r["set"]: r["tail"] for r in summary}
    far = {(r["set"], r["method"]): r["distance"] for r in summary if r["distance"] is not None}
    said = []
    for method in methods:
        known = [n for n in names if (n, method) in far]
        if not known:
            continue
        parts = [f"{100 * far[n, method]:.1f} on {n} ({tail[n]})" for n in known]
        widest = max(known, key=lambda n: far[n, method])
        said.append(
            f"{method}: mean distance to retraining in points: {', '.join(parts)}; largest on {widest}."
        )
    for name in names:
        order = sorted((m for m in methods if (name, m) in far), key=lambda m: far[name, m])
        if len(order) > 1:
            said.append(f"Closest to retraining first, on {name}: {', '.join(order)}.")
    tails = {tail[n] for n in names}
    for end, what in (("redundant", "what a retrained model still knows"), ("memorised", "what only the forgotten samples taught, where privacy is at risk")):  # fmt: skip
        if end not in tails:
            said.append(f"The {end} tail was not looked at: {what}.")
    return said


def _cell(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "–"
    shown = f"{100 * figure['value']:.1f}"
    if figure["gap"] is None:
        return shown
    low, high = (100 * figure[k] for k in ("low", "high"))
    return f"{shown}; {100 * figure['gap']:+.1f} [{low:+.1f}, {high:+.1f}]"

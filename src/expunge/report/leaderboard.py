r"""Leaderboard: every method's distance to retraining, a pure function of comparisons.

For one run, \(d = \frac1{|A|} \sum_{a \in A} |v_a - r_a|\): the mean absolute gap between what was
measured and the same on retrained models, over the accuracies on forget and retain data and the
membership AUC that speaks for the run. 0 is retraining itself; lower is better. A method's figure is
the mean over its seeds with a 95 % t interval. Adding a method changes nobody else's row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report.svg import Plot
from expunge.report.table import t95
from expunge.report.verdict import MARKS, WORDS, State, decisive, finite, method_verdict
from expunge.report.words import SHOWN, by_method

SPLITS = ("forget-train", "retain-train", "forget-test", "retain-test")

STYLE = (
    "text{font:12px sans-serif;fill:#666}.grid{stroke:#8883}.axis{stroke:#888}"
    ".cut{stroke:#888;stroke-dasharray:4 3}.line{fill:none;stroke:var(--c);stroke-width:2}"
    ".dot{fill:var(--c)}.state-matches{--c:#2c9c5e}.state-short{--c:#d1495b}"
    ".state-overshoot{--c:#9b5de5}.state-lost,.state-worse{--c:#c98a1b}.state-unjudged{--c:#888}"
)
"""The picture stands alone in a page of text: greys that read on white and on black."""


@dataclass(frozen=True)
class Entry:
    """One method on one workload.

    Attributes:
        workload: the comparison's workload.
        method: its name; `original` stands for doing nothing.
        seeds: runs behind the figures.
        distance: mean of d over the seeds; lower is better.
        low: lower end of its 95 % interval (the mean itself with one seed).
        high: upper end.
        cost_ratio: seconds over those of retraining, mean over seeds; None for the original.
        state: the gravest verdict over the seeds.
        reason: the sentence behind it.
        better_than_nothing: whether the interval lies below the original's distance.
    """

    workload: str
    method: str
    seeds: int
    distance: float
    low: float
    high: float
    cost_ratio: float | None
    state: State
    reason: str
    better_than_nothing: bool


def distance(row: Mapping[str, Any]) -> float | None:
    """Distance d of one run to retrained models; None if nothing has a reference."""
    names = [f"accuracy/{s}" for s in SPLITS]
    names += [n for n in decisive(row) if n.startswith("membership/")]
    gaps = [finite(row["findings"].get(n, {}).get("gap")) for n in names]
    known = [abs(g) for g in gaps if g is not None]
    return statistics.fmean(known) if known else None


def entries(comparison: Mapping[str, Any]) -> list[Entry]:
    """Rank the methods of one comparison, nearest to retraining first.

    Args:
        comparison: one of a report's comparisons.

    Returns:
        One entry a method that has references to be compared with, the original among them; the
        retrained model is the aim and has no entry.
    """
    found = by_method(comparison)
    nothing = next((d for r in found.get("original", []) if (d := distance(r)) is not None), None)
    made = []
    for method, rows in found.items():
        away = [d for r in rows if (d := distance(r)) is not None]
        if not away or method == "retrain":
            continue
        mean, half = statistics.fmean(away), 0.0
        if len(away) > 1:
            half = t95(len(away)) * statistics.stdev(away) / math.sqrt(len(away))
        ratios = [c for r in rows if (c := finite(r.get("cost_ratio"))) is not None]
        verdict = method_verdict(rows)
        made.append(
            Entry(
                workload=str(comparison["workload"]),
                method=method,
                seeds=len(away),
                distance=mean,
                low=max(0.0, mean - half),
                high=mean + half,
                cost_ratio=statistics.fmean(ratios) if ratios and method not in SHOWN else None,
                state=verdict.state,
                reason=verdict.sentence,
                better_than_nothing=nothing is not None and mean + half < nothing,
            )
        )
    return sorted(made, key=lambda e: e.distance)


def markdown(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Tables of all comparisons, with doing nothing as a row of its own."""
    lines: list[str] = []
    for comparison in comparisons:
        references = len(comparison.get("references") or [])
        lines += [
            f"## {comparison['title']}",
            "",
            f"{references} retrained references. Distance 0 is retraining itself; lower is better.",
            "",
            "| | method | distance to retraining | 95 % interval | seeds | cost / retraining | verdict |",
            "|---:|---|---:|---|---:|---:|---|",
        ]
        place = 0
        for e in entries(comparison):
            idle = e.method == "original"
            place += not idle
            verdict = "before" if idle else f"{MARKS[e.state]} {WORDS[e.state]}"
            if not idle and not e.better_than_nothing:
                verdict += "; no better than doing nothing"
            name = "*do nothing*" if idle else f"[`{e.method}`](methods/{e.method}.md)"
            ratio = "–" if e.cost_ratio is None else f"{e.cost_ratio:.2g}"
            lines.append(
                f"| {'' if idle else place} | {name} | {e.distance:.3f} | {e.low:.3f} … {e.high:.3f} "
                f"| {e.seeds} | {ratio} | {verdict} |"
            )
        lines.append("")
    return "\n".join(lines)


def picture(comparison: Mapping[str, Any]) -> str:
    """One comparison as SVG: a dot and its interval a method, a dashed line for doing nothing."""
    ranked = entries(comparison)
    shown = [e for e in ranked if e.method != "original"]
    nothing = next((e.distance for e in ranked if e.method == "original"), 0.0)
    farthest = max([nothing, *(e.high for e in shown)], default=0.1)
    plot = Plot(
        f"Distance to retraining on {comparison['workload']}",
        "; ".join(f"{e.method}: {e.distance:.3f}" for e in shown),
        (0.0, farthest * 1.05), (-0.5, len(shown) - 0.5), "distance to retraining", "",
        width=560, height=60 + 20 * len(shown),
        y_ticks=[(i, e.method) for i, e in enumerate(reversed(shown))],
    )  # fmt: skip
    plot.vertical(nothing)
    for i, e in enumerate(reversed(shown)):
        plot.line([(e.low, i), (min(e.high, farthest * 1.05), i)], f"state-{e.state}")
        plot.dot(e.distance, i, f"state-{e.state}", f"{e.method}: {e.distance:.3f}, {WORDS[e.state]}")  # fmt: skip
    return plot.svg().replace("<title>", f"<style>{STYLE}</style><title>", 1)

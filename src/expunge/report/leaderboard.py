r"""Leaderboard: every method's distance to retraining, a pure function of comparisons.

For one run, \(d = \frac1{|A|} \sum_{a \in A} |v_a - r_a|\): the mean absolute gap between what was
measured and the same on retrained models, over the accuracies on forget and retain data and the
membership AUC that speaks for the run. Lower is better; the retrained model held against the others
shows how low it can be. A method's figure is the mean over its seeds with a 95 % t interval: of one
original model, one forget set and the same references. Adding a method changes nobody else's row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from expunge.report.svg import Plot
from expunge.report.table import t95
from expunge.report.verdict import MARKS, WORDS, State, decisive, finite, method_verdict
from expunge.report.words import SHOWN, by_method

Beats = Literal["yes", "unclear", "no"]

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
        method: its name; `original` stands for doing nothing, `retrain` for a further retrained model.
        seeds: runs behind the figures.
        distance: mean of d over the seeds; lower is better.
        low: lower end of its 95 % interval (the mean itself with one seed).
        high: upper end.
        cost_ratio: seconds over those of retraining, mean over seeds; None for the original.
        state: the gravest verdict over the seeds.
        reason: the sentence behind it.
        beats_nothing: `yes` if the interval lies below the original's distance, `no` if the mean
            does not, `unclear` between.
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
    beats_nothing: Beats

    @property
    def remarks(self) -> list[str]:
        """What the verdict leaves out, in words."""
        said = {
            "no": ["no better than doing nothing"],
            "unclear": ["not shown to be better than doing nothing"],
        }.get(self.beats_nothing, [])
        if self.cost_ratio is not None and self.cost_ratio > 1:
            said.append("dearer than retraining")
        return said

    @property
    def interval(self) -> str:
        """The 95 % interval, or that there is none."""
        if self.seeds < 2:
            return "one seed"
        if self.high - self.low < 5e-7:
            return "the same for every seed"
        return f"{self.low:.3f} … {self.high:.3f}"


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
        One entry a method that has references to be compared with, the original and a retrained
        model among them.
    """
    found = by_method(comparison)
    nothing = next((d for r in found.get("original", []) if (d := distance(r)) is not None), None)
    made = []
    for method, rows in found.items():
        away = [d for r in rows if (d := distance(r)) is not None]
        if not away:
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
                beats_nothing=_beats(mean, half, nothing),
            )
        )
    return sorted(made, key=lambda e: e.distance)


def _beats(mean: float, half: float, nothing: float | None) -> Beats:
    if nothing is None or mean >= nothing:
        return "no"
    return "yes" if mean + half < nothing else "unclear"


def markdown(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Tables of all comparisons, with doing nothing as a row of its own."""
    lines: list[str] = []
    for comparison in comparisons:
        references = len(comparison.get("references") or [])
        lines += [
            f"## {comparison['title']}",
            "",
            f"{references} retrained references; lower is better.",
            "",
            "| | method | distance to retraining | 95 % interval | seeds | cost / retraining | verdict |",
            "|---:|---|---:|---|---:|---:|---|",
        ]
        place = 0
        for e in entries(comparison):
            if e.method in NAMED:
                lines.append(f"| | *{NAMED[e.method]}* | {e.distance:.3f} | | | | |")
                continue
            place += 1
            ratio = "–" if e.cost_ratio is None else f"{e.cost_ratio:.2g}"
            lines.append(
                f"| {place} | [`{e.method}`](methods/{e.method}.md) | {e.distance:.3f} | {e.interval} "
                f"| {e.seeds} | {ratio} | {verdict(e)} |"
            )
        lines.append("")
    return "\n".join(lines)


NAMED = {"original": "do nothing", "retrain": "retrain once more"}
"""Rows to read the others by."""


def verdict(entry: Entry) -> str:
    """State and remarks of an entry, in words."""
    return "; ".join([f"{MARKS[entry.state]} {WORDS[entry.state]}", *entry.remarks])


def figures(ranked: Sequence[Entry], method: str) -> str:
    """The rows of one method over all workloads, as the section of its page.

    Args:
        ranked: entries of all workloads.
        method: whose.

    Returns:
        A table between two marks that `replace_figures` finds again; a sentence if there are none.
    """
    rows = []
    for e in (e for e in ranked if e.method == method):
        floor = {o.method: o.distance for o in ranked if o.workload == e.workload}
        ratio = "–" if e.cost_ratio is None else f"{e.cost_ratio:.2g}"
        beside = " … ".join(f"{floor[n]:.3f}" if n in floor else "–" for n in ("retrain", "original"))  # fmt: skip
        rows.append(
            f"| {e.workload} | {e.distance:.3f} | {e.interval} | {beside} | {ratio} | {verdict(e)} |"
        )
    table = [
        "Distance to retraining, from the [leaderboard](../leaderboard.md):",
        "",
        "| workload | distance | 95 % interval | retrain … do nothing | cost / retraining | verdict |",
        "|---|---:|---|---|---:|---|",
        *rows,
    ]
    if not rows:
        table = ["Not on the [leaderboard](../leaderboard.md), which says why."]
    return "\n".join([OPEN, *table, CLOSE])


OPEN, CLOSE = "<!-- leaderboard -->", "<!-- /leaderboard -->"


def replace_figures(page: str, block: str) -> str:
    """Put a block of `figures` into a page, in place of the former one.

    Raises:
        ValueError: the page has no such place.
    """
    before, opened, rest = page.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not opened or not closed:
        raise ValueError(f"the page has no {OPEN} … {CLOSE}")
    return before + block + after


def picture(comparison: Mapping[str, Any]) -> str:
    """One comparison as SVG: a dot and its interval a method, a dashed line for doing nothing."""
    ranked = entries(comparison)
    shown = [e for e in ranked if e.method not in NAMED]
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

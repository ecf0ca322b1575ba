"""Tables: the method table of a comparison, for a terminal, Markdown and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expunge.report.verdict import MARKS, WORDS, Judgement, judge, method_verdict, row_verdict

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS: dict[str, tuple[str, str]] = {
    "accuracy/forget-test": ("forget, test", "share right on test data of what is forgotten; good is the reference"),
    "accuracy/retain-test": ("rest, test", "share right on all other test data; good is the reference or above"),
    "accuracy/forget-train": ("forget, train", "share right on the forgotten samples; good is the reference"),
    "accuracy/retain-train": ("rest, train", "share right on the kept training samples; good is the reference"),
    "membership/auc-loss": ("membership AUC", "how well the loss tells forgotten from unseen samples, two-sided: ½ not at all, 1 perfectly; good is the reference"),
    "divergence/js-forget-train": ("JS divergence", "distance of predictions on forgotten samples to retrained models, in nats (at most 0.69); lower is closer"),
    "cka/reference": ("CKA to retrained", "similarity of hidden layers to retrained models, 0 … 1; higher is closer"),
}  # fmt: skip
"""Columns of the method table: finding → (heading, how to read it)."""


@dataclass(frozen=True)
class Cell:
    """One cell: value, reference, gap and interval as text, and the judgement."""

    value: str
    reference: str
    gap: str
    interval: str
    judgement: Judgement

    @property
    def mark(self) -> str:
        """A shape for the state, so that colour is never alone."""
        return MARKS[self.judgement.state]


@dataclass(frozen=True)
class MethodRow:
    """One method over its seeds."""

    method: str
    seeds: int
    cells: dict[str, Cell]
    ratio: str
    seconds: str
    state: str
    word: str
    sentence: str


def merged(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """One finding over several seeds: mean value, interval over seeds (2 standard errors).

    Returns:
        The finding, or None if no row has it. With one seed, its interval over samples stays.
    """
    found = [r["findings"][name] for r in rows if name in r["findings"]]
    values = [f["value"] for f in found if f["value"] is not None]
    if not found:
        return None
    if len(values) < 2:
        return dict(next((f for f in found if f["value"] is not None), found[0]))
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    half = max(
        2 * error,
        max(((f["high"] or 0) - (f["low"] or 0)) / 2 for f in found) / math.sqrt(len(values)),
    )
    reference = found[0]["reference"]
    gap = None if reference is None else mean - reference
    detail = dict(found[0].get("detail") or {})
    raw = [f["detail"]["auc"] for f in found if "auc" in (f.get("detail") or {})]
    if raw:
        detail["auc"] = sum(raw) / len(raw)
    return {
        **found[0],
        "value": mean,
        "low": mean - half,
        "high": mean + half,
        "gap": gap,
        "detail": detail,
    }


def method_rows(
    comparison: Mapping[str, Any], columns: Sequence[str] = tuple(COLUMNS)
) -> list[MethodRow]:
    """Rows of the method table, one a method, in the comparison's order."""
    result = []
    for method in dict.fromkeys(r["method"] for r in comparison["rows"]):
        rows = [r for r in comparison["rows"] if r["method"] == method]
        cells = {}
        for name in columns:
            finding = merged(rows, name)
            if finding is not None:
                cells[name] = cell(name, finding)
        state = method_verdict(rows).state
        ratios = [r["cost_ratio"] for r in rows if r.get("cost_ratio") is not None]
        seconds = [r["seconds"] for r in rows if r.get("seconds")]
        gravest = next(v for v in map(row_verdict, rows) if v.state == state)
        word = {"original": "before", "retrain": "reference"}.get(method, WORDS[state])
        result.append(
            MethodRow(
                method, len(rows), cells,
                f"{sum(ratios) / len(ratios):.3g}×" if ratios and method != "original" else "–",
                f"{sum(seconds) / len(seconds):.3g} s" if seconds else "–",
                state, word, gravest.sentence,
            )
        )  # fmt: skip
    return result


def cell(name: str, finding: Mapping[str, Any]) -> Cell:
    """Turn a finding into text."""
    low, high = finding.get("low"), finding.get("high")
    interval = "" if low is None or high is None else f"{number(low)} … {number(high)}"
    gap = finding.get("gap")
    return Cell(
        number(finding.get("value")),
        number(finding.get("reference")),
        "" if gap is None else f"{'+' if gap > 0 else '−' if gap < 0 else '±'}{number(abs(gap))}",
        interval,
        judge(name, finding),
    )


def number(value: float | None) -> str:
    """Three decimals below ten, else three digits; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def terminal_table(comparison: Mapping[str, Any]) -> Table:
    """The short table for a terminal."""
    from rich.table import Table

    shown = [n for n in list(COLUMNS)[:5] if n != "accuracy/retain-train"]
    table = Table(
        title=comparison["title"],
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("method")
    for name in shown:
        table.add_column(COLUMNS[name][0] + "\n(retrained)", justify="right")
    table.add_column("time /\nretraining", justify="right")
    table.add_column("verdict")
    colours = {"matches": "green", "short": "red", "overshoot": "magenta", "lost": "yellow"}
    for row in method_rows(comparison, shown):
        cells = []
        for name in shown:
            one = row.cells.get(name)
            cells.append("–" if one is None else f"{one.value} ({one.reference})")
        style = "" if row.method in ("original", "retrain") else colours.get(row.state, "")
        table.add_row(
            row.method, *cells, row.ratio, f"[{style}]{row.word}[/]" if style else row.word
        )
    return table

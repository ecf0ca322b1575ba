"""Tables: the method table of a comparison, for a terminal, Markdown and the page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expunge.report.explain import explain
from expunge.report.verdict import (
    MARKS,
    WORDS,
    Judgement,
    State,
    closer,
    finite,
    judge,
    method_verdict,
)
from expunge.report.words import SHOWN, by_method, times

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "accuracy/forget-test",
    "accuracy/retain-test",
    "accuracy/forget-train",
    "accuracy/retain-train",
    "membership/auc-loss",
    "memorised-fraction/limit",
    "divergence/js-forget-train",
    "regression-error/mae-forget-test",
    "regression-error/mae-retain-test",
    "regression-error/mae-forget-train",
    "regression-error/mae-retain-train",
    "residual-membership/auc",
    "wasserstein/predictions-forget-train",
    "relearn-time/ain",
    "cka/reference",
)
"""Findings with a column in the method table."""
TERMINAL = (
    "accuracy/forget-test",
    "accuracy/retain-test",
    "accuracy/forget-train",
    "membership/auc-loss",
)
"""Findings with a column in the terminal."""
TERMINAL_REGRESSION = (
    "regression-error/mae-forget-test",
    "regression-error/mae-retain-test",
    "residual-membership/auc",
    "wasserstein/predictions-forget-train",
)
"""The same for regressors, whose errors take the place of accuracies."""
_BEFORE = {"original": "before", "retrain": "reference"}
_ORDER: tuple[State, ...] = ("lost", "short", "overshoot", "worse", "matches", "unjudged")
_RANGES = {
    "accuracy/": (0.0, 1.0),
    "membership/auc": (0.5, 1.0),
    "residual-membership/auc": (0.5, 1.0),
    "residual-membership/svc": (0.0, 1.0),
    "lira/tpr": (0.0, 1.0),
    "rmia/tpr": (0.0, 1.0),
    "u-lira/tpr": (0.0, 1.0),
    "lira/": (0.5, 1.0),
    "rmia/": (0.5, 1.0),
    "u-lira/": (0.5, 1.0),
    "regression-error/": (0.0, math.inf),
    "wasserstein/": (0.0, math.inf),
    "relearn-time/": (0.0, math.inf),
    "membership/attack": (0.5, 1.0),
    "membership/efficacy": (0.0, 1.0),
    "cka/": (0.0, 1.0),
    "memorised-fraction/": (0.0, 1.0),
    "privacy-score/": (0.0, 1.0),
    "klom/": (0.0, math.inf),
    "nomus/mia": (0.5, 1.0),
    "nomus/": (0.0, 1.0),
    "divergence/": (0.0, math.inf),
    "prediction-matrix/": (0.0, 1.0),
    "weight-distance/": (0.0, math.inf),
    "cost/": (0.0, math.inf),
}


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

    @property
    def word(self) -> str:
        """The state in two words."""
        return WORDS[self.judgement.state]


@dataclass(frozen=True)
class MethodRow:
    """One method over its seeds."""

    method: str
    seeds: int
    cells: dict[str, Cell]
    ratio: str
    seconds: str
    state: State
    word: str
    sentence: str
    claims: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def shown(self) -> bool:
        """Whether it is one of the two rows that are no methods under comparison."""
        return self.method in SHOWN

    @property
    def mark(self) -> str:
        """A shape for the state; none for the model before and the reference."""
        return "" if self.shown else MARKS[self.state]


def merged(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    """One finding over several seeds.

    Args:
        rows: a method's rows, one a seed.
        name: the finding's name.

    Returns:
        The finding with the mean value and a 95 % interval of the mean over seeds (Student's t),
        clipped to the measure's range and never narrower than the mean interval over samples:
        seeds that agree do not make the test set larger. With one seed that has a value, its own
        finding. None if no row has it.
    """
    found = [f for r in rows if (f := r["findings"].get(name)) is not None]
    usable = [f for f in found if finite(f.get("value")) is not None]
    if not found:
        return None
    if len(usable) < 2:
        return dict((usable or found)[0])
    values = [float(f["value"]) for f in usable]
    mean = statistics.fmean(values)
    halves = [(f["high"] - f["low"]) / 2 for f in usable if finite(f.get("low")) is not None and finite(f.get("high")) is not None]  # fmt: skip
    half = max(t95(len(values)) * statistics.stdev(values) / math.sqrt(len(values)), statistics.fmean(halves) if halves else 0.0)  # fmt: skip
    low, high = next((r for p, r in _RANGES.items() if name.startswith(p)), (-math.inf, math.inf))
    references = [r for f in usable if (r := finite(f.get("reference"))) is not None]
    reference = statistics.fmean(references) if references else None
    return {
        **usable[0],
        "value": mean,
        "low": min(mean, max(low, mean - half)),
        "high": max(mean, min(high, mean + half)),
        "reference": reference,
        "gap": None if reference is None else mean - reference,
    }


def merged_judgement(rows: Sequence[Mapping[str, Any]], name: str) -> Judgement:
    """The gravest judgement of a finding over seeds: a mean must not hide a seed that failed."""
    judged = [judge(name, f) for r in rows if (f := r["findings"].get(name)) is not None]
    for state in _ORDER:
        own = [j for j in judged if j.state == state]
        if own:
            some = f"in {len(own)} of {len(judged)} seeds: " if len(own) < len(judged) else ""
            return Judgement(state, some + own[0].sentence)
    return Judgement("unjudged", "it was not measured")


def method_rows(comparison: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> list[MethodRow]:
    """Rows of the method table, one a method, in the comparison's order."""
    return [_row(method, rows, columns) for method, rows in by_method(comparison).items()]


def present(rows: Sequence[MethodRow], columns: Sequence[str] = COLUMNS) -> list[str]:
    """Columns in which some row has a value."""
    return [n for n in columns if any(n in r.cells and r.cells[n].value != "–" for r in rows)]


def _row(method: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> MethodRow:
    cells = {
        name: cell(name, finding, merged_judgement(rows, name), len(rows))
        for name in columns
        if (finding := merged(rows, name)) is not None
    }
    verdict = method_verdict(rows)
    ratios = [r for row in rows if (r := finite(row.get("cost_ratio"))) is not None]
    seconds = [s for row in rows if (s := finite(row.get("seconds")))]
    finer = len({n for row in rows for n in closer(row)}) if verdict.state == "matches" else 0
    notes = [f"{finer} finer finding{'s' if finer > 1 else ''} differ{'' if finer > 1 else 's'}"] if finer else []  # fmt: skip
    if " seeds: " in verdict.sentence:
        notes.insert(0, verdict.sentence.partition(":")[0])
    claims = [rows[0].get(k) for k in ("intent", "guarantee", "fidelity")]
    return MethodRow(
        method=method,
        seeds=len(rows),
        cells=cells,
        ratio=times(statistics.fmean(ratios)) if ratios and method != "original" else "–",
        seconds=number(statistics.fmean(seconds), "cost/seconds") if seconds else "–",
        state=verdict.state,
        word=_BEFORE.get(method, WORDS[verdict.state]),
        sentence=verdict.sentence,
        claims=" · ".join(str(c) for c in claims if c),
        notes=[] if method in SHOWN else notes,
    )


def cell(name: str, finding: Mapping[str, Any], judgement: Judgement, seeds: int = 1) -> Cell:
    """Turn a finding into text."""
    low, high = finite(finding.get("low")), finite(finding.get("high"))
    interval = ""
    if low is not None and high is not None:
        interval = f"{number(low, name)} … {number(high, name)}"
        interval += f" over {seeds} seeds" if seeds > 1 else ""
    gap = finite(finding.get("gap"))
    return Cell(
        number(finding.get("value"), name),
        number(finding.get("reference"), name),
        "" if gap is None else f"{'+' if gap > 0 else '−' if gap < 0 else '±'}{number(abs(gap), name)}",
        interval,
        judgement,
    )  # fmt: skip


def number(value: Any, name: str = "") -> str:
    """A number for people: three decimals, large ones in groups, bytes with a unit."""
    found = finite(value)
    if found is None:
        return "–"
    if name == "cost/peak-memory":
        for unit in ("B", "kB", "MB"):
            if abs(found) < 1000:
                return f"{found:.3g} {unit}"
            found /= 1000
        return f"{found:.3g} GB"
    unit = " s" if name == "cost/seconds" else ""
    if abs(found) >= 1000 or name in ("cost/samples", "cost/gradients"):
        return f"{found:,.0f}{unit}".replace(",", "\u202f")
    if name.startswith("cost/"):
        return f"{found:.3g}{unit}"
    return f"{found:.3f}" if abs(found) < 10 else f"{found:.3g}"


def t95(n: int) -> float:
    """97.5 % point of Student's t with n − 1 degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.975))


def terminal_columns(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    """Columns of the terminal's table: errors where they were measured, else accuracies."""
    names = {name for row in comparison["rows"] for name in row["findings"]}
    measured = any(name.startswith("regression-error/mae-") for name in names)
    return TERMINAL_REGRESSION if measured else TERMINAL


def terminal_table(comparison: Mapping[str, Any]) -> Table:
    """The short table for a terminal: a value and, in brackets, that of retrained models."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(str(comparison["title"])),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("method")
    shown = terminal_columns(comparison)
    for name in shown:
        table.add_column(explain(name).label + "\n(retrained)", justify="right")
    table.add_column("cost\nratio", justify="right")
    table.add_column("verdict")
    colours = {
        "matches": "green",
        "short": "red",
        "overshoot": "magenta",
        "lost": "yellow",
        "worse": "yellow",
    }
    for row in method_rows(comparison, shown):
        cells = []
        for name in shown:
            one = row.cells.get(name)
            cells.append("–" if one is None else f"{one.value} ({one.reference})")
        style = "" if row.shown else colours.get(row.state, "")
        word = f"{row.mark} {row.word}".strip()
        table.add_row(
            escape(row.method), *cells, row.ratio, f"[{style}]{word}[/]" if style else word
        )
    return table

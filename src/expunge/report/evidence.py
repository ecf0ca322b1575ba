"""Figures of what a model still holds: the memorised share, recovery, relearning, margins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expunge.report.figures import Comparison, Figure, Row, first_rows, found
from expunge.report.svg import Plot
from expunge.report.table import number
from expunge.report.verdict import finite

LINES = [
    ("forgetline", "this model"),
    ("dashline", "retrained models"),
    ("lineof retain", "the original"),
]
LONGEST = 22
"""Letters of a method's name in a figure."""
MOST = 60
"""Points of a curve that are drawn."""


def memorised(comparison: Comparison) -> Figure | None:
    """Limit and estimate of the memorised share with their intervals, a line a method."""
    rows = [r for r in first_rows(comparison) if found(r, "memorised-fraction/limit")]
    if not rows:
        return None
    places = dict(zip(range(len(rows), 0, -1), rows, strict=True))
    plot = Plot(
        "Share of the forget records that is still memorised",
        "; ".join(f"{r['method']}: at most {number(_value(r))}" for r in rows),
        (0.0, 1.0), (0.4, len(rows) + 0.6), "share of the records to forget", "", width=420,
        height=60 + 28 * len(rows), grid=False, y_ticks=[(y, _brief(r["method"])) for y, r in places.items()],
    )  # fmt: skip
    for y, row in places.items():
        limit = row["findings"]["memorised-fraction/limit"]
        plot.beam(0.0, _value(row), y + 0.12, 0.4, "forget")
        _whisker(plot, limit, y + 0.12)
        reference = finite(limit.get("reference"))
        if reference is not None:
            plot.upright(reference, y, 0.9)
        estimate = found(row, "memorised-fraction/estimate")
        if estimate is not None:
            _whisker(plot, estimate, y - 0.28)
            value = float(estimate["value"])
            plot.dot(value, y - 0.28, "retain", f"{row['method']}: {number(value)}")
    note = "At 95 %, no more than this share of the records to forget is still memorised: the bar ends at the limit, the dot below it is the estimate, thin lines are their intervals, the upright stroke is the limit of a retrained model, which memorised none of them. The fewer the records, the higher the limit of even the best method."
    legend = [("forget", "limit"), ("retain", "estimate")]
    if any(
        finite(r["findings"]["memorised-fraction/limit"].get("reference")) is not None for r in rows
    ):
        legend.append(("refline", "limit of retrained models"))
    return Figure("Still memorised", note, [("", plot.svg())], legend)


def _whisker(plot: Plot, finding: dict[str, Any], y: float) -> None:
    low, high = finite(finding.get("low")), finite(finding.get("high"))
    if low is not None and high is not None:
        plot.whisker(low, high, y)


def _brief(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def recovery(comparison: Comparison) -> Figure | None:
    """Accuracy on forgotten classes against the number of labelled samples."""
    note = "A few-shot classifier on the frozen features is given so many labelled samples of every class and asked about the forgotten ones. A good method lies on the retrained models; above them, the class is still in the features, whatever the output says."
    return _curves(
        comparison, "recovery/forget", "Recovery from a few samples", note,
        lambda detail: ("labelled samples a class", "accuracy", detail.get("shots") or []),
        ("values", "reference_values", "original_values"), log_x=True,
    )  # fmt: skip


def relearning(comparison: Comparison) -> Figure | None:
    """Error or accuracy on what was forgotten after each update of relearning."""
    note = "Every model learns from the same batches until it is as good on what was forgotten as the original was. A good method needs as many updates as retrained models; a curve that is up at once had not forgotten."

    def axes(detail: dict[str, Any]) -> tuple[str, str, list[float]]:
        longest = max(map(len, [detail.get("curve") or [], *(detail.get("reference_curves") or [])]))  # fmt: skip
        return (
            "updates",
            "accuracy" if detail.get("accuracy") else "error",
            [float(n) for n in range(longest)],
        )

    return _curves(
        comparison, "relearn-time/updates", "Relearning", note, axes,
        ("curve", "reference_curves", "original_curve"),
    )  # fmt: skip


def margins(comparison: Comparison) -> Figure | None:
    """Distribution over samples of KLoM, beside that of retrained models among each other."""
    panels = []
    for row in first_rows(comparison):
        for name in sorted(n for n in row["findings"] if n.startswith("klom/")):
            detail = (found(row, name) or {}).get("detail") or {}
            bars = detail.get("histogram") or {}
            edges, mine, floor = (bars.get(k) or [] for k in ("edges", "unlearned", "floor"))
            if len(edges) != len(mine) + 1 or len(mine) != len(floor) or not mine:
                continue
            split = name.partition("/")[2]
            plot = Plot(
                f"KLoM, {row['method']}, {split}",
                f"mean {number(row['findings'][name]['value'])}",
                (edges[0], edges[-1]), (0.0, max(*mine, *floor) or 1.0), "KLoM in nats",
                "share of samples", width=300,
            )  # fmt: skip
            plot.steps(edges, floor, "retain")
            plot.steps(edges, mine, "forget")
            value = number(row["findings"][name]["value"])
            panels.append((f"{row['method']}, {split}: {value}", plot.svg()))
    if not panels:
        return None
    note = "For each sample, how far the margins of unlearned models over several seeds are from those of retrained models. Even retrained models are not at 0 among each other: that is the floor. What lies to the right of the floor differs from retraining. The number is the mean."
    legend = [("forget", "unlearned models"), ("retain", "retrained models among each other (floor)")]  # fmt: skip
    return Figure("Margins over seeds (KLoM)", note, panels, legend)


def _curves(
    comparison: Comparison,
    name: str,
    title: str,
    note: str,
    axes: Callable[[dict[str, Any]], tuple[str, str, list[float]]],
    keys: tuple[str, str, str],
    *,
    log_x: bool = False,
) -> Figure | None:
    """A panel a method with its curve, those of the references and the original's."""
    panels = []
    for row in first_rows(comparison):
        finding = found(row, name)
        detail = (finding or {}).get("detail") or {}
        mine, theirs, before = (detail.get(k) or [] for k in keys)
        if finding is None or len(mine) < 1:
            continue
        x_label, y_label, at = axes(detail)
        every = [v for curve in (mine, *theirs, before) for v in curve if finite(v) is not None]
        if len(at) < 2 or not every:
            continue
        top = 1.0 if y_label == "accuracy" else max(every) or 1.0
        counted = (
            f"{finding['value']:g} updates" if x_label == "updates" else number(finding["value"])
        )
        said = f"{row['method']}: {counted}"
        # a dot at the first update must not lie on the axis' numbers
        first = at[0] if log_x else at[0] - 0.04 * (at[-1] - at[0])
        plot = Plot(
            f"{title}: {row['method']}", said, (first, at[-1]), (min(0.0, *every), top),
            x_label, y_label, width=300, log_x=log_x,
            x_ticks=[(v, f"{v:g}") for v in at] if log_x else None,
        )  # fmt: skip
        for curve, style in ((before, "retain"), *((c, "dashed") for c in theirs), (mine, "forget")):  # fmt: skip
            points = list(zip(at, curve, strict=False))
            step = max(1, len(points) // MOST)
            if len(points) == 1:
                plot.dot(*points[0], style, f"{number(points[0][1])} at once")
            elif points:
                plot.line([*points[::step], points[-1]], style)
        panels.append((said, plot.svg()))
    return Figure(title, note, panels, list(LINES)) if panels else None


def _value(row: Row) -> float:
    return float(row["findings"]["memorised-fraction/limit"]["value"])

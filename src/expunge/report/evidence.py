"""Figures of what a model still holds: the memorised share, recovery, relearning, margins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expunge.report.figures import Comparison, Figure, Row, first_rows, found
from expunge.report.svg import Plot
from expunge.report.table import number
from expunge.report.verdict import finite

LINES = [("forgetline", "this model"), ("dashline", "retrained models"), ("retain", "the original")]
MOST = 60
"""Points of a curve that are drawn."""


def memorised(comparison: Comparison) -> Figure | None:
    """Estimate and limit of the memorised share, a column a method."""
    rows = [r for r in first_rows(comparison) if found(r, "memorised-fraction/limit")]
    if not rows:
        return None
    wide = max(300, 70 * len(rows) + 60)
    plot = Plot(
        "Share of the forget records that is still memorised",
        "; ".join(f"{r['method']}: at most {number(_value(r))}" for r in rows),
        (0.4, len(rows) + 0.6), (0.0, 1.0), "", "share", width=wide,
        x_ticks=[(n, r["method"][:12]) for n, r in enumerate(rows, 1)],
    )  # fmt: skip
    for n, row in enumerate(rows, 1):
        finding = row["findings"]["memorised-fraction/limit"]
        plot.bar(n, _value(row), 0.5, "forget")
        reference = finite(finding.get("reference"))
        if reference is not None:
            plot.tick_mark(n, reference, 0.7)
        estimate = finite((found(row, "memorised-fraction/estimate") or {}).get("value"))
        if estimate is not None:
            plot.dot(n, estimate, "retain", f"{row['method']}: {number(estimate)}")
    note = "At 95 %, no more than this share of the records to forget is still memorised: the bar ends at the limit, the dot is the estimate, the dash the limit of a retrained model, which memorised none of them. The fewer the records, the higher the limit of even the best method."
    legend = [
        ("forget", "limit"),
        ("retain", "estimate"),
        ("dashline", "limit of retrained models"),
    ]
    return Figure("Still memorised", note, [("", plot.svg())], legend)


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
            panels.append((f"{row['method']}, {split}", plot.svg()))
    if not panels:
        return None
    note = "For each sample, how far the margins of unlearned models over several seeds are from those of retrained models. Even retrained models are not at 0 among each other: that is the floor. What lies to the right of the floor differs from retraining."
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
        said = f"{row['method']}: {number(finding['value'])}"
        plot = Plot(
            f"{title}: {row['method']}", said, (at[0], at[-1]), (min(0.0, *every), top),
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

"""ROC curves of the attacks with shadow models, on logarithmic axes: what is found at few false alarms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from expunge.report.figures import Comparison, Figure, Row, first_rows, found
from expunge.report.svg import Plot, short
from expunge.report.table import number
from expunge.report.verdict import finite

ATTACKS = (
    "lira/auc-online",
    "lira/auc-offline",
    "u-lira/auc",
    "rmia/auc-online",
    "rmia/auc-offline",
)
"""Findings with a curve, in the order in which one speaks for a run."""


def roc_curves(comparison: Comparison) -> Figure | None:
    """True against false alarms, one panel a method and audit; retrained models dashed."""
    panels, styles = [], set()
    for row in first_rows(comparison):
        seen: set[str] = set()
        for name in ATTACKS:
            audit = name.partition("/")[0]
            curve = _curve(row, name)
            if curve and audit not in seen:  # the first variant of an audit is enough
                seen.add(audit)
                svg, used = _panel(f"{row['method']}, {audit}", row, name, curve)
                styles |= used
                panels.append((f"{row['method']}, {audit}: {number(row['findings'][name]['value'])}", svg))  # fmt: skip
    if not panels:
        return None
    legend = [("forgetline", "this model or method")]
    legend += [("dashline", "retrained models")] if "dashed" in styles else []
    legend += [("lineof retain", "the original")] if "retain" in styles else []
    legend += [("lineof nonmember", "guessing")]
    note = "Share of the forgotten samples that an attack with shadow models calls while it calls so few of the samples never seen; both axes are logarithmic. A good method lies where retrained models lie, next to guessing. Far above on the left, a few samples are known for sure, which an average hides. The number is the two-sided AUC."
    return Figure("Attacks at few false alarms (ROC)", note, panels, legend)


def _panel(title: str, row: Row, name: str, curve: Mapping[str, Any]) -> tuple[str, set[str]]:
    rates, own = curve["fpr"], curve["tpr"]
    least = min(0.1, rates[0])
    floor = math.log10(least)
    marks = [10.0**k for k in range(math.ceil(floor - 1e-9), 1)]
    side = "more" if curve.get("side") == "member" else "less"
    plot = Plot(
        f"ROC: {title}",
        f"Samples that look {side} like training data are called. "
        + "; ".join(f"{t:.2f} at {f:.2g}" for f, t in _few(rates, own)),
        (least, 1.0), (floor, 0.0), "false alarms (share)", "true alarms (share)", width=300, height=240, log_x=True,
        x_ticks=[(m, short(m)) for m in marks], y_ticks=[(math.log10(m), short(m)) for m in marks],
    )  # fmt: skip
    used = set()

    def draw(values: list[float], style: str) -> None:
        used.add(style)
        # nothing found is at the lower edge, which has no logarithm
        plot.line([(f, math.log10(max(t, least))) for f, t in zip(rates, values, strict=False)], style)  # fmt: skip

    plot.line([(least, floor), (1.0, 0.0)], "nonmember")
    if curve.get("original_tpr"):
        draw(curve["original_tpr"], "retain")
    if curve.get("reference_tpr"):
        draw(curve["reference_tpr"], "dashed")
    draw(own, "forget")
    return plot.svg(), used


def _few(rates: list[float], values: list[float]) -> list[tuple[float, float]]:
    """The points nearest to 1 %, 10 % and half of the false alarms."""
    nearest = [min(range(len(rates)), key=lambda i: abs(rates[i] - at)) for at in (0.01, 0.1, 0.5)]
    return [(rates[i], values[i]) for i in dict.fromkeys(nearest)]


def _curve(row: Row, name: str) -> dict[str, Any]:
    curve = ((found(row, name) or {}).get("detail") or {}).get("roc") or {}
    rates, values = curve.get("fpr") or [], curve.get("tpr") or []
    numbers = all(finite(v) is not None for v in (*rates, *values))
    return curve if len(rates) == len(values) > 1 and numbers and rates[0] > 0 else {}

"""The report's figures: pure functions from a comparison to SVG; missing findings give no figure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report.explain import explain
from expunge.report.svg import Box, Plot
from expunge.report.table import number
from expunge.report.verdict import (
    DECISIVE,
    ERRORS,
    MARKS,
    SCORES,
    WORDS,
    finite,
    method_verdict,
)
from expunge.report.words import SHOWN, by_method, times

Comparison = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A titled figure: how to read it, panels of (caption, SVG), a legend of (style, words)."""

    title: str
    note: str
    panels: list[tuple[str, str]]
    legend: list[tuple[str, str]]
    foot: str = ""


def all_figures(comparison: Comparison) -> list[Figure]:
    """Every figure that the comparison has findings for."""
    from expunge.report import evidence  # which make figures too
    from expunge.report.roc import roc_curves

    makers: tuple[Callable[[Comparison], Figure | None], ...] = (
        quality_cost, per_class, evidence.memorised, membership, roc_curves, evidence.margins,
        evidence.recovery, evidence.relearning, cka, curves, matrices,
    )  # fmt: skip
    return [figure for maker in makers if (figure := maker(comparison)) is not None]


def first_rows(comparison: Comparison) -> list[Row]:
    """The first seed of every method, in order."""
    return [rows[0] for rows in by_method(comparison).values()]


def found(row: Row, name: str) -> dict[str, Any] | None:
    """A finding with a value, or None."""
    finding = row["findings"].get(name)
    return finding if finding and finite(finding.get("value")) is not None else None


def distance(row: Row) -> float | None:
    """Mean absolute gap of the accuracies, or mean errors, to the retrained models'."""
    gaps = [
        abs(gap)
        for n, f in row["findings"].items()
        if n.startswith(DECISIVE) and (gap := finite(f.get("gap"))) is not None
    ]
    return statistics.fmean(gaps) if gaps else None


def quality_cost(comparison: Comparison) -> Figure | None:
    """Distance to retraining against cost; a number beside each method's first dot is its name."""
    points: list[tuple[Row, float, float]] = []
    for row in comparison["rows"]:
        away, ratio = distance(row), finite(row.get("cost_ratio"))
        if row["method"] != "original" and away is not None and ratio:
            points.append((row, ratio, away))
    if not any(r["method"] not in SHOWN for r, _, _ in points):
        return None
    ratios = [p[1] for p in points]
    errors = any(n.startswith(ERRORS) for r, _, _ in points for n in r["findings"])
    plot = Plot(
        "Distance to retraining against cost",
        "; ".join(f"{r['method']}: {times(x)} the time, gap {y:.3f}" for r, x, y in points),
        (min(ratios) / 2, max(1.0, *ratios) * 2), (0.0, max(0.05, max(p[2] for p in points) * 1.2)),
        "time / time of retraining", f"mean {'error' if errors else 'accuracy'} gap", width=420, height=290, log_x=True,
    )  # fmt: skip
    order = list(dict.fromkeys(r["method"] for r, _, _ in points))
    taken: list[Box] = [(plot.px(x) - 6, plot.py(y) - 6, plot.px(x) + 6, plot.py(y) + 6) for _, x, y in points]  # fmt: skip
    for row, x, y in points:
        state = "ref" if row["method"] == "retrain" else method_verdict([row]).state
        plot.dot(x, y, f"state-{state}", f"{row['method']}: {times(x)}, gap {y:.3f}")
    numbers = {method: str(n) for n, method in enumerate(order, 1)}
    for names, x, y in _clusters(plot, points):
        shown = [numbers[m] for m in names]
        words = ", ".join(shown) if len(shown) <= 3 else f"{shown[0]} and {len(shown) - 1} more"
        plot.label(x, y, words, taken)
    legend = []
    for method, n in numbers.items():
        state = method_verdict([r for r, _, _ in points if r["method"] == method]).state
        if method == "retrain":
            legend.append(("state-ref", f"{n} {method}: the reference"))
        else:
            legend.append((f"state-{state}", f"{n} {method}: {MARKS[state]} {WORDS[state]}"))
    note = "Left is cheaper; down is closer to a model retrained without the data, counting too much forgetting as distance. A dot is one run; numbers beside one dot share it."
    return Figure("Quality and cost", note, [("", plot.svg())], legend)


def _clusters(
    plot: Plot, points: Sequence[tuple[Row, float, float]]
) -> list[tuple[list[str], float, float]]:
    """Methods whose first dots cover one another, with the place of the first."""
    found: list[tuple[list[str], float, float]] = []
    seen: set[str] = set()
    for row, x, y in points:
        if row["method"] in seen:
            continue
        seen.add(row["method"])
        near = (
            names
            for names, a, b in found
            if abs(plot.px(a) - plot.px(x)) < 7 and abs(plot.py(b) - plot.py(y)) < 7
        )
        names = next(near, None)
        if names is None:
            found.append(([row["method"]], x, y))
        else:
            names.append(row["method"])
    return found


def per_class(comparison: Comparison) -> Figure | None:
    """Accuracy per true class on test data, one panel a method, the retrained models' as a tick."""
    rows = first_rows(comparison)
    reference = _class_shares(next((r for r in rows if r["method"] == "retrain"), None))
    label = (comparison.get("request") or {}).get("label") or []
    forgotten = {str(c) for c in (label if isinstance(label, (list, tuple)) else [label])}
    panels = []
    for row in rows:
        shares = _class_shares(row)
        if not shares:
            continue
        names = list(shares)
        plot = Plot(
            f"Accuracy per class: {row['method']}",
            ", ".join(f"class {c}: {v:.2f}" for c, v in shares.items()),
            (-0.7, len(names) - 0.3), (0.0, 1.0), "class", "accuracy", height=160, width=300,
            x_ticks=list(enumerate(names)), y_ticks=[(0.0, "0"), (0.5, "0.5"), (1.0, "1")],
        )  # fmt: skip
        for i, c in enumerate(names):
            plot.bar(i, shares[c], 0.7, "forget" if c in forgotten else "retain")
            if c in reference:
                plot.tick_mark(i, reference[c], 0.9)
        panels.append((row["method"], plot.svg()))
    if not panels:
        return None
    legend = [("forget", "class to forget"), ("retain", "other class"), ("refline", "retrained")]
    shown = {c for row in rows for c in _class_shares(row)}
    legend = legend if forgotten & shown else legend[1:]
    note = "Test data. A bar should end at the retrained model's line, for the class to forget too: below it more was forgotten than retraining forgets."
    if not reference:
        legend, note = legend[:-1], "Test data. No retrained model to compare with."
    return Figure("Accuracy per class", note, panels, legend)


def _class_shares(row: Row | None) -> dict[str, float]:
    counts: dict[str, tuple[int, int]] = {}
    for split in ("forget-test", "retain-test") if row else ():
        detail = (found(row, f"accuracy/{split}") or {}).get("detail") or {}  # type: ignore[arg-type]
        for c, (right, total) in (detail.get("per_class") or {}).items():
            old = counts.get(str(c), (0, 0))
            counts[str(c)] = (old[0] + right, old[1] + total)
    by_number = sorted(counts.items(), key=lambda i: (not i[0].isdigit(), int(i[0]) if i[0].isdigit() else 0, i[0]))  # fmt: skip
    return {c: right / total for c, (right, total) in by_number if total}


def membership(comparison: Comparison) -> Figure | None:
    """Score histograms of forget, retain and unseen samples with the attack's threshold."""
    panels = []
    groups = ("retain", "nonmember", "forget")
    for row in first_rows(comparison):
        names = (*(f"membership/auc-{s}" for s in SCORES), "residual-membership/auc")
        name = next((n for n in names if _histogram(row, n)), None)
        if name is None:
            continue
        score = name.partition("/auc-")[2]
        finding = row["findings"][name]
        h, cut = _histogram(row, name), finite(finding["detail"].get("threshold"))
        shown = [g for g in groups if h.get(g)]
        top = max(max(h[g]) for g in shown) * 1.05
        reference = finite(finding.get("reference"))
        beside = "" if reference is None else f", retrained {reference:.3f}"
        at = "" if cut is None else f"; threshold {cut:.3g}"
        plot = Plot(
            f"Membership scores: {row['method']}",
            f"Two-sided AUC {finding['value']:.3f}{beside}{at}",
            (h["edges"][0], h["edges"][-1]), (0.0, top or 1.0), _SCORE_AXIS[score],
            "share of samples", height=180, width=300,
        )  # fmt: skip
        for group in shown:
            plot.steps(h["edges"], h[group], group)
        if cut is not None:
            plot.vertical(cut)
        side = f", ref. {reference:.2f}" if reference is not None else ""
        panels.append((f"{row['method']}: {finding['value']:.2f}{side}", plot.svg()))
    if not panels:
        return None
    legend = [("forget", "to forget"), ("retain", "kept (members)"), ("nonmember", "never seen"), ("cutline", "attack threshold")]  # fmt: skip
    note = "Right looks more like training data. Forgotten samples should lie where they lie in a retrained model; usually that is with the samples never seen, neither to the right of them nor to the left. The numbers are two-sided AUCs: the method's and, as reference, the retrained models'."
    return Figure("Membership scores", note, panels, legend)


_SCORE_AXIS = {
    "": "minus the size of the residual",
    "loss": "log-probability of the true class",
    "confidence": "probability of the true class",
    "entropy": "negative entropy",
    "modified-entropy": "negative modified entropy",
    "correctness": "right (1) or wrong (0)",
}


def _histogram(row: Row, name: str) -> dict[str, Any]:
    finding = found(row, name)
    h = ((finding or {}).get("detail") or {}).get("histogram") or {}
    ok = len(h.get("edges") or []) > 1 and any(h.get(g) for g in ("forget", "retain", "nonmember"))
    return h if ok else {}


def cka(comparison: Comparison) -> Figure | None:
    """Similarity to the original, layer by layer, on forget data; the retrained models dashed."""
    panels: list[tuple[str, str]] = []
    names: list[str] = []
    compared = False
    for row in first_rows(comparison):
        detail = (found(row, "cka/original") or {}).get("detail") or {}
        values, layers = detail.get("values"), detail.get("layers")
        if row["method"] in SHOWN or not values or not layers:
            continue
        reference = detail.get("reference_values")
        beside = ["" if not reference else f" (retrained {r:.2f})" for r in reference or values]
        last = max(2, len(layers))
        plot = Plot(
            f"CKA to the original: {row['method']}",
            ", ".join(f"{n}: {v:.2f}{b}" for n, v, b in zip(layers, values, beside, strict=False)),
            (1, last), (0.0, 1.0), "layer, input to output", "CKA", height=170, width=300,
            x_ticks=[(i, str(i)) for i in range(1, len(layers) + 1)],
            y_ticks=[(0.0, "0"), (0.5, "0.5"), (1.0, "1")],
        )  # fmt: skip
        if reference:
            plot.line(list(enumerate(reference, 1)), "dashed")
            compared = True
        plot.line(list(enumerate(values, 1)), "forget")
        panels.append((row["method"], plot.svg()))
        names = list(layers) if not names or names == list(layers) else ["…"]
    if not panels:
        return None
    legend = [("forgetline", "this method")] + [("dashline", "retrained models")] * compared
    note = "Similarity of hidden layers to the original on forgotten samples. A line far above the dashed one still represents them as before."
    foot = "" if names == ["…"] else f"Layers in this order: {', '.join(names)}."  # fmt: skip
    return Figure("Layers (CKA)", note, panels, legend, foot)


def curves(comparison: Comparison) -> Figure | None:
    """Training loss over steps, for methods that train."""
    panels = []
    for row in first_rows(comparison):
        points = [
            (step, loss)
            for p in row.get("curve") or []
            if (step := finite(p.get("step"))) is not None
            and (loss := finite(p.get("loss"))) is not None
        ]
        if len(points) < 2 or points[-1][0] <= points[0][0]:
            continue
        low, high = min(v for _, v in points), max(v for _, v in points)
        pad = 0.05 * (high - low or 1.0)
        plot = Plot(
            f"Unlearning curve: {row['method']}",
            f"loss from {points[0][1]:.3g} to {points[-1][1]:.3g} in {points[-1][0]:.0f} steps",
            (points[0][0], points[-1][0]), (low - pad, high + pad), "step", "loss", height=160, width=300,
        )  # fmt: skip
        plot.line(points, "forget")
        panels.append((row["method"], plot.svg()))
    note = "The loss each method minimised. Losses of different methods are different quantities; methods that edit weights have none."
    return Figure("Unlearning curves", note, panels, []) if panels else None


def matrices(comparison: Comparison) -> Figure | None:
    """True × predicted matrices as shades, one panel a method."""
    panels = []
    for row in first_rows(comparison):
        finding = row["findings"].get("prediction-matrix/test") or {}
        matrix: Sequence[Sequence[float]] = (finding.get("detail") or {}).get("matrix") or []
        size = len(matrix)
        if not 1 < size <= 20:
            continue
        plot = Plot(
            f"Predictions: {row['method']}",
            "; ".join(f"class {i} most often called {max(range(size), key=shares.__getitem__)}" for i, shares in enumerate(matrix)),
            (-0.5, size - 0.5), (-0.5, size - 0.5), "predicted", "true", width=250, height=240, grid=False,
            x_ticks=[(i, str(i)) for i in range(size)],
            y_ticks=[(size - 1 - i, str(i)) for i in range(size) if size <= 12 or i % 5 == 0],
        )  # fmt: skip
        for i, shares in enumerate(matrix):
            for j, share in enumerate(shares):
                if share > 0.004:
                    plot.cell(j, size - 1 - i, share, f"{i} called {j}: {share:.2f}")
        value = finite(finding.get("value"))
        panels.append((row["method"] + (f": {number(value)}" if value is not None else ""), plot.svg()))  # fmt: skip
    note = f"Share of each true class (row) called each class (column), on test data; the number is the distance to retrained models. {explain('prediction-matrix/test').good}"
    return Figure("Predictions", note, panels, []) if panels else None

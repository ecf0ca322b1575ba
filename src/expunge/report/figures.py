"""The report's figures: pure functions from a comparison to SVG; missing findings give no figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expunge.report.svg import BOTTOM, LEFT, Plot
from expunge.report.verdict import MARKS, WORDS, method_verdict

Comparison = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A titled figure: panels, a legend of (style, words), and how to read it."""

    title: str
    note: str
    panels: list[tuple[str, str]]
    legend: list[tuple[str, str]]


def all_figures(comparison: Comparison) -> list[Figure]:
    """Every figure that the comparison has findings for."""
    makers: tuple[Callable[[Comparison], Figure | None], ...] = (
        quality_cost, per_class, membership, cka, curves, matrices,
    )  # fmt: skip
    return [figure for maker in makers if (figure := maker(comparison)) is not None]


def first_rows(comparison: Comparison) -> list[Mapping[str, Any]]:
    """The first seed of every method, in order."""
    seen: dict[str, Mapping[str, Any]] = {}
    for row in comparison["rows"]:
        seen.setdefault(row["method"], row)
    return list(seen.values())


def found(row: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A finding with a value, or None."""
    finding = row["findings"].get(name)
    return finding if finding and finding.get("value") is not None else None


def distance(row: Mapping[str, Any]) -> float | None:
    """Mean absolute gap of the accuracies to the retrained models'."""
    gaps = [
        abs(f["gap"])
        for n, f in row["findings"].items()
        if n.startswith("accuracy/") and f.get("gap") is not None
    ]
    return sum(gaps) / len(gaps) if gaps else None


def quality_cost(comparison: Comparison) -> Figure | None:
    """Distance to retraining against cost; a number beside each point leads to the legend."""
    points = []
    for row in comparison["rows"]:
        away = distance(row)
        if row["method"] != "original" and away is not None and row.get("cost_ratio"):
            points.append((row, row["cost_ratio"], away))
    if not points:
        return None
    ratios = [p[1] for p in points]
    top = max(0.05, max(p[2] for p in points) * 1.15)
    plot = Plot(
        "Distance to retraining against cost",
        "; ".join(f"{r['method']}: {x:.2g}× the time, gap {y:.3f}" for r, x, y in points),
        (min(ratios) / 2, max(1.0, max(ratios)) * 2), (0.0, top),
        "time / time of retraining", "mean accuracy gap", width=520, height=300, log_x=True,
    )  # fmt: skip
    methods = list(dict.fromkeys(r["method"] for r, _, _ in points))
    placed: list[tuple[float, float]] = []
    for row, x, y in points:
        number = methods.index(row["method"]) + 1
        state = "ref" if row["method"] == "retrain" else method_verdict([row]).state
        plot.dot(x, y, f"state-{state}", f"{row['method']}: {x:.2g}×, gap {y:.3f}")
        if row is next(r for r, _, _ in points if r["method"] == row["method"]):
            placed.append(_place(plot, plot.px(x), plot.py(y), str(number), placed))
    legend = []
    for number, method in enumerate(methods, 1):
        own = [r for r, _, _ in points if r["method"] == method]
        state = "ref" if method == "retrain" else method_verdict(own).state
        word = "reference" if method == "retrain" else f"{MARKS[state]} {WORDS[state]}"
        legend.append((f"state-{state}", f"{number} {method} – {word}"))
    note = (
        "Left is cheaper, down is closer to a model retrained without the data. A dot is one run."
    )
    return Figure("Quality and cost", note, [("", plot.svg())], legend)


def _place(
    plot: Plot, x: float, y: float, words: str, taken: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """Put a small number near a point where no other number is."""
    for dx, dy in ((8, -4), (8, 13), (-16, -4), (-16, 13), (-4, -10), (-4, 20), (20, 4), (-28, 4), (20, -14), (20, 24), (-28, -14), (-28, 24), (32, 4), (-40, 4)):  # fmt: skip
        spot = (x + dx, y + dy)
        free = all(abs(spot[0] - a) > 11 or abs(spot[1] - b) > 13 for a, b in taken)
        inside = LEFT < spot[0] < plot.width - 18 and 10 < spot[1] < plot.height - BOTTOM - 2
        if free and inside:
            plot.text(*spot, words)
            return spot
    return (x, y)


def per_class(comparison: Comparison) -> Figure | None:
    """Accuracy per true class on test data, one panel a method, the retrained models' as a tick."""
    rows = first_rows(comparison)
    reference = _class_shares(next((r for r in rows if r["method"] == "retrain"), None))
    forgotten = {str(c) for c in comparison["request"].get("label") or []}
    panels = []
    for row in rows:
        shares = _class_shares(row)
        if not shares:
            continue
        names = list(shares)
        plot = Plot(
            f"Accuracy per class: {row['method']}",
            ", ".join(f"class {c}: {v:.2f}" for c, v in shares.items()),
            (-0.7, len(names) - 0.3), (0.0, 1.0), "", "accuracy", height=150, width=300,
            x_ticks=[(i, c) for i, c in enumerate(names) if len(names) <= 12 or i % (len(names) // 6) == 0],
            y_ticks=[(0.0, "0"), (0.5, "0.5"), (1.0, "1")],
        )  # fmt: skip
        for i, c in enumerate(names):
            plot.bar(i, shares[c], 0.7, "forget" if c in forgotten else "retain")
            if c in reference:
                plot.tick_mark(i, reference[c], 0.9)
        panels.append((row["method"], plot.svg()))
    if not panels:
        return None
    legend = [("forget", "class to forget"), ("retain", "other class"), ("refline", "retrained")]
    note = (
        "Test data. A bar should end at the retrained model's line, also for the class to forget."
    )
    return Figure("Accuracy per class", note, panels, legend if forgotten else legend[1:])


def _class_shares(row: Mapping[str, Any] | None) -> dict[str, float]:
    if row is None:
        return {}
    counts: dict[str, list[int]] = {}
    for split in ("forget-test", "retain-test"):
        finding = found(row, f"accuracy/{split}")
        for c, (right, total) in ((finding or {}).get("detail") or {}).get("per_class", {}).items():
            old = counts.get(c, [0, 0])
            counts[c] = [old[0] + right, old[1] + total]
    return {c: r / n for c, (r, n) in sorted(counts.items(), key=lambda item: int(item[0])) if n}


def membership(comparison: Comparison) -> Figure | None:
    """Score histograms of forget, retain and unseen samples with the attack's threshold."""
    panels = []
    for row in first_rows(comparison):
        finding = next((f for n in ("loss", "entropy", "confidence") if (f := found(row, f"membership/auc-{n}"))), None)  # fmt: skip
        detail = (finding or {}).get("detail") or {}
        if finding is None or "histogram" not in detail:
            continue
        h = detail["histogram"]
        top = max(max(h[g]) for g in ("forget", "retain", "nonmember")) * 1.05
        plot = Plot(
            f"Membership scores: {row['method']}",
            f"Two-sided AUC {finding['value']:.3f}, retrained {finding.get('reference') or float('nan'):.3f}",
            (h["edges"][0], h["edges"][-1]), (0.0, top or 1.0), "log-probability of the true class",
            "share of samples", height=170, width=300,
        )  # fmt: skip
        for group in ("retain", "nonmember", "forget"):
            plot.steps(h["edges"], h[group], group)
        plot.vertical(detail["threshold"])
        panels.append((f"{row['method']}: AUC {finding['value']:.2f}", plot.svg()))
    if not panels:
        return None
    legend = [
        ("forget", "to forget"),
        ("retain", "kept (members)"),
        ("nonmember", "never seen"),
        ("cutline", "attack threshold"),
    ]
    note = "Forgotten samples should lie where they lie in a retrained model; usually that is with the samples never seen."
    return Figure("Membership scores", note, panels, legend)


def cka(comparison: Comparison) -> Figure | None:
    """Similarity to the original, layer by layer, on forget data; the retrained models dashed."""
    rows = [r for r in first_rows(comparison) if r["method"] not in ("original", "retrain")]
    with_it = [
        (r, f) for r in rows if (f := found(r, "cka/original")) and f["detail"].get("layers")
    ]
    if not with_it:
        return None
    panels = []
    for row, finding in with_it:
        layers = finding["detail"]["layers"]
        values, reference = finding["detail"]["values"], finding["detail"].get("reference_values")
        plot = Plot(
            f"CKA to the original: {row['method']}",
            ", ".join(f"{n}: {v:.2f}" for n, v in zip(layers, values, strict=True)),
            (1, max(2, len(layers))), (0.0, 1.0), "layer, input to output", "CKA", height=160, width=300,
            x_ticks=[(1, "1"), (max(2, len(layers)), str(len(layers)))],
            y_ticks=[(0.0, "0"), (0.5, "0.5"), (1.0, "1")],
        )  # fmt: skip
        if reference:
            plot.line(list(enumerate(reference, 1)), "dashed")
        plot.line(list(enumerate(values, 1)), "forget")
        panels.append((row["method"], plot.svg()))
    legend = [("forget", "this method"), ("dashline", "retrained models")]
    note = "Similarity of hidden layers to the original on forgotten samples. A line far above the dashed one still represents them as before."
    return Figure("Layers (CKA)", note, panels, legend)


def curves(comparison: Comparison) -> Figure | None:
    """Training loss over steps, for methods that train."""
    panels = []
    for row in first_rows(comparison):
        points = [
            (p["step"], p["loss"]) for p in row.get("curve") or [] if p.get("loss") is not None
        ]
        if len(points) < 2:
            continue
        values = sorted(v for _, v in points)
        low, high = values[0], values[-1]
        pad = 0.05 * (high - low or 1.0)
        plot = Plot(
            f"Unlearning curve: {row['method']}",
            f"from {points[0][1]:.3g} to {points[-1][1]:.3g} in {points[-1][0]} steps",
            (0, points[-1][0]), (low - pad, high + pad), "step", "loss", height=150, width=300,
        )  # fmt: skip
        plot.line(points, "forget")
        panels.append((row["method"], plot.svg()))
    if not panels:
        return None
    return Figure(
        "Unlearning curves",
        "What each method minimised; methods that edit weights have none.",
        panels,
        [],
    )


def matrices(comparison: Comparison) -> Figure | None:
    """True × predicted matrices as shades, one panel a method."""
    panels = []
    for row in first_rows(comparison):
        detail = (row["findings"].get("prediction-matrix/test") or {}).get("detail") or {}
        matrix = detail.get("matrix")
        if not matrix or len(matrix) > 20:
            continue
        size = len(matrix)
        plot = Plot(
            f"Predictions: {row['method']}", "rows: true class, columns: predicted class",
            (-0.5, size - 0.5), (-0.5, size - 0.5), "predicted", "true", width=230, height=220,
            x_ticks=[(i, str(i)) for i in range(size)] if size <= 12 else [],
            y_ticks=[(size - 1 - i, str(i)) for i in range(size)] if size <= 12 else [],
        )  # fmt: skip
        for i, shares in enumerate(matrix):
            for j, share in enumerate(shares):
                if share > 0.004:
                    left, right = plot.px(j - 0.47), plot.px(j + 0.47)
                    top, bottom = plot.py(size - 1 - i + 0.47), plot.py(size - 1 - i - 0.47)
                    plot.marks.append(
                        f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
                        f'class="bar retain" style="opacity:{min(1.0, 0.12 + 0.88 * share):.2f}"><title>{i} called {j}: {share:.2f}</title></rect>'
                    )
        panels.append((row["method"], plot.svg()))
    if not panels:
        return None
    return Figure(
        "Predictions",
        "Share of each true class (row) called each class (column), on test data.",
        panels,
        [],
    )

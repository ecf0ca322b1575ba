"""Figures: what is drawn is where the numbers say, described in words, and valid XML."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from report_data import CLASS, LAYERS, make_data

from expunge.report import figures
from expunge.report.roc import roc_curves
from expunge.report.svg import Plot, linear, short, text_width, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def one():
    return make_data(1)["comparisons"][0]


def svgs(figure):
    return [ET.fromstring(svg) for _, svg in figure.panels]


def test_every_figure_has_a_title_a_description_and_no_colour_of_its_own(one):
    found = figures.all_figures(one)
    assert [f.title for f in found] == [
        "Quality and cost", "Accuracy per class", "Membership scores", "Layers (CKA)", "Unlearning curves", "Predictions",
    ]  # fmt: skip
    for figure in found:
        assert figure.note
        for root in svgs(figure):
            assert root.get("role") == "img"
            assert root.find(f"{SVG}title").text
            assert root.find(f"{SVG}desc").text
            assert not re.search(r"#[0-9a-f]{3,6}\b|rgb\(", ET.tostring(root, encoding="unicode"))


def test_bars_are_as_high_as_the_accuracy(one):
    figure = figures.per_class(one)
    assert [c for c, _ in figure.panels] == list(CLASS)
    root = svgs(figure)[list(CLASS).index("gradient-ascent")]
    bars = [b for b in root.iter(f"{SVG}rect") if "bar" in b.get("class")]
    assert len(bars) == 10
    height = max(float(b.get("height")) for b in svgs(figure)[0].iter(f"{SVG}rect")) / 0.97
    assert float(bars[3].get("height")) / height == pytest.approx(0.18, abs=0.01)
    assert float(bars[0].get("height")) / height == pytest.approx(0.71, abs=0.01)
    assert ["forget" in b.get("class") for b in bars].index(True) == 3
    references = [e for e in root.iter(f"{SVG}line") if e.get("class") == "ref"]
    assert len(references) == 10


def test_scatter_puts_cheap_left_and_close_low(one):
    root = svgs(figures.quality_cost(one))[0]
    dots = {c.find(f"{SVG}title").text.split(":")[0]: c for c in root.iter(f"{SVG}circle")}
    assert set(dots) == set(CLASS) - {"original"}
    x = {m: float(c.get("cx")) for m, c in dots.items()}
    y = {m: float(c.get("cy")) for m, c in dots.items()}
    assert x["ssd"] < x["gradient-ascent"] < x["finetune"] < x["retrain"]
    assert y["finetune"] < y["gradient-ascent"] < y["scrub"] < y["retrain"]
    # a logarithmic axis: equal ratios are equal lengths
    length = (x["retrain"] - x["ssd"]) / math.log(1 / 0.07)
    assert (x["retrain"] - x["finetune"]) / math.log(1 / 0.21) == pytest.approx(length, rel=0.01)


def test_every_method_has_a_number_and_the_legend_says_whose(one):
    figure = figures.quality_cost(one)
    root = svgs(figure)[0]
    shown = {n for t in root.iter(f"{SVG}text") if t.get("class") == "number" for n in t.text.split(", ")}  # fmt: skip
    words = [w for _, w in figure.legend]
    assert shown == {w.split()[0] for w in words} == {str(i) for i in range(1, 10)}
    assert [w.split()[1].rstrip(":") for w in words] == [m for m in CLASS if m != "original"]


def test_dots_on_one_another_share_a_label():
    one = make_data(1)["comparisons"][0]
    base = next(r for r in one["rows"] if r["method"] == "ssd")
    one["rows"] += [{**base, "method": f"v{i}"} for i in range(6)]
    labels = [t.text for t in svgs(figures.quality_cost(one))[0].iter(f"{SVG}text") if t.get("class") == "number"]  # fmt: skip
    assert "8 and 6 more" in labels


def test_labels_of_close_dots_do_not_meet_one_another_nor_a_dot():
    plot = Plot("t", "d", (0, 100), (0, 1), width=420)
    dots = [(x, 0.5) for x in range(5, 95, 3)]
    taken = [(plot.px(x) - 6, plot.py(y) - 6, plot.px(x) + 6, plot.py(y) + 6) for x, y in dots]
    for i, (x, y) in enumerate(dots):
        plot.label(x, y, str(10 + i), taken)
    texts = [t for t in ET.fromstring(plot.svg()).iter(f"{SVG}text") if t.get("class") == "number"]
    assert len(texts) == len(dots)
    boxes = [(float(t.get("x")) - 8, float(t.get("y")) - 10, float(t.get("x")) + 8, float(t.get("y")) + 2) for t in texts]  # fmt: skip
    circles = [(plot.px(x) - 5, plot.py(y) - 5, plot.px(x) + 5, plot.py(y) + 5) for x, y in dots]
    for a, b in itertools.combinations(boxes + circles, 2):
        if a in circles and b in circles:
            continue
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_histogram_marks_threshold_and_groups(one):
    figure = figures.membership(one)
    root = svgs(figure)[2]
    paths = [p.get("class") for p in root.iter(f"{SVG}path")]
    assert paths == ["steps retain", "steps nonmember", "steps forget"]
    cut = next(e for e in root.iter(f"{SVG}line") if e.get("class") == "cut")
    edge = [float(v) for v in re.findall(r"[ML]([\d.]+),", next(root.iter(f"{SVG}path")).get("d"))]
    share = (float(cut.get("x1")) - min(edge)) / (max(edge) - min(edge))
    assert share == pytest.approx((8 - 1.7) / 8, abs=0.005)
    assert "attack threshold" in [w for _, w in figure.legend]
    assert "threshold -1.7" in root.find(f"{SVG}desc").text


def test_cka_has_a_line_for_the_method_and_a_dashed_one_for_retrained(one):
    figure = figures.cka(one)
    assert [c for c, _ in figure.panels] == [m for m in CLASS if m not in ("original", "retrain")]
    lines = [p.get("class") for p in svgs(figure)[0].iter(f"{SVG}polyline")]
    assert lines == ["line dashed", "line forget"]
    assert all(layer in figure.foot for layer in LAYERS)
    for row in one["rows"]:
        points = next(svgs(figure)[0].iter(f"{SVG}polyline")).get("points").split()
        assert len(points) == len(LAYERS), row["method"]


def test_curves_only_for_methods_that_train(one):
    names = [c for c, _ in figures.curves(one).panels]
    assert "ssd" not in names
    assert "scrub" in names


def test_missing_findings_give_no_figure_and_no_error():
    one = make_data(1, references=0)["comparisons"][0]
    assert "Quality and cost" not in [f.title for f in figures.all_figures(one)]
    cka = figures.cka(one)
    assert [w for _, w in cka.legend] == ["this method"]
    for row in one["rows"]:
        row["findings"] = {}
        row["curve"] = [{"step": 1, "loss": 0.2}]
    assert figures.all_figures(one) == []


def test_odd_details_do_no_harm():
    one = make_data(1)["comparisons"][0]
    for row in one["rows"]:
        row["curve"] = [{"step": 5, "loss": 1.0}, {"step": 5, "loss": None}, {"step": 5, "loss": 2.0}]  # fmt: skip
        auc = row["findings"]["membership/auc-loss"]["detail"]
        auc["histogram"] = {"edges": [0.0, 1.0], "forget": [0.0], "retain": [], "nonmember": None}
        auc["threshold"] = None
        row["findings"]["accuracy/forget-test"]["detail"] = {"per_class": {"cat": [1, 2], "dog": [0, 0]}}  # fmt: skip
        row["findings"]["prediction-matrix/test"]["detail"] = {"matrix": [[1.0]]}
    found = figures.all_figures(one)
    assert [f.title for f in found] == ["Quality and cost", "Accuracy per class", "Membership scores", "Layers (CKA)"]  # fmt: skip
    for figure in found:
        svgs(figure)


def test_a_hundred_classes_keep_their_ticks_apart():
    plot = Plot("t", "d", (-0.7, 99.7), (0, 1), width=300, x_ticks=[(i, str(i)) for i in range(100)])  # fmt: skip
    texts = [t for t in ET.fromstring(plot.svg()).iter(f"{SVG}text") if t.get("text-anchor") == "middle"]  # fmt: skip
    spans = sorted((float(t.get("x")) - text_width(t.text) / 2, float(t.get("x")) + text_width(t.text) / 2) for t in texts)  # fmt: skip
    assert 5 < len(spans) < 30
    assert all(b[0] > a[1] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.36, [0, 0.1, 0.2, 0.3]),
        (-8, 0, [-8, -6, -4, -2, 0]),
        (3, 3, [3]),
        (0, float("inf"), []),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_scale_clamps_and_short_numbers():
    scale = linear(0, 10, 100, 200)
    assert [scale(v) for v in (-5, 0, 5, 10, 50)] == [100, 100, 150, 200, 200]
    assert [short(v) for v in (0, 0.30000000000000004, -2.5, 12000, 1e-6)] == ["0", "0.3", "−2.5", "12k", "1e−06"]  # fmt: skip


def test_texts_in_figures_are_escaped():
    one = make_data(1)["comparisons"][0]
    for row in one["rows"]:
        row["method"] += "<b>&"
    for figure in figures.all_figures(one):
        for root in svgs(figure):
            assert root.find(f".//{SVG}b") is None


def with_curve(one, name, **curve):
    finding = {"value": 0.9, "reference": 0.5, "direction": "reference", "detail": {"roc": curve}}
    rows = [{**row, "findings": {**row["findings"], name: finding}} for row in one["rows"][:3]]
    return {**one, "rows": rows}


def test_roc_curves_have_logarithmic_axes(one):
    curve = {"fpr": [0.01, 0.1, 1.0], "tpr": [0.1, 0.0, 1.0], "reference_tpr": [0.01, 0.1, 1.0], "side": "other"}  # fmt: skip
    figure = roc_curves(with_curve(one, "lira/auc-online", **curve))
    assert figure.title in [f.title for f in figures.all_figures(with_curve(one, "u-lira/auc", **curve))]  # fmt: skip
    root = svgs(figure)[-1]
    lines = {e.get("class"): e.get("points").split() for e in root.iter(f"{SVG}polyline")}
    own, theirs, chance = (
        [tuple(map(float, p.split(","))) for p in lines[f"line {s}"]] for s in ("forget", "dashed", "nonmember")
    )  # fmt: skip
    assert own[1][0] - own[0][0] == pytest.approx(own[2][0] - own[1][0], abs=0.2)
    assert theirs[0] == chance[0] and theirs[2] == chance[1]  # on the diagonal
    assert own[0][1] == theirs[1][1]  # 0.1 is 0.1
    assert own[1][1] == chance[0][1]  # nothing found lies at the lower edge
    assert "look less like training data" in root.find(f"{SVG}desc").text
    assert "the original" not in [words for _, words in figure.legend]


def test_no_curve_no_figure(one):
    assert roc_curves(one) is None
    assert roc_curves(with_curve(one, "lira/auc-online", fpr=[0.1], tpr=[0.2])) is None
    assert roc_curves(with_curve(one, "lira/auc-online", fpr=[0.1, 1], tpr=[0.2, math.nan])) is None  # fmt: skip

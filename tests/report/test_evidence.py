"""Figures of what a model still holds: nothing without findings, and points where the numbers say."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from expunge.report import evidence, figures

SVG = "{http://www.w3.org/2000/svg}"


def finding(value, reference=None, **detail):
    return {"value": value, "low": None, "high": None, "reference": reference, "detail": detail}


def comparison(**methods):
    rows = [{"method": m, "seed": 0, "findings": f, "cost_ratio": None} for m, f in methods.items()]
    return {"rows": rows}


def drawn(figure):
    return [ET.fromstring(svg) for _, svg in figure.panels]


@pytest.mark.parametrize(
    "maker", [evidence.memorised, evidence.recovery, evidence.relearning, evidence.margins]
)
def test_without_findings_there_is_no_figure(maker):
    assert maker(comparison(ssd={})) is None
    names = ("memorised-fraction/limit", "recovery/forget", "relearn-time/updates", "klom/forget")
    assert maker(comparison(ssd={n: finding(None) for n in names})) is None


def test_limits_are_as_high_as_they_say():
    given = {
        "memorised-fraction/limit": finding(0.5, 0.1),
        "memorised-fraction/estimate": finding(0.25),
    }
    full = {"memorised-fraction/limit": finding(1.0, 0.1)}
    (root,) = drawn(evidence.memorised(comparison(ssd=given, original=full)))
    bars = [float(b.get("height")) for b in root.iter(f"{SVG}rect")]
    assert bars[0] == pytest.approx(bars[1] / 2)
    (dot,) = root.iter(f"{SVG}circle")
    top = [float(b.get("y")) for b in root.iter(f"{SVG}rect")]
    base = top[1] + bars[1]
    assert base - float(dot.get("cy")) == pytest.approx(bars[1] / 4, abs=0.2)
    assert len([e for e in root.iter(f"{SVG}line") if e.get("class") == "ref"]) == 2


def lines(root):
    return {e.get("class"): e.get("points").split() for e in root.iter(f"{SVG}polyline")}


def test_recovery_is_drawn_against_the_number_of_samples():
    detail = {
        "shots": [1, 5, 10],
        "values": [0.5, 0.7, 1.0],
        "original_values": [0.9, 0.9, 1.0],
        "reference_values": [[0.2, 0.3, 0.4]],
    }
    figure = evidence.recovery(comparison(ssd={"recovery/forget": finding(0.7, 0.3, **detail)}))
    found = lines(drawn(figure)[0])
    assert set(found) == {"line forget", "line retain", "line dashed"}
    x = [float(p.split(",")[0]) for p in found["line forget"]]
    y = [float(p.split(",")[1]) for p in found["line forget"]]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(0.699, abs=0.01)  # logarithmic
    assert y[0] > y[1] > y[2]


def test_relearning_that_is_there_at_once_is_a_dot():
    detail = {
        "curve": [0.0, 0.4, 0.8],
        "original_curve": [1.0],
        "reference_curves": [[0.0, 0.1, 0.3, 0.6, 0.9]],
        "accuracy": True,
    }
    figure = evidence.relearning(comparison(ssd={"relearn-time/updates": finding(2.0, 4, **detail)}))  # fmt: skip
    root = drawn(figure)[0]
    assert set(lines(root)) == {"line forget", "line dashed"}
    assert [c.get("class") for c in root.iter(f"{SVG}circle")] == ["dot retain"]


def test_long_curves_are_thinned_and_keep_their_end():
    detail = {"curve": [n / 1000 for n in range(1001)], "reference_curves": [], "accuracy": False}
    figure = evidence.relearning(comparison(a={"relearn-time/updates": finding(1000, **detail)}))
    points = lines(drawn(figure)[0])["line forget"]
    assert 40 < len(points) < 90
    assert len(set(points[-2:])) == 2


def test_margins_beside_their_floor():
    bars = {"edges": [0, 1, 2], "unlearned": [0.25, 0.75], "floor": [1.0, 0.0]}
    figure = evidence.margins(comparison(ssd={"klom/forget-train": finding(1.5, histogram=bars)}))
    assert figure.panels[0][0] == "ssd, forget-train"
    paths = [e.get("class") for e in drawn(figure)[0].iter(f"{SVG}path")]
    assert paths == ["steps retain", "steps forget"]
    broken = bars | {"floor": [1.0]}
    assert evidence.margins(comparison(ssd={"klom/a": finding(1.5, histogram=broken)})) is None


def test_they_are_among_the_report_s_figures():
    given = {"memorised-fraction/limit": finding(0.5)}
    row = comparison(ssd=given) | {"classes": None}
    assert "Still memorised" in [f.title for f in figures.all_figures(row)]

"""Figures of what a model still holds: nothing without findings, and points where the numbers say."""

from __future__ import annotations

import re
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


def test_limits_are_as_long_as_they_say():
    given = {
        "memorised-fraction/limit": finding(0.5, 0.1) | {"low": 0.4, "high": 0.6},
        "memorised-fraction/estimate": finding(0.25) | {"low": 0.0, "high": 0.5},
    }
    full = {"memorised-fraction/limit": finding(1.0, 0.1)}
    names = {"gradient-ascent": given, "original": full, "m" * 60: full}
    figure = evidence.memorised(comparison(**names))
    (root,) = drawn(figure)
    bars = [(float(b.get("x")), float(b.get("width"))) for b in root.iter(f"{SVG}rect")]
    (start, half), (_, whole), _ = bars
    assert half == pytest.approx(whole / 2, abs=0.2)
    (dot,) = root.iter(f"{SVG}circle")
    assert float(dot.get("cx")) - start == pytest.approx(whole / 4, abs=0.2)
    ends = [re.findall(r"[-\d.]+", e.get("d")) for e in root.iter(f"{SVG}path")]
    found = [[(float(e[0]) - start) / whole, (float(e[-4]) - start) / whole] for e in ends]
    assert found == [pytest.approx([0.4, 0.6], abs=0.01), pytest.approx([0.0, 0.5], abs=0.01)]
    strokes = [float(e.get("x1")) for e in root.iter(f"{SVG}line") if e.get("class") == "ref"]
    assert strokes == [pytest.approx(start + whole / 10, abs=0.2)] * 3
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert "gradient-ascent" in words and "original" in words, "every method is named in full"
    assert "m" * 21 + "…" in words
    alone = evidence.memorised(comparison(ssd={"memorised-fraction/limit": finding(0.5)}))
    assert ("refline", "limit of retrained models") in figure.legend
    assert len(alone.legend) == 2, "no word of what is not drawn"


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
    (dot,) = root.iter(f"{SVG}circle")
    assert dot.get("class") == "dot retain"
    numbers = [e for e in root.iter(f"{SVG}text") if e.get("text-anchor") == "end"]
    assert float(dot.get("cx")) - 5 > max(float(e.get("x")) for e in numbers) + 3
    assert figure.panels[0][0] == "ssd: 2 updates"


def test_long_curves_are_thinned_and_keep_their_end():
    detail = {"curve": [n / 1000 for n in range(1001)], "reference_curves": [], "accuracy": False}
    figure = evidence.relearning(comparison(a={"relearn-time/updates": finding(1000, **detail)}))
    points = lines(drawn(figure)[0])["line forget"]
    assert 40 < len(points) < 90
    assert len(set(points[-2:])) == 2


def test_margins_beside_their_floor():
    bars = {"edges": [0, 1, 2], "unlearned": [0.25, 0.75], "floor": [1.0, 0.0]}
    figure = evidence.margins(comparison(ssd={"klom/forget-train": finding(1.5, histogram=bars)}))
    assert figure.panels[0][0] == "ssd, forget-train: 1.500"
    paths = [e.get("class") for e in drawn(figure)[0].iter(f"{SVG}path")]
    assert paths == ["steps retain", "steps forget"]
    broken = bars | {"floor": [1.0]}
    assert evidence.margins(comparison(ssd={"klom/a": finding(1.5, histogram=broken)})) is None


def test_they_are_among_the_report_s_figures():
    given = {"memorised-fraction/limit": finding(0.5)}
    row = comparison(ssd=given) | {"classes": None}
    assert "Still memorised" in [f.title for f in figures.all_figures(row)]

"""The leaderboard: distances, intervals, and rows that do not depend on each other."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from expunge.report.leaderboard import (
    CLOSE,
    OPEN,
    Entry,
    distance,
    entries,
    figures,
    markdown,
    picture,
    replace_figures,
)

ROOT = Path(__file__).parents[2]


def finding(value, reference, original=1.0):
    return {
        "value": value, "reference": reference, "gap": value - reference, "original": original,
        "low": None, "high": None, "floor": 0.0, "direction": "toward", "reason": None, "detail": {},
    }  # fmt: skip


def row(method, seed, forget, retain=0.97, ratio=0.5):
    return {
        "method": method, "seed": seed, "cost_ratio": ratio, "intent": "removal",
        "guarantee": "empirical",
        "findings": {
            "accuracy/forget-train": finding(forget, 0.0), "accuracy/retain-train": finding(1.0, 1.0),
            "accuracy/forget-test": finding(forget, 0.0), "accuracy/retain-test": finding(retain, 0.97),
            "accuracy/whole": finding(0.0, 1.0), "cost/seconds": finding(1.0, 99.0),
        },
    }  # fmt: skip


def comparison(*rows):
    return {
        "workload": "mnist-class", "title": "mnist-class: forget label 3", "references": [{}, {}],
        "rows": [row("original", 0, 1.0), row("retrain", 1001, 0.0), *rows],
    }  # fmt: skip


def test_distance_is_the_mean_gap_over_both_sides():
    assert distance(row("x", 0, 0.4, 0.93)) == pytest.approx((0.4 + 0 + 0.4 + 0.04) / 4)
    assert distance({"findings": {"cost/seconds": finding(1.0, 2.0)}}) is None


def test_ranked_with_an_interval_over_seeds():
    ranked = entries(
        comparison(
            *(row("far", s, 0.6) for s in range(3)),
            *(row("near", s, f) for s, f in enumerate((0.0, 0.1, 0.2))),
        )
    )
    assert [e.method for e in ranked] == ["retrain", "near", "far", "original"]
    again, near, far, idle = ranked
    assert again.distance == 0
    # distances 0, .05, .1: mean .05, deviation .05, t(2) = 4.303
    assert near.distance == pytest.approx(0.05)
    assert near.high == pytest.approx(0.05 + 4.3027 * 0.05 / 3**0.5, abs=1e-4)
    assert near.low == 0 and near.seeds == 3
    assert far.low == far.high == far.distance
    assert [e.beats_nothing for e in ranked] == ["yes", "yes", "yes", "no"]
    assert far.interval == "the same for every seed" and near.interval.startswith("0.000 …")
    assert idle.cost_ratio is None and near.cost_ratio == 0.5


def test_what_the_verdict_leaves_out_is_said():
    unclear = [row("unclear", seed, forget) for seed, forget in enumerate((0.1, 0.9))]
    made = comparison(row("idle", 0, 1.0, ratio=2.0), *unclear, row("good", 0, 0.1, ratio=0.9))
    remarks = {e.method: e.remarks for e in entries(made)}
    assert remarks["idle"] == ["no better than doing nothing", "dearer than retraining"]
    assert remarks["unclear"] == ["not shown to be better than doing nothing"]
    assert remarks["good"] == []
    text = markdown([made])
    for method, said in remarks.items():
        if method not in ("original", "retrain"):
            line = next(line for line in text.splitlines() if f"[`{method}`]" in line)
            assert line.count("better than") == sum("better than" in s for s in said)
    assert "*do nothing*" in text and "*retrain once more*" in text


def test_figures_of_a_page_are_replaced_and_nothing_else():
    ranked = entries(comparison(row("a", 0, 0.3), row("b", 0, 0.1)))
    page = f"# a\n\n{OPEN}\nold\n{CLOSE}\n\n## Deviations\n"
    made = replace_figures(page, figures(ranked, "a"))
    assert (
        "old" not in made and made.endswith("## Deviations\n") and "| mnist-class | 0.150 |" in made
    )
    assert "0.050" not in made  # the other method's
    assert replace_figures(made, figures(ranked, "a")) == made
    assert "Not on the" in figures(ranked, "c")
    with pytest.raises(ValueError, match="no <!--"):
        replace_figures("# a\n", figures(ranked, "a"))


def test_adding_a_method_changes_no_other_row():
    before = entries(comparison(row("a", 0, 0.3)))
    after = entries(comparison(row("a", 0, 0.3), row("b", 0, 0.1), row("b", 1, 0.9)))
    assert [e for e in after if e.method != "b"] == before


def test_picture_is_svg_with_a_dot_a_method():
    svg = picture(comparison(row("a", 0, 0.3), row("b", 0, 0.1)))
    root = ET.fromstring(svg)
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 2


def test_pages_of_methods_hold_the_figures_of_the_last_leaderboard():
    written = json.loads((ROOT / "benchmarks" / "results" / "leaderboard.json").read_text())
    ranked = [Entry(**e) for e in written["entries"]]
    assert {e.workload for e in ranked} >= {"digits-class", "mnist-class", "mnist-random"}
    for page in (ROOT / "docs" / "methods").glob("*.md"):
        text = page.read_text()
        if OPEN in text:
            assert replace_figures(text, figures(ranked, page.stem)) == text, page.stem

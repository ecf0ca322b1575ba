"""The leaderboard: distances, intervals, and rows that do not depend on each other."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from expunge.report.leaderboard import distance, entries, markdown, picture


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
    assert [e.method for e in ranked] == ["near", "far", "original"]
    near, far, idle = ranked
    # distances 0, .05, .1: mean .05, deviation .05, t(2) = 4.303
    assert near.distance == pytest.approx(0.05)
    assert near.high == pytest.approx(0.05 + 4.3027 * 0.05 / 3**0.5, abs=1e-4)
    assert near.low == 0 and near.seeds == 3
    assert far.low == far.high == far.distance
    assert near.better_than_nothing and far.better_than_nothing and not idle.better_than_nothing
    assert idle.cost_ratio is None and near.cost_ratio == 0.5


def test_no_better_than_nothing_is_said():
    made = comparison(row("idle", 0, 1.0))
    assert not next(e for e in entries(made) if e.method == "idle").better_than_nothing
    text = markdown([made])
    assert "no better than doing nothing" in text and "*do nothing*" in text
    assert "retrain`" not in text


def test_adding_a_method_changes_no_other_row():
    before = entries(comparison(row("a", 0, 0.3)))
    after = entries(comparison(row("a", 0, 0.3), row("b", 0, 0.1), row("b", 1, 0.9)))
    assert [e for e in after if e.method != "b"] == before


def test_picture_is_svg_with_a_dot_a_method():
    svg = picture(comparison(row("a", 0, 0.3), row("b", 0, 0.1)))
    root = ET.fromstring(svg)
    assert len(root.findall(".//{http://www.w3.org/2000/svg}circle")) == 2

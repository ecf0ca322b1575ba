"""src/expunge/suite/forget_sets.py and report/forget_sets.py: methods on random sets and on both tails."""

from __future__ import annotations

import json

import numpy as np
import pytest

import expunge as xp
from expunge.core.errors import NeedsError, SettingError
from expunge.core.runtime import Runtime
from expunge.fleet.forget_sets import TAILS
from expunge.report.forget_sets import ORDER, set_picture, set_sentences, set_table
from expunge.store import Store
from expunge.suite.bench import Bench
from expunge.suite.forget_sets import FIGURES, by_forget_set, summarise

SEARCH = {"rounds": 3, "lr": 1e-3}
METHODS = [
    {"name": "finetune", "epochs": 1, "lr": 0.05},
    {"name": "gradient-ascent", "epochs": 1, "lr": 1e-30},
]


@pytest.fixture(scope="module")
def found(digits, tmp_path_factory):
    bench = Bench(Store.open(tmp_path_factory.mktemp("store")), Runtime(threads=1))
    return by_forget_set(
        digits, METHODS, 100, draws=2, search=SEARCH, references=2, bench=bench
    ), bench


def test_every_set_is_unlearnt_beside_models_retrained_without_it(found, digits):
    one, bench = found
    methods = {"original", "retrain", "finetune", "gradient-ascent"}
    assert {(r["set"], r["draw"], r["method"]) for r in one.rows} == {
        (s, d, m)
        for s, d in (("worst-case", 0), ("random", 0), ("random", 1), ("high-el2n", 0))
        for m in methods
    }
    forgotten = {
        tuple(r.resolve(digits.train).tolist()) for rs in one.requests.values() for r in rs
    }
    assert len(forgotten) == 4 and all(len(ids) == 100 for ids in forgotten)
    assert len(bench.store.runs(kind="reference")) == 8
    assert {r["tail"] for r in one.rows} == {"redundant", "average", "memorised"}
    for row in one.rows:
        for figure in FIGURES:
            f = row[figure]
            assert f["low"] <= f["value"] <= f["high"] and f["reference"] is not None


def test_figures_are_those_of_the_audits(found, digits):
    one, _ = found
    row = next(r for r in one.rows if r["set"] == "high-el2n" and r["method"] == "original")
    ids = one.requests["high-el2n"][0].resolve(digits.train)
    batch = digits.train.fetch(ids)
    wrong = (digits.model(batch.x).argmax(1) != batch.y).double().mean()
    assert row["UA"]["value"] == pytest.approx(float(wrong))
    theirs = one.comparison.data["comparisons"]
    assert len(theirs) == 3  # of the random sets one is shown
    assert [c["title"].count("tail") for c in theirs] == [1, 0, 1]
    assert [c["rows"][0]["findings"]["membership/efficacy-svc"]["value"] for c in theirs][2] == row["MIA"]["value"]  # fmt: skip


def test_retrained_models_keep_the_redundant_and_lose_the_memorised(found):
    one, _ = found
    ua = {(r["set"], r["method"]): r["UA"]["value"] for r in one.summary()}
    assert ua["worst-case", "retrain"] < ua["random", "retrain"] < ua["high-el2n", "retrain"]
    gaps = {r["set"]: r["UA"]["gap"] for r in one.summary() if r["method"] == "original"}
    assert gaps["high-el2n"] < gaps["random"] < 0.02 and abs(gaps["worst-case"]) < 0.05


def test_a_method_without_effect_keeps_the_row_of_the_original(found):
    one, _ = found
    idle = [r for r in one.summary() if r["method"] == "gradient-ascent"]
    before = [r for r in one.summary() if r["method"] == "original"]
    assert all(r["unchanged"] for r in idle)
    assert [r["UA"] for r in idle] == [r["UA"] for r in before]
    assert "gradient-ascent (no effect)" in set_table(one.summary())
    assert not any(r["unchanged"] for r in one.summary() if r["method"] == "finetune")


def test_report_of_all_sets(found, tmp_path):
    one, _ = found
    page = one.comparison.report(tmp_path)
    text = page.read_text()
    assert "redundant tail" in text and "memorised tail" in text
    json.dumps(one.summary(), allow_nan=False)
    assert set_picture(one.summary()).count("<polyline") == 4
    assert set_picture(one.summary()).count("<circle") == 12
    said = " ".join(set_sentences(one.summary()))
    assert "(redundant)" in said and "(memorised)" in said and "not looked at" not in said


def test_overlaps_and_classes(found, digits):
    one, _ = found
    about = {r["set"]: r for r in one.sets}
    ids = {n: set(rs[0].resolve(digits.train).tolist()) for n, rs in one.requests.items()}
    shared = len(ids["random"] & ids["worst-case"]) / 100
    assert about["random"]["overlap"] == pytest.approx({
        "worst-case": shared,
        "high-el2n": len(ids["random"] & ids["high-el2n"]) / 100,
    })
    labels = digits.train.labels_of(one.requests["high-el2n"][0].resolve(digits.train))
    assert about["high-el2n"]["largest class"] == int(labels.bincount().max()) / 100
    assert set(ORDER) == set(TAILS)


def row(draw, value, reference, *, name="random", method="a", seed=0, half=0.02, **more):
    figure = {"value": value, "low": None if value is None else value - half, "high": None if value is None else value + half, "reference": reference, "reason": None}  # fmt: skip
    return {
        "set": name, "tail": TAILS[name], "draw": draw, "method": method, "seed": seed, "unchanged": False,
        "UA": figure, "MIA": figure, "RA": figure | {"value": reference, "low": reference, "high": reference},
        "TA": figure | {"value": None},
    } | more  # fmt: skip


def test_intervals_of_gaps():
    one = summarise([row(0, 0.3, 0.1)])[0]
    assert one["UA"]["gap"] == pytest.approx(0.2)
    assert (one["UA"]["low"], one["UA"]["high"]) == pytest.approx((0.18, 0.22))
    assert one["TA"]["value"] is None and one["RA"]["gap"] == 0
    assert one["distance"] == pytest.approx(0.4 / 3)
    values = [0.1, 0.2, 0.6]
    several = summarise([row(d, v, 0.1) for d, v in enumerate(values)])[0]["UA"]
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
    assert (several["low"], several["high"]) == pytest.approx((0.2 - half, 0.2 + half))
    same = summarise([row(d, 0.3, 0.1) for d in range(4)])[0]["UA"]  # agreement may be chance
    assert (same["low"], same["high"]) == pytest.approx((0.19, 0.21))
    # seeds of one draw are no further draws, but what they differ by is no less uncertain
    seeds = summarise([row(0, 0.2, 0.1, seed=0), row(0, 0.4, 0.1, seed=1)])[0]
    assert seeds["n"] == 2 and seeds["UA"]["gap"] == pytest.approx(0.2)
    spread = 12.706205 * np.std([0.1, 0.3], ddof=1) / np.sqrt(2)
    ends = (0.2 - spread, 0.2 + spread)
    assert (seeds["UA"]["low"], seeds["UA"]["high"]) == pytest.approx(ends)
    alike = summarise([row(0, 0.3, 0.1, seed=s) for s in range(4)])[0]["UA"]
    assert (alike["low"], alike["high"]) == pytest.approx((0.18, 0.22))  # of the same samples
    alone = summarise([row(0, 0.3, None)])[0]
    assert alone["UA"]["value"] == 0.3 and alone["UA"]["gap"] is None and alone["distance"] is None


def test_distances_have_no_sign():
    rows = summarise([row(0, 0.0, 0.3), row(1, 0.2, 0.3)])
    assert rows[0]["UA"]["gap"] == pytest.approx(-0.2)
    assert rows[0]["distance"] == pytest.approx(0.4 / 3)


def test_sentences_say_which_tail_is_missing_and_how_the_order_turns():
    rows = [
        row(0, v, 0.1, name=name, method=m)
        for name, m, v in (("worst-case", "a", 0.1), ("worst-case", "b", 0.3), ("random", "a", 0.3), ("random", "b", 0.2))
    ]  # fmt: skip
    said = set_sentences(summarise(rows))
    assert "on worst-case: a, b." in " ".join(said) and "on random: b, a." in " ".join(said)
    assert said[0].startswith("a:") and said[0].endswith("largest on random.")
    assert said[-1].startswith("The memorised tail was not looked at")
    assert not any("redundant tail was not" in s for s in said)


def test_what_is_refused(digits):
    bench = Bench(Store.temporary(), Runtime(threads=1))
    for sets in (["hardest"], ["random", "random"], []):
        with pytest.raises(SettingError):
            by_forget_set(digits, [], 50, sets, bench=bench)
    with pytest.raises(SettingError):
        by_forget_set(digits, [], 50, draws=0, bench=bench)
    with pytest.raises(SettingError, match="pace"):
        by_forget_set(digits, [], 50, search={"pace": 1}, bench=bench)
    bare = xp.Classification(digits.model, digits.train, digits.test)
    with pytest.raises(NeedsError, match="recipe"):
        by_forget_set(bare, [], 50, bench=bench)
    assert not bench.store.runs()

"""The rule of verdicts at its boundaries, and words that claim no more than the evidence."""

from __future__ import annotations

import pytest
from report_data import finding, make_data

from expunge.report import judge, row_verdict, summary
from expunge.report.verdict import MARKS, WORDS, method_verdict, tolerance
from expunge.report.words import headline, told

FORGET, KEEP, AUC = "accuracy/forget-test", "accuracy/retain-test", "membership/auc-loss"


def state(name, value, reference, direction="reference", **more):
    return judge(name, finding(value, reference, direction, **more)).state


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.10, "matches"), (0.12, "matches"), (0.121, "short"), (0.9, "short"),
        (0.08, "matches"), (0.079, "overshoot"), (0.0, "overshoot"),
    ],
)  # fmt: skip
def test_forget_accuracy_around_the_floor_of_two_percent(value, expected):
    assert state(FORGET, value, 0.10, original=0.95) == expected


def test_overshoot_is_named_a_leak_and_short_is_not():
    over = judge(FORGET, finding(0.5, 0.9, original=1.0)).sentence
    short = judge(FORGET, finding(0.95, 0.2, original=1.0)).sentence
    assert "forgets more than a model that never saw the data: a leak" in over
    assert "leak" not in short
    assert "0.500" in over
    assert "0.900" in over


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 0.02),
        ({"floor": 0.05}, 0.05),
        ({"low": 0.1, "high": 0.3}, 0.1),
        ({"floor": 0.15, "low": 0.1, "high": 0.3}, 0.15),
        ({"low": 0.19, "high": 0.21}, 0.02),
        ({"low": 0.1, "high": None}, 0.02),
    ],
)
def test_tolerance_is_the_largest_of_spread_half_interval_and_floor(more, expected):
    assert tolerance(FORGET, finding(0.2, 0.2, **more)) == pytest.approx(expected)
    assert tolerance(AUC, finding(0.6, 0.6, **more)) == pytest.approx(max(expected, 0.03))
    edge = finding(0.2 + expected, 0.2, original=1.0, **more)
    beyond = finding(0.2 + expected + 1e-4, 0.2, original=1.0, **more)
    assert (judge(FORGET, edge).state, judge(FORGET, beyond).state) == ("matches", "short")


def test_the_originals_side_decides_also_below_the_reference():
    """An attacker calls few samples of the original unseen: there low is memory, high a leak."""
    name = "membership/efficacy-svc"
    assert state(name, 0.3, 0.6, original=0.1) == "short"
    assert state(name, 0.9, 0.6, original=0.1) == "overshoot"
    assert state(name, 0.3, 0.6) == "short"


def test_without_a_difference_between_original_and_reference_the_meaning_decides():
    """More accurate on forgotten samples than the original is memory, not a leak."""
    assert state("accuracy/forget-train", 0.99, 0.93, original=0.925) == "short"
    assert state("accuracy/forget-train", 0.80, 0.93, original=0.935) == "overshoot"


@pytest.mark.parametrize(("value", "expected"), [(0.94, "matches"), (0.939, "lost"), (0.99, "matches")])  # fmt: skip
def test_kept_accuracy_below_the_reference_is_lost_above_is_fine(value, expected):
    assert state(KEEP, value, 0.96, original=0.97) == expected


def folded(raw, reference, original=0.7, **more):
    fold = lambda a: max(a, 1 - a)  # noqa: E731
    detail = {"auc": raw, "reference_auc": reference, "original_auc": original}
    return finding(fold(raw), fold(reference), original=fold(original), detail=detail, **more)


@pytest.mark.parametrize(
    ("raw", "reference", "expected"),
    [
        (0.53, 0.50, "matches"), (0.531, 0.50, "short"), (0.47, 0.50, "matches"),
        (0.469, 0.50, "overshoot"), (0.30, 0.50, "overshoot"), (0.65, 0.50, "short"),
        # folded both are 0.7, yet one looks like training data and the other like nothing else
        (0.30, 0.70, "overshoot"), (0.35, 0.10, "short"),
    ],
)  # fmt: skip
def test_the_raw_auc_tells_too_little_from_too_much(raw, reference, expected):
    assert judge(AUC, folded(raw, reference)).state == expected


def test_a_chance_auc_is_no_pass_where_retrained_models_are_told_apart():
    assert judge(AUC, folded(0.5, 0.8, original=0.95)).state == "overshoot"
    assert judge(AUC, folded(0.5, 0.2, original=0.6)).state == "short"


def test_a_two_sided_number_alone_has_no_side():
    judged = judge("membership/attack-accuracy", finding(0.8, 0.5, original=0.6))
    assert judged.state == "worse"
    assert "too little or too much" in judged.sentence
    assert state(AUC, 0.8, 0.5, original=0.6) == "worse"


def test_raw_interval_is_used_where_folding_halved_it():
    found = folded(0.44, 0.50, low=0.50, high=0.62)
    found["detail"] |= {"auc_low": 0.38, "auc_high": 0.50}
    assert tolerance(AUC, found) == pytest.approx(0.06)


@pytest.mark.parametrize(
    ("name", "value", "reference", "direction", "more", "expected"),
    [
        ("divergence/js-forget-train", 0.10, 0.08, "down", {}, "matches"),
        ("divergence/js-forget-train", 0.1001, 0.08, "down", {}, "worse"),
        ("divergence/js-forget-train", 0.12, 0.08, "down", {"floor": 0.12}, "matches"),
        ("divergence/js-forget-train", 0.121, 0.08, "down", {"floor": 0.12}, "worse"),
        ("divergence/js-forget-train", 0.0, 0.08, "down", {}, "matches"),
        ("cka/reference", 0.90, 0.95, "up", {}, "matches"),
        ("cka/reference", 0.89, 0.95, "up", {}, "worse"),
        ("cka/reference", 0.99, 0.95, "up", {}, "matches"),
        ("cka/original-retain", 0.99, 0.90, "reference", {"original": 1.0}, "matches"),
        ("cka/original-retain", 0.70, 0.90, "reference", {"original": 1.0}, "worse"),
        ("cka/original", 0.99, 0.70, "reference", {"original": 1.0}, "short"),
        ("cka/original", 0.40, 0.70, "reference", {"original": 1.0}, "overshoot"),
    ],
)
def test_distances_are_held_against_the_distance_among_references(
    name, value, reference, direction, more, expected
):
    assert state(name, value, reference, direction, **more) == expected


def test_weights_and_prices_are_no_forgetting():
    assert state("weight-distance/original", 0.01, 1.3, original=0.0) == "unjudged"
    assert state("weight-distance/reference", 1.5, 1.4, "down", floor=1.41) == "unjudged"
    assert state("cost/ratio", 0.1, 1.0, "down") == "unjudged"
    assert state("cost/ratio", 1.2, 1.0, "down") == "worse"
    assert state("cost/samples", 1000.0, None, "down") == "unjudged"


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_without_value_or_reference_there_is_no_verdict_but_a_reason(value):
    assert judge(FORGET, finding(value, 0.1, reason="no such split")) == ("unjudged", "no such split")  # fmt: skip
    alone = judge(FORGET, finding(0.1, value))
    assert alone.state == "unjudged"
    assert alone.sentence


def test_a_finding_of_a_third_party_with_an_unknown_side_is_only_different():
    assert state("extra/number", 3.0, 1.0) == "worse"
    assert state("extra/number", 3.0, 1.0, original=5.0) == "short"
    assert state("extra/number", 0.0, 1.0, original=5.0) == "overshoot"
    assert state("extra/number", 1.0, 1.0) == "matches"


def row(method="ssd", *, forget=0.0, keep=0.96, auc=0.5, guarantee="empirical", intent="removal", **more):  # fmt: skip
    findings = {
        FORGET: finding(forget, 0.0, original=0.97),
        KEEP: finding(keep, 0.96, original=0.97),
        AUC: folded(auc, 0.5),
    }
    return {
        "method": method, "seed": 0, "cost_ratio": 0.1, "intent": intent, "guarantee": guarantee,
        "findings": {k: v for k, v in findings.items() if v["value"] is not None} | more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "matches"),
        ({"forget": 0.4}, "short"),
        ({"auc": 0.7}, "short"),
        ({"auc": 0.3}, "overshoot"),
        ({"keep": 0.90}, "lost"),
        ({"keep": 0.90, "forget": 0.4}, "lost"),
    ],
)
def test_row_verdict(changes, expected):
    found, sentence = row_verdict(row(**changes))
    assert found == expected
    assert sentence


def test_lost_and_not_forgotten_are_both_said():
    assert "not forgotten either" in row_verdict(row(keep=0.9, forget=0.4)).sentence
    assert "over-forgotten too" in row_verdict(row(keep=0.9, auc=0.2)).sentence


@pytest.mark.parametrize("missing", ["forget", "retain"])
def test_half_the_evidence_is_no_verdict(missing):
    one = row()
    one["findings"] = {
        n: f for n, f in one["findings"].items() if missing not in n and not (missing == "forget" and n == AUC)
    }  # fmt: skip
    found = row_verdict(one)
    assert found.state == "unjudged"
    assert ("to be forgotten" if missing == "forget" else "to be kept") in found.sentence
    assert row_verdict({**one, "findings": {}}).state == "unjudged"


def test_no_reference_gives_the_reason():
    one = row()
    for found in one["findings"].values():
        found |= {"reference": None, "gap": None, "reason": "no retrained reference to compare with", "detail": {}}  # fmt: skip
    assert row_verdict(one) == ("unjudged", "no retrained reference to compare with")


def test_other_audits_qualify_a_match_without_turning_it():
    one = row(**{"divergence/js-forget-train": finding(0.4, 0.05, "down", floor=0.06)})
    found = row_verdict(one)
    assert found.state == "matches"
    assert "divergence/js-forget-train" in found.sentence
    sentences = summary({"rows": [one]})
    assert any("Seen more closely, ssd" in s and "0.4 against 0.05" in s for s in sentences)
    assert not any("Seen more closely" in s for s in summary({"rows": [row()]}))


@pytest.mark.parametrize("guarantee", ["empirical", None, "inference-time"])
def test_an_empirical_result_is_never_called_removed_or_proved(guarantee):
    words = " ".join([row_verdict(row(guarantee=guarantee)).sentence, *summary({"rows": [row(guarantee=guarantee)]})])  # fmt: skip
    assert "as far as these audits see" in words
    for claim in ("removed", "proved", "proven", "guarantee", "erased", "certified", "(exact)"):
        assert claim not in words.lower()


def test_the_claim_follows_the_evidence_class():
    assert "(exact)" in row_verdict(row(guarantee="exact")).sentence
    assert "stated conditions" in row_verdict(row(guarantee="certified")).sentence
    assert "may still hold" in row_verdict(row(intent="suppression")).sentence


def test_the_worst_seed_speaks_and_is_counted():
    good, bad = row(), row(forget=0.5)
    found = method_verdict([good, bad, good])
    assert found.state == "short"
    assert found.sentence.startswith("in 1 of 3 seeds: ")
    assert any("in 1 of 3 seeds" in s for s in summary({"rows": [good, bad, good]}))
    assert method_verdict([good, good]).state == "matches"


def test_summary_sorts_methods_by_outcome_and_names_the_price():
    rows = [
        row("good"), row("good2"), row("lazy", forget=0.4), row("loud", auc=0.2), row("broken", keep=0.5, forget=0.3),
    ]  # fmt: skip
    said = dict((s, t) for s, t in told({"rows": rows}) if s != "short" or "broken" not in t)  # noqa: C402
    assert said["matches"] == "good (0.1× the time of retraining) and good2 (0.1×) behave like a model retrained without the data, as far as these audits see."  # fmt: skip
    assert said["short"].startswith("lazy (0.1× the time of retraining) has not forgotten")
    assert said["overshoot"].startswith("loud")
    assert "a leak" in said["overshoot"]
    assert said["lost"].startswith("broken")
    assert "broken has not forgotten as retraining does either." in summary({"rows": rows})
    assert headline({"rows": rows}) == "2 of 5 behave like retraining: good and good2"


def test_summary_of_nothing():
    assert summary({"rows": []}) == ["No method was run."]
    only = make_data(1)["comparisons"][0]
    only["rows"] = [r for r in only["rows"] if r["method"] in ("original", "retrain")]
    assert summary(only)[-1] == "No method was run."
    assert headline(only) == "no method was run"


def test_every_state_has_a_word_and_a_shape_of_its_own():
    assert len(set(WORDS.values())) == len(set(MARKS.values())) == len(WORDS) == 6


def test_doing_nothing_is_never_said_to_behave_like_retraining():
    """Too few samples to tell the original from a retrained model are no evidence."""
    wide = {"value": 1.0, "reference": 0.8, "original": 1.0, "low": 0.4, "high": 1.0, "gap": 0.2}
    same = {
        "value": 0.97,
        "reference": 0.97,
        "original": 0.97,
        "low": 0.96,
        "high": 0.98,
        "gap": 0.0,
    }
    findings = {
        "accuracy/forget-train": {**wide, "direction": "reference", "floor": 0.1, "detail": {}},
        "accuracy/retain-test": {**same, "direction": "reference", "floor": 0.0, "detail": {}},
    }
    judged = row_verdict({"method": "idle", "findings": findings, "guarantee": "empirical"})
    assert judged.state == "unjudged"
    assert "cannot tell" in judged.sentence

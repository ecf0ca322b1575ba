from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from expunge.audits._efficacy import efficacy, efficacy_interval
from expunge.audits._intervals import wilson
from expunge.audits._members import attack_accuracy, best_threshold, histograms
from expunge.audits.membership import Membership
from expunge.core.data import Data
from expunge.core.errors import SettingError
from expunge.core.request import Request
from expunge.core.runtime import Runtime

FAST = Membership(scores=("loss",), attackers=("svc",), max_samples=100)


@pytest.fixture
def world(tables, margins):
    """Subjects of one world: random labels, log-odds of forget, retain and test by hand.

    `world(groups, groups, …)`: one subject a triple of functions or numbers (forget, retain, test).
    """

    def make(*models, forget=60, retain=200, test=200, seed=0, request=None, **more):
        rng = np.random.default_rng(seed)
        y, y_test = rng.integers(0, 2, forget + retain), rng.integers(0, 2, test)
        logits = []
        for means in models:
            odds = np.concatenate([
                rng.normal(mean, 1.0, n)
                for mean, n in zip(means, (forget, retain, test), strict=True)
            ])
            logits.append(margins([*y, *y_test], odds))
        request = request or Request(ids=tuple(range(forget)))
        return tables(y, y_test, request, *logits, **more)

    return make


def auc_loss(subjects, by_name, audit=FAST):
    return by_name(audit.run(subjects[1], subjects[2:], Runtime()))["membership/auc-loss"]


def test_exchangeable_samples_are_at_chance(world, by_name):
    covered = 0
    for seed in range(40):
        f = auc_loss(world((5, 5, 0), (0, 3, 0), seed=seed), by_name, replace(FAST, attackers=()))
        covered += f.low == 0.5
    assert covered >= 0.88 * 40


def test_planted_members_are_found(world, by_name):
    f = auc_loss(world((2, 2, 0), (2, 2, 0), (0, 2, 0), (0, 2, 0)), by_name)
    assert f.value == pytest.approx(0.92, abs=0.05)  # Φ(2/√2) of normals two apart
    assert f.low > 0.8
    assert f.reference < 0.6
    assert f.detail["auc"] > 0.5  # on the members' side


def test_both_sides_of_one_half_count_alike(world, by_name):
    above = auc_loss(world((0, 0, 0), (1.5, 1, 0)), by_name)
    below = auc_loss(world((0, 0, 0), (-1.5, 1, 0)), by_name)
    assert above.value == pytest.approx(below.value, abs=0.06)
    assert above.detail["auc"] > 0.8 > 0.2 > below.detail["auc"]
    assert below.low <= below.value <= below.high
    mirrored = 1 - below.detail["auc_high"], 1 - below.detail["auc_low"]
    assert (below.low, below.high) == pytest.approx(mirrored)


def test_a_retrained_model_is_like_its_references(world, by_name):
    subjects = world((4, 4, 0), (0, 4, 0), *[(0, 4, 0)] * 3)
    found = by_name(
        replace(FAST, attackers=("svc", "logistic")).run(subjects[1], subjects[2:], Runtime())
    )
    for name in ("auc-loss", "efficacy-svc", "efficacy-logistic", "attack-accuracy"):
        f = found[f"membership/{name}"]
        assert abs(f.gap) < 0.15, name
        assert abs(f.original - f.reference) > 0.25, name


def test_order_of_storage_changes_nothing(world, by_name):
    rng = np.random.default_rng(9)
    kwargs = {"seed": 3, "forget": 60, "retain": 200, "test": 200}
    models = ((2, 2, 0), (1, 2, 0), (0, 2, 0))
    plain = world(*models, **kwargs)
    mixed = world(*models, **kwargs, order=torch.from_numpy(rng.permutation(260)),
                  order_test=torch.from_numpy(rng.permutation(200)))  # fmt: skip
    a, b = (by_name(Membership().run(s[1], s[2:], Runtime())) for s in (plain, mixed))
    assert a == b


def test_findings_repeat_and_depend_on_the_seed_only_by_the_draw(world):
    subjects = world((2, 2, 0), (1, 2, 0))
    first, again = (Membership().run(subjects[1], [], Runtime(seed=1)) for _ in range(2))
    assert first == again


def test_efficacy_of_original_and_retrained_on_overfitted_scores(world, by_name):
    # members sit at log-odds 8, everything unseen at 0
    subjects = world((8, 8, 0), (0, 8, 0))
    before, after = (
        by_name(FAST.run(s, [], Runtime()))["membership/efficacy-svc"] for s in subjects
    )
    assert before.value < 0.03
    assert after.value > 0.95
    assert after.detail["attacker_accuracy"] > 0.95
    assert after.original == before.value


def test_efficacy_is_the_papers_attack_on_held_out_halves():
    rng = np.random.default_rng(0)
    member, outside, forget = rng.beta(8, 1, 80), rng.beta(2, 1, 80), rng.beta(4, 1, 50)
    called, accuracy = efficacy("svc", member, outside, forget)
    svc = SVC(C=3, gamma=1.0, kernel="rbf").fit(
        np.r_[member[::2], outside[::2]][:, None], [1] * 40 + [0] * 40
    )
    assert called.tolist() == (svc.predict(forget[:, None]) == 0).tolist()
    right = (svc.predict(member[1::2, None]) == 1).sum() + (
        svc.predict(outside[1::2, None]) == 0
    ).sum()
    assert accuracy == right / 80


def test_the_interval_of_an_efficacy_knows_that_the_attacker_could_have_seen_others():
    """Two worlds drawn alike: the interval of one holds the share of the other nearly as often as it says."""

    def world(rng):
        return rng.normal(1, 1, 40), rng.normal(0, 1, 40), rng.normal(0.5, 1, 1000)

    inside = alone = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = world(rng)
        p = float(efficacy("logistic", *scores)[0].mean())
        low, high = efficacy_interval("logistic", *scores, p, torch.Generator().manual_seed(seed))
        truth = np.mean([efficacy("logistic", *world(rng))[0].mean() for _ in range(10)])
        inside += low <= truth <= high
        alone += wilson(round(1000 * p), 1000)[0] <= truth <= wilson(round(1000 * p), 1000)[1]
        assert low <= p <= high
    assert inside >= 35 > 20 >= alone, (inside, alone)


def test_held_out_accuracy_shows_that_there_is_nothing_to_learn():
    rng = np.random.default_rng(1)
    got = [efficacy("svc", *rng.random((2, 200)), rng.random(20))[1] for _ in range(20)]
    assert np.mean(got) == pytest.approx(0.5, abs=0.04)


def test_matched_nonmembers_have_the_forget_sets_classes(tables, margins, by_name):
    # class 0 is easy and class 1 hard for any model: unmatched non-members see a difference
    y, y_test = [0] * 80 + [1] * 20 + [0, 1] * 100, [0, 1] * 100
    rng = np.random.default_rng(0)
    odds = rng.normal(np.where(np.array([*y, *y_test]) == 0, 3.0, 0.0), 1.0)
    logits = margins([*y, *y_test], odds)
    subjects = tables(y, y_test, Request(ids=tuple(range(100))), logits, logits)
    matched = auc_loss(subjects, by_name)
    shifted = auc_loss(subjects, by_name, replace(FAST, nonmembers="test"))
    assert matched.low == 0.5
    assert shifted.low > 0.55
    assert "125 test samples" in matched.detail["nonmembers"]  # 100 of class 0, 25 of class 1
    assert shifted.detail["nonmembers"] == "all test samples"


def test_nonmembers_of_a_class_request_are_the_class(tables, margins, by_name):
    y, y_test = [0, 1] * 60, [0, 1] * 30
    odds = np.where(np.array([*y, *y_test]) == 1, 5.0, 0.0) + np.arange(180) * 1e-3
    logits = margins([*y, *y_test], odds)
    subjects = tables(y, y_test, Request(label=1), logits, logits)
    f = auc_loss(subjects, by_name)
    assert "30 test samples" in f.detail["nonmembers"]
    # all forget-test scores are a little above all forget-train scores; other classes lie far below
    assert f.detail["auc"] == 0.0
    assert f.value == 1.0


def test_reasons(world, tables, margins, by_name):
    def reason(subjects, name, audit=FAST):
        f = by_name(audit.run(subjects[0], subjects[1:], Runtime()))[f"membership/{name}"]
        assert f.value is None
        return f.reason

    assert "only 3 samples to forget" in reason(world((1, 1, 1), forget=3), "auc-loss")
    assert "only 3 samples to forget" in reason(world((1, 1, 1), forget=3), "attack-accuracy")
    assert "test samples match" in reason(world((1, 1, 1), test=6, seed=1), "auc-loss")
    assert "a side" in reason(world((1, 1, 1), test=12), "efficacy-svc")
    assert reason(tables([0, 1] * 20, None, Request(label=1), torch.eye(2).repeat(20, 1)), "efficacy-svc") == "there is no test data"  # fmt: skip
    lacking = tables([0, 1] * 20, [0] * 30, Request(ids=tuple(range(20))), torch.ones(70, 2))
    assert "no sample of class 1" in reason(lacking, "auc-loss")
    broken = world((1, 1, 1), (np.nan, 1, 1))
    assert "NaN" in reason(broken[::-1], "auc-loss")
    assert "NaN" in reason(broken[::-1], "efficacy-svc")
    unlabelled = world((1, 1, 1))
    unlabelled[0].problem.test = Data(torch.arange(260.0, 460)[:, None])
    assert reason(unlabelled, "auc-loss") == "the test data has no labels"


def test_a_single_forgotten_sample_still_has_an_efficacy(world, by_name):
    (subject,) = world((8, 8, 0), forget=1)
    f = by_name(FAST.run(subject, [], Runtime()))["membership/efficacy-svc"]
    assert f.value == 0.0
    assert f.high > 0.7


def test_saturated_outputs(tables, by_name):
    sign = torch.from_numpy(np.random.default_rng(0).choice([-1e4, 1e4], (300, 2))).float()
    y = [0, 1] * 75
    subjects = tables(y, y, Request(ids=tuple(range(50))), sign, sign)
    for f in Membership().run(subjects[0], subjects[1:], Runtime()):
        assert f.value is not None and np.isfinite([f.value, f.low, f.high]).all(), f.name
        assert 0 <= f.low <= f.value <= f.high <= 1
        assert np.isfinite(f.detail.get("histogram", {"edges": [0]})["edges"]).all()


def test_unknown_scores_and_attackers_are_refused():
    with pytest.raises(SettingError, match="margin"):
        Membership(scores=("margin",))
    with pytest.raises(SettingError, match="forest"):
        Membership(attackers=("forest",))


def test_attack_accuracy_is_at_chance_and_finds_what_is_there():
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    at_chance = [attack_accuracy(*rng.random((2, 60)), generator) for _ in range(40)]
    assert np.mean([a for a, _, _ in at_chance]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([low <= 0.5 <= high for _, low, high in at_chance]) >= 0.9
    found, low, _ = attack_accuracy(rng.normal(0, 1, 60), rng.normal(3, 1, 300), generator)
    assert found == pytest.approx(0.93, abs=0.05)  # Φ(3/2)
    assert low > 0.5
    # clipped: one loss of 1e30 would otherwise decide the fit
    losses = np.r_[rng.normal(0, 1, 59), 1e30]
    assert attack_accuracy(losses, rng.normal(3, 1, 60), generator)[0] > 0.8


def test_best_threshold_and_histograms_by_hand():
    assert best_threshold(np.array([3.0, 4.0, 5.0]), np.array([0.0, 1.0])) == 2.0
    assert best_threshold(np.array([0.0, 1.0]), np.array([3.0, 4.0, 5.0])) == 2.0
    assert best_threshold(np.array([1.0]), np.array([1.0])) == 1.0
    groups = {"forget": np.linspace(0, 1, 50), "retain": np.full(20, 1.0), "nonmember": np.zeros(9)}
    shown = histograms(groups, bins=4)
    assert len(shown["edges"]) == 5
    assert all(sum(shown[g]) == pytest.approx(1.0) for g in groups)
    assert shown["retain"][-1] == 1.0
    assert shown["nonmember"][0] == 1.0
    flat = histograms({"a": np.full(5, 1e9)}, bins=4)
    assert sum(flat["a"]) == 1.0
    assert (np.diff(flat["edges"]) > 0).all()

"""memorised-fraction: what it says of models whose memory is set by hand; what cannot be said."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import expunge as xp
from expunge.audits._calibration import CLIP, by_halves, by_references, log_odds
from expunge.audits.memorised_fraction import LONELY, WHATS, MemorisedFraction
from expunge.core.audit import Subject
from expunge.core.request import Request
from expunge.core.runtime import Runtime

FORGET, KEPT, UNSEEN = 160, 40, 200
Y = torch.arange(FORGET + KEPT) % 2
Y_TEST = torch.arange(UNSEEN) % 2
QUICK = {"resamples": 20, "injections": 10}
MEMORY = 2.5
"""By how much the log-odds of a memorised record are higher."""


def case(tables, margins, some_ids, fractions, *, references=3, memory=MEMORY, forget=FORGET):
    """The original and a model for each fraction of the forget set that it has memorised, then references."""
    labels = torch.cat([Y, Y_TEST])
    hard = torch.randn(len(labels), generator=torch.Generator().manual_seed(0))

    def odds(seed, fraction, kept=True):
        generator = torch.Generator().manual_seed(seed)
        found = 1 + hard + 0.4 * torch.randn(len(labels), generator=generator)
        chosen = torch.randperm(FORGET, generator=generator)[: round(fraction * FORGET)]
        found[chosen] += memory * (0.6 + 0.8 * torch.rand(len(chosen), generator=generator))
        found[FORGET : FORGET + KEPT] += memory * kept
        return margins(labels, found)

    logits = [odds(1, 1.0), *(odds(2 + k, f) for k, f in enumerate(fractions))]
    logits += [odds(100 + k, 0.0) for k in range(references)]
    return tables(Y, Y_TEST, some_ids(forget), *logits)


def run(subjects, at=1, references=3, **settings):
    audit = MemorisedFraction(**QUICK | settings)
    found = audit.run(subjects[at], subjects[len(subjects) - references :], Runtime())
    return {f.name.split("/")[1]: f for f in found}


@pytest.fixture
def made(tables, margins, some_ids):
    return lambda *fractions, **more: case(tables, margins, some_ids, fractions, **more)


def test_an_untouched_model_has_memorised_all_and_a_retrained_one_little(made):
    subjects = made(0.0)
    untouched, retrained = run(subjects, 0), run(subjects)
    assert untouched["estimate"].value > 0.97 and untouched["limit"].value == 1.0
    assert retrained["limit"].value < 0.1 and retrained["estimate"].value < 0.05
    assert retrained["limit"].original == 1.0
    assert abs(retrained["limit"].gap) < 0.05 and retrained["limit"].floor is not None
    assert set(retrained) == set(WHATS)


def test_the_estimate_follows_the_truth_and_the_limit_covers_it(made):
    subjects = made(0.1, 0.3, 0.6)
    found = [run(subjects, k) for k in (1, 2, 3)]
    for truth, f in zip((0.1, 0.3, 0.6), found, strict=True):
        limit, estimate = f["limit"], f["estimate"]
        assert truth <= limit.value and abs(estimate.value - truth) < 0.12
        assert estimate.low <= estimate.value <= limit.value <= estimate.high
        assert limit.low <= limit.value <= limit.high
        assert f["limit-shifted"].value >= f["estimate-shifted"].value
        assert f["self-test"].value > 0.8 and f["self-test"].direction == "up"
    values = [f["estimate"].value for f in found]
    assert values == sorted(values)


def test_the_posterior_finds_the_memorised_records(made):
    subjects = made(0.3)
    found = run(subjects)["estimate"]
    posterior = found.per_sample["posterior"]
    generator = torch.Generator().manual_seed(2)
    torch.randn(FORGET + KEPT + UNSEEN, generator=generator)
    chosen = torch.randperm(FORGET, generator=generator)[:48].numpy()
    rest = np.setdiff1d(np.arange(FORGET), chosen)
    assert len(posterior) == FORGET
    assert posterior[chosen].mean() > 0.8 and posterior[rest].mean() < 0.15


def test_the_limit_is_no_lower_than_the_plain_one(made):
    limit = run(made(0.3))["limit"]
    assert limit.detail["plain_limit"] <= limit.value + 1e-3
    assert limit.detail["threshold"] >= 2.71
    assert limit.detail["plain_limit"] < limit.detail["paper_limit"]
    profile = limit.detail["profile"]
    assert len(profile["fraction"]) == len(profile["ts"]) == 41 and min(profile["ts"]) >= 0
    assert {r["model"] for r in limit.detail["rivals"]} == {"none", "prior", "covariate", "both"}


def test_counting_above_a_threshold_would_not_do(made):
    found = run(made(0.0, memory=1.0))
    assert found["limit"].detail["classify_and_count"] > 0.1
    assert found["estimate"].value < 0.08


def test_forgetting_too_much_is_seen(made):
    plain, over = made(0.0), made(0.0)
    with torch.no_grad():  # forgotten records are pushed below those never seen
        rows = over[1].model.rows[:FORGET]
        rows[torch.arange(FORGET), Y[:FORGET]] -= 3.0
    fair, pushed = run(plain)["erased"], run(over)["erased"]
    assert fair.low < 0.06 and fair.value < 0.12 and fair.reference < 0.12
    assert pushed.low > 0.7 and len(pushed.per_sample["erased"]) == FORGET


def test_members_like_non_members_are_not_identifiable(made):
    """The original remembers nothing: whatever the share, the scores are the same."""
    found = run(made(0.0, memory=0.0))
    assert found["limit"].value == 1.0
    assert "not identifiable" in found["limit"].reason
    assert found["estimate"].value is None and "not identifiable" in found["estimate"].reason


def test_calibration_makes_the_limit_sharper(made):
    with_references, without = run(made(0.1)), run(made(0.1, references=0), references=0)
    assert without["limit"].reference is None
    assert "no retrained reference" in without["limit"].reason
    assert "none" in without["limit"].detail["calibration"]
    assert with_references["limit"].value < without["limit"].value


def test_one_reference_calibrates_but_has_nobody_to_stand_beside(made):
    found = run(made(0.1, references=1), references=1)["limit"]
    assert found.value >= 0.1 and found.reference is None
    assert found.reason == LONELY and "1 retrained" in found.detail["calibration"]


def test_few_records_are_said_to_be_few(made):
    found = run(made(0.0, forget=60))
    assert "only 60 records" in found["limit"].reason and found["limit"].value is not None
    tiny = run(made(0.0, forget=6))
    assert all(f.value is None and "only 6 samples" in f.reason for f in tiny.values())


def test_strata_may_be_labels_or_none(made):
    subjects = made(0.3)
    for strata, parts in (("none", 1), ("class", 2), ("difficulty", 2)):
        found = run(subjects, strata=strata)
        assert len(found["limit"].detail["nonmember_records"]) == parts
        assert abs(found["estimate"].value - 0.3) < 0.12


def test_the_same_every_time(made):
    subjects = made(0.2)
    one, other = run(subjects), run(subjects)
    assert [f.value for f in one.values()] == [f.value for f in other.values()]
    assert one["limit"].low == other["limit"].low


def test_constant_scores_are_no_evidence(tables, some_ids):
    same = torch.zeros(FORGET + KEPT + UNSEEN, 2)
    found = run(tables(Y, Y_TEST, some_ids(FORGET), *[same] * 5))
    assert all(f.value is None and "equal" in f.reason for f in found.values())


def test_one_class_is_no_evidence(tables, some_ids):
    y, rows = torch.zeros_like(Y), torch.randn(FORGET + KEPT + UNSEEN, 1)
    found = run(tables(y, torch.zeros_like(Y_TEST), some_ids(FORGET), *[rows] * 5))
    assert all(f.value is None and "one class" in f.reason for f in found.values())


def test_records_to_forget_among_the_unseen_are_refused():
    x, y = torch.randn(80, 4), torch.arange(80) % 2
    test = (torch.cat([x[:30], torch.randn(50, 4)]), torch.cat([y[:30], torch.arange(50) % 2]))
    p = xp.Classification(torch.nn.Linear(4, 2), (x, y), test)
    s = Subject(p.model, p, Request(ids=tuple(range(40))), Runtime())
    found = MemorisedFraction(nonmembers="test", **QUICK).run(s, [], Runtime())
    assert all(
        f.value is None and "30 of the test samples are among the samples to forget" in f.reason
        for f in found
    )


def test_without_test_data_or_with_nan_there_is_a_reason(tables, made):
    y = torch.arange(60) % 2
    (s,) = tables(y, None, Request(ids=tuple(range(30))), torch.randn(60, 2))
    found = MemorisedFraction(**QUICK).run(s, [], Runtime())
    assert all(f.value is None and "no test data" in f.reason for f in found)
    broken = made(0.0)
    broken[1].model.rows.data[FORGET + KEPT] = math.nan
    assert all(f.value is None and "NaN" in f.reason for f in run(broken).values())


def test_log_odds_are_clipped_without_a_spike(tables, some_ids, margins):
    y = torch.arange(40) % 2
    odds = torch.cat([torch.full((30,), 40.0), torch.linspace(-3, 3, 10)])
    (s,) = tables(y, None, some_ids(39), margins(y, odds))
    found = log_odds(s, "forget-train", Runtime())
    assert (
        found.max() <= CLIP and len(np.unique(found[:30])) == 30 and found[:30].min() > CLIP - 0.2
    )
    np.testing.assert_allclose(found[30:], odds[30:39], atol=1e-5)


def test_kept_records_are_not_calibrated_by_references(made):
    subjects = made(0.0)
    with pytest.raises(AssertionError):
        by_references(subjects[-2:], Runtime()).scores(subjects[0], "retain-train")


def small_problem():
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    train = xp.Data((x[:80], y[:80]))
    recipe = xp.ClassifierRecipe(lambda: torch.nn.Linear(6, 2), train, epochs=2, batch_size=16)
    problem = xp.Classification(recipe(train.ids, 0), train, (x[80:], y[80:]), recipe=recipe)
    return Subject(problem.model, problem, Request(ids=tuple(range(20))), Runtime(threads=1))


def test_kept_records_are_calibrated_by_models_of_the_other_half(monkeypatch):
    import expunge.audits._calibration as calibration

    given = []
    real = calibration.train_many

    def spy(problem, keeps, *rest):
        given.extend(keeps)
        return real(problem, keeps, *rest)

    monkeypatch.setattr(calibration, "train_many", spy)
    s = small_problem()
    found = by_halves(s, 4, Runtime(threads=1))
    assert len(given) == 4 and not set(given[0].tolist()) & set(given[2].tolist())
    assert torch.cat([given[0], given[2]]).sort().values.tolist() == list(range(20, 80))
    models = list(real(s.problem, given, [Runtime().seed_for("halves", k, j) for k in (0, 1) for j in (0, 1)], Runtime(threads=1), "again"))  # fmt: skip
    others = [log_odds(Subject(m, s.problem, s.request, Runtime()), "retain-train", Runtime()) for m in models]  # fmt: skip
    first = torch.isin(s.splits["retain-train"], given[0]).numpy()
    wanted = np.where(first, np.mean(others[2:], 0), np.mean(others[:2], 0))
    np.testing.assert_allclose(found.means(s, "retain-train"), wanted, atol=1e-5)
    other = Subject(models[0], s.problem, s.request, Runtime())
    again = by_halves(other, 4, Runtime(threads=1))
    np.testing.assert_array_equal(again.means(s, "retain-train"), found.means(s, "retain-train"))
    assert len(given) == 4, "the models of a request serve every subject"
    by_halves(Subject(s.model, s.problem, Request(ids=(0, 1)), Runtime()), 4, Runtime(threads=1))
    assert len(given) == 8, "those of another request are others"
    by_halves(Subject(s.model, s.problem.about(s.model), s.request, Runtime()), 4, Runtime())
    assert len(given) == 12, "nothing is taken from another problem"


def test_members_may_be_kept_records():
    s = small_problem()
    found = MemorisedFraction(members="retain", **QUICK).run(s, [], Runtime(threads=1))
    limit = next(f for f in found if f.name.endswith("/limit"))
    assert "halves" in limit.detail["calibration"] and 0 <= limit.value <= 1

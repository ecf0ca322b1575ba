"""The invariants of the card mufac, and the audit on models that are tables of losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from expunge.audits._intervals import effective_interval
from expunge.audits._nomus import (
    Measured,
    _attacker,
    _both,
    _logistic,
    _parts,
    _weighted,
    attack,
    attack_interval,
    nomus,
    nomus_interval,
    share,
    split_by_split,
)
from expunge.audits.nomus import NoMUS
from expunge.core.audit import Subject
from expunge.core.data import Data
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification
from expunge.problems.multi_label import MultiLabel
from expunge.report.verdict import judge

EACH = 12
"""Samples of a person."""


def losses(seed, people=20, at=1.0, own=0.3):
    """Losses of some people, who differ among each other by `own`."""
    random = np.random.default_rng(seed)
    level = np.repeat(random.normal(at, own, people), EACH)
    return (level + random.normal(0, 1, len(level))).clip(0.02, None)


def owners(people=20, first=0):
    return np.repeat(np.arange(first, first + people), EACH)


class Table(nn.Module):
    """Two-class logits whose loss for class 1 is given, by sample."""

    def __init__(self, values):
        super().__init__()
        odds = -np.log(np.expm1(np.asarray(values)))
        self.odds = nn.Parameter(torch.as_tensor(odds).float())

    def forward(self, x):
        odds = self.odds[x[:, 0].long()]
        return torch.stack([torch.zeros_like(odds), odds], 1)


def world(forget=20, retain=10, unseen=20, test=10, owner="identity"):
    """A problem over people 0, 1, …: to forget, retained, unseen, tested on; all of class 1."""
    n, m = (forget + retain) * EACH, (unseen + test) * EACH
    x = torch.arange(n + m).float()[:, None]
    people = owners(forget + retain + unseen + test)
    train = Data((x[:n], torch.ones(n).long()), columns={owner: people[:n]})
    mark = [1] * (unseen * EACH) + [0] * (test * EACH)
    held = Data((x[n:], torch.ones(m).long()), columns={owner: people[n:], "unseen": mark})
    request = Request(ids=tuple(range(forget * EACH)))
    return Classification(Table(np.full(n + m, 0.7)), train, held), request


def table(forget, unseen, problem, test=0.3):
    """A model with these losses of the forgotten and the unseen; 0.05 on the retained, `test` on the tested."""
    n, m = len(problem.train), len(problem.test)
    rest = np.full(n - len(forget), 0.05)
    return Table(np.concatenate([forget, rest, unseen, np.full(m - len(unseen), test)]))


def audited(model, references=(), settings=None, made=None):
    problem, request = made or world()
    subjects = [Subject(m, problem, request, Runtime()) for m in (model, *references)]
    found = NoMUS(**settings or {}).run(subjects[0], subjects[1:], Runtime())
    return {f.name.removeprefix("nomus/"): f for f in found}


# ------------------------------------------------------------------ the card's invariants


def test_mufac_invariant_1_closed_form():
    assert nomus(1, 0.5) == 1 and nomus(0, 1) == 0 and nomus(0, 0) == 0
    for m in (0.5, 0.61, 0.8, 1.0):
        assert nomus(0.4, m) == pytest.approx(nomus(0.4, 1 - m))
    for weight in (0.5, 0.2):
        assert nomus(0.9, 0.7, weight) - nomus(0.4, 0.7, weight) == pytest.approx(weight * 0.5)
    assert nomus(0.5951, 0.5 + 0.2136) == pytest.approx(0.5839, abs=1e-4)
    assert nomus(0.4048, 0.5 - 0.0485) == pytest.approx(0.6539, abs=1e-4)


def test_mufac_invariant_3_equal_shifted_and_rescaled_losses():
    n = 400
    found = []
    for seed in range(20):
        random = np.random.default_rng(seed)
        found.append(attack(random.exponential(1, n), random.exponential(1, n)))
    sigma = np.sqrt(0.25 / (0.2 * n))  # of one of the ten held-out parts
    assert np.mean(np.abs(np.asarray(found) - 0.5) < 2 * sigma) >= 0.95
    assert abs(np.mean(found) - 0.5) < 0.02
    a, b = losses(1), losses(2)
    assert attack(a, b + 50) == 1 and attack(a + 50, b) == 1
    part = attack(a, b + 0.7)
    assert 0.5 < part < 0.9
    for scale, shift in ((3, 7), (1e-3, 0), (1e3, -5)):
        assert attack(scale * a + shift, scale * (b + 0.7) + shift) == pytest.approx(part, abs=1e-9)
    raw = [attack(s * a, s * (b + 0.7), standardise=False) for s in (1.0, 1e-3)]
    assert raw[0] != raw[1], "the published attack is the same, so the deviation has no ground"


def test_mufac_invariant_4_the_model_is_looked_at_as_it_predicts():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(360, 4, generator=generator)
    x[:120] = x[:120] * 3 + 2  # their statistics are not those of a batch
    y = torch.randint(0, 2, (360,), generator=generator)
    train = Data((x[:200], y[:200]), columns={"identity": np.arange(200) // 10})
    mark = [1] * 100 + [0] * 60
    test = Data((x[200:], y[200:]), columns={"identity": 99 + np.arange(160) // 10, "unseen": mark})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model.train()(x)
    made = Classification(model, train, test), Request(identity=tuple(range(10)))

    def values(m):
        return [f.value for f in audited(m, made=made).values()]

    first = values(model.eval())
    assert values(model.train()) == first and values(model.eval()) == first
    forget, unseen = train.fetch(torch.arange(100)), test.fetch(torch.arange(100))
    found = []
    for mode in (False, True):
        with torch.no_grad():
            each = [made[0].each_loss(model.train(mode), b).numpy() for b in (forget, unseen)]
        found.append(attack(*each))
    assert found[0] != found[1], "batch norm does the same in both modes here"


def test_mufac_invariant_5_a_constant_answer():
    for sizes in ((20, 20), (7, 9), (33, 5)):
        made = world(forget=sizes[0], unseen=sizes[1])
        model = Table(np.full(len(made[0].train) + len(made[0].test), np.log(2)))
        found = audited(model, [model], made=made)
        assert set(found) == {"score", "mia", "accuracy-retain-test"}
        assert found["mia"].value == found["mia"].detail["mia"] == 0.5
        acc = found["accuracy-retain-test"].value
        assert found["score"].value == pytest.approx(0.5 * acc + 0.5)
        assert (found["mia"].low, found["mia"].high) == (0.5, 0.5)


def test_the_score_never_stands_alone():
    problem, _ = made = world()
    found = audited(table(losses(0) * 0.1, losses(1), problem), made=made)
    score = found["score"]
    assert score.value == nomus(score.detail["accuracy"], score.detail["mia"])
    assert score.detail["accuracy"] == found["accuracy-retain-test"].value
    assert score.detail["mia"] == found["mia"].detail["mia"]
    assert score.detail["same_answer"] == 1.0  # one class, so one answer is always right
    assert "two parts" in judge("nomus/score", {"value": 0.6, "reference": 0.7, "direction": "up"}).sentence  # fmt: skip


# ------------------------------------------------------------------ what it must find


def test_a_retrained_model_is_the_floor():
    problem, _ = made = world()
    theirs = [table(losses(s), losses(s + 50, at=1.4), problem) for s in (1, 2)]
    mine = table(losses(5), losses(6, at=1.4), problem)
    found = audited(mine, theirs, made=made)["mia"]
    assert found.reference > 0.53 and found.floor is not None
    assert found.low <= found.value <= found.high
    assert judge(found.name, vars(found)).state == "matches"


def test_remembered_people_are_found_and_erased_ones_too():
    problem, _ = made = world()
    plain = [table(losses(s), losses(s + 50), problem) for s in (1, 2)]
    problem.model.odds.data = table(losses(3) * 0.05, losses(4), problem).odds.data
    kept = audited(table(losses(3) * 0.05, losses(4), problem), plain, made=made)["mia"]
    assert kept.value > 0.8 and kept.detail["lower_losses"] == "forget"
    assert judge(kept.name, vars(kept)).state == "short"
    erased = audited(table(losses(3) + 4, losses(4), problem), plain, made=made)["mia"]
    assert erased.value > 0.8 and erased.detail["lower_losses"] == "unseen"
    assert erased.detail["auc"] < 0.2 < 0.5 < kept.detail["auc"]
    assert judge(erased.name, vars(erased)).state == "overshoot"


def test_lost_accuracy_is_said():
    problem, _ = made = world()
    good, bad = (table(losses(1), losses(2), problem, test=t) for t in (0.3, 2.0))
    found = audited(bad, [good], made=made)["accuracy-retain-test"]
    assert (found.value, found.reference) == (0, 1)
    assert judge(found.name, vars(found)).state == "lost"


def test_intervals_are_over_people():
    forget, unseen = losses(1, own=1.0), losses(2, own=1.0)
    people = attack_interval(forget, unseen, (owners(), owners()))
    alone = np.arange(len(forget))
    single = attack_interval(forget, unseen, (alone, alone))
    assert people.value == single.value == attack(forget, unseen)
    assert people.high - people.low > 1.3 * (single.high - single.low)
    problem, request = world()
    named = audited(table(forget, unseen, problem), made=(problem, request))["mia"]
    assert named.detail["units"] == "people" and named.detail["also_retained"] == 0
    made = world(owner="someone")  # a column nobody asks for
    assert audited(table(forget, unseen, problem), made=made)["mia"].detail["units"] == "samples"
    found = audited(table(forget, unseen, problem), settings={"identity": "someone"}, made=made)["mia"]  # fmt: skip
    assert found.detail["units"] == "people"
    assert (found.low, found.high) == (named.low, named.high)


def test_intervals_cover_chance_where_people_are_alike():
    """Also that of the score, whose forgetting is then at its largest; tests/acceptance has other truths."""
    inside, score = 0, 0
    for seed in range(60):
        forget, unseen = (losses(1000 + 2 * seed + i, own=0.5) for i in range(2))
        found = attack_interval(forget, unseen, (owners(), owners()))
        inside += found.low <= 0.5 <= found.high
        right = (np.random.default_rng(seed).random(240) < 0.7).astype(float)
        whole = nomus_interval(share(right, owners()), found)
        score += whole.low <= nomus(0.7, 0.5) <= whole.high
    assert min(inside, score) >= 56, (inside, score)


def test_the_jackknife_fits_the_attack_that_is_asked():
    """Its fits are scikit-learn's, and its variance that of leaving a person out by hand."""
    forget, unseen = losses(1, own=0.5, people=6), losses(2, own=0.5, people=6, at=1.6)
    x, y = _both(forget, unseen)
    for standardise in (True, False):
        model = _attacker(standardise).fit(x, y)
        whole = np.full((1, len(y)), 1 / len(forget))
        found = _weighted(x[:, 0], y, whole, standardise)[0]
        assert found == pytest.approx((model.predict(x) == y).mean())
    signs, weights = 2.0 * y - 1, np.ones((1, len(y)))
    w, b = _logistic(x.T, signs, weights)
    fitted = LogisticRegression(tol=1e-8).fit(x, y)
    assert (w[0], b[0]) == pytest.approx((fitted.coef_[0, 0], fitted.intercept_[0]), abs=1e-4)

    each = split_by_split(forget, unseen)
    variance = each.var(ddof=1) / 10
    for side in (0, 1):
        left = []
        for person in range(6):
            kept = [np.ones(72, bool), np.ones(72, bool)]
            kept[side] = owners(6) != person
            x, y = np.concatenate([forget[kept[0]], unseen[kept[1]]])[:, None], np.repeat([1, 0], [kept[0].sum(), kept[1].sum()])  # fmt: skip
            scaled = StandardScaler().fit(x, sample_weight=_equal(y)).transform(x)
            model = LogisticRegression(tol=1e-8).fit(scaled, y, sample_weight=_equal(y))
            right = model.predict(scaled) == y
            left.append((right[y == 1].mean() + right[y == 0].mean()) / 2)
        variance += 5 * np.var(left)
    found = attack_interval(forget, unseen, (owners(6), owners(6)))
    wanted = effective_interval(each.mean(), variance, 5, 6)
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-6)


def _equal(y):
    """Weights that keep both sides equal and as many as there are samples in all."""
    return np.where(y == 1, 1 / (y == 1).sum(), 1 / (y == 0).sum()) * len(y) / 2


def test_shares_near_their_ends_have_intervals():
    assert effective_interval(1.0, 0.0, 19, 20) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
    assert effective_interval(0.0, 0.0, 19, 20) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    low, high = effective_interval(0.98, 0.01**2, 19, 20)
    assert high < 1 and 0.98 - low > 2.2 * 0.01 > high - 0.98  # wider on the inner side
    wide = effective_interval(0.5, 0.01**2, 4, 5), effective_interval(0.5, 0.01**2, 400, 401)
    assert wide[0][1] - wide[0][0] > 1.3 * (wide[1][1] - wide[1][0])


def test_many_people_are_left_out_several_at_a_time():
    forget, unseen = losses(1, people=120), losses(2, people=120, at=1.3)
    assert len(np.unique(_parts(owners(120)))) == 50
    assert all(len(np.unique(_parts(owners(120))[owners(120) == p])) == 1 for p in (0, 7, 119))
    found = attack_interval(forget, unseen, (owners(120), owners(120)))
    assert 0.02 < found.high - found.low < 0.12


def test_intervals_know_that_not_everything_is_held_out():
    """Ten tenths leave some samples out and take others twice: M varies more than over all samples."""
    alone, found, halves = np.arange(150), [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        sides = random.normal(1, 1, 150), random.normal(1.8, 1, 150)
        one = attack_interval(*sides, (alone, alone))
        found.append(one.value)
        halves.append((one.high - one.low) / 2)
    assert np.mean(halves) > 1.75 * np.std(found, ddof=1)
    assert np.mean(np.abs(np.asarray(found) - np.mean(found)) <= halves) >= 0.9


def test_the_score_s_interval_is_made_of_its_parts():
    accuracy = Measured(0.6, 0.5, 0.7)
    alone = nomus_interval(accuracy, Measured(0.5, 0.5, 0.5))
    assert (alone.low, alone.high) == pytest.approx((0.75, 0.85))
    sided = nomus_interval(Measured(0.6, 0.6, 0.6), Measured(0.7, 0.6, 0.8))
    assert (sided.low, sided.value, sided.high) == pytest.approx((0.5, 0.6, 0.7))
    across = nomus_interval(Measured(0.6, 0.6, 0.6), Measured(0.55, 0.45, 0.65))
    assert across.low == pytest.approx(0.65)
    assert across.high == pytest.approx(0.85)  # a half may be missed on either side


def test_sides_of_any_size_have_chance_at_a_half():
    for sizes in ((30, 5), (5, 30)):
        made = world(forget=sizes[0], unseen=sizes[1])
        found = []
        for seed in range(12):
            forget, unseen = losses(2 * seed, sizes[0]), losses(2 * seed + 1, sizes[1])
            one = audited(table(forget, unseen, made[0]), made=made)["mia"]
            assert one.detail["attacked"] == 10 * EACH
            found.append(one.detail["mia"])
        assert abs(np.mean(found) - 0.5) < 0.06


def test_several_questions_are_answered_in_part():
    n = 60
    x = torch.arange(2 * n).float()[:, None]
    y = torch.arange(2 * n) % 8
    bits = (y[:, None] >> torch.arange(3)) & 1

    class Answers(nn.Module):
        def __init__(self, said):
            super().__init__()
            self.logits = nn.Parameter(said)

        def forward(self, x):
            return self.logits[x[:, 0].long()]

    right = (2.0 * bits - 1) * 3
    wrong = right.clone()
    wrong[:, 1] *= -1  # one of three questions
    train = Data((x[:n], y[:n]), columns={"identity": np.arange(n) // 6})
    mark = (np.arange(n) < 30).astype(int)
    test = Data((x[n:], y[n:]), columns={"identity": 50 + np.arange(n) // 6, "unseen": mark})
    made = MultiLabel(Answers(right), train, test), Request(identity=(0, 1, 2, 3, 4))
    assert audited(Answers(right), made=made)["accuracy-retain-test"].value == 1
    assert audited(Answers(wrong), made=made)["accuracy-retain-test"].value == pytest.approx(2 / 3)
    # of questions that split evenly, one answer to all is right in about a half
    assert 0.7 < audited(Answers(wrong), made=made)["score"].detail["same_answer"] < 0.8


# ------------------------------------------------------------------ reasons


def reason(made, model=None, **settings):
    model = model or Table(np.full(2000, 0.7))
    found = audited(model, made=made, settings=settings)
    assert all(f.value is None for f in found.values()) and len(found) == 3
    return found["score"].reason


def test_without_people_set_apart_there_is_a_reason():
    problem, request = world()
    assert "no column 'unknown'" in reason((problem, request), column="unknown")
    bare = Classification(problem.model, problem.train)
    assert "no test data" in reason((bare, request))
    assert "10 are needed" in reason((problem, Request(ids=(0, 1, 2))))
    problem.test.columns["unseen"] = np.ones(len(problem.test))
    assert "samples of test people" in reason((problem, request))


def test_a_column_that_is_not_there_or_holds_words_is_a_reason():
    problem, request = world()
    assert "no column 'identty'" in reason((problem, request), identity="identty")
    problem.test.columns["unseen"] = np.where(problem.test.columns["unseen"] == 1, "1", "0")
    assert "not words" in reason((problem, request))


def test_people_are_found_in_a_column_of_both_data_sets():
    problem, request = world(owner="user")
    problem.train.columns["identity"] = problem.train.columns["user"]  # not in the test data
    found = audited(Table(np.full(2000, 0.7)), made=(problem, request))["mia"]
    assert found.detail["units"] == "people"
    problem.test.columns["user"] = problem.test.columns["user"] - 20
    assert "in training and in test data" in reason((problem, request))


def test_one_answer_to_several_questions_need_not_be_a_label():
    codes = torch.tensor([0b011, 0b101, 0b110])
    x = torch.arange(120).float()[:, None]
    y = codes[torch.arange(120) % 3]
    train = Data((x[:60], y[:60]), columns={"identity": np.arange(60) // 6})
    mark = (np.arange(60) < 30).astype(int)
    test = Data((x[60:], y[60:]), columns={"identity": 50 + np.arange(60) // 6, "unseen": mark})
    model = nn.Linear(1, 3)
    made = MultiLabel(model, train, test), Request(identity=(0, 1, 2, 3, 4))
    found = audited(model, made=made)["score"]
    assert found.detail["same_answer"] == pytest.approx(0.5 + 0.5 * 2 / 3)  # yes to all


def test_people_on_two_sides_and_copies_are_refused():
    problem, request = world()
    problem.test.columns["identity"] = problem.test.columns["identity"] - 20
    assert "in training and in test data" in reason((problem, request))
    problem, request = world()
    x = problem.test.fetch(problem.test.ids).x.clone()
    x[0] = 3.0  # a sample to forget
    test = Data((x, problem.test.labels), columns=problem.test.columns)
    shared = Classification(problem.model, problem.train, test)
    assert "1 of the test samples is among the samples to forget" in reason((shared, request))


def test_outputs_that_are_no_numbers_give_no_number():
    made = world()
    model = Table(np.full(2000, 0.7))
    model.odds.data[5] = torch.nan
    assert "NaN" in reason(made, model)


def test_a_part_of_a_person_that_stays_is_counted():
    problem, _ = world()
    request = Request(where=f"id < {3 * EACH + 5}")
    found = audited(Table(np.full(2000, 0.7)), made=(problem, request))["mia"]
    assert found.detail["also_retained"] == 1

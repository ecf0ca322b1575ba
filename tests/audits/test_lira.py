"""lira: scores by hand, chance on exchangeable samples, power, strata, and reasons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from shadow_worlds import World

import expunge as xp
from expunge.audits import _shadow_attack
from expunge.audits.lira import LiRA, fit, scores
from expunge.audits.membership import Membership
from expunge.audits.run import stratified
from expunge.core.data import Data
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.strata import Strata
from expunge.fleet.shadows import Shadows


@pytest.fixture
def world(tables, margins, monkeypatch):
    def make(**settings):
        made = World(tables, margins, **settings)
        monkeypatch.setattr(_shadow_attack, "shadows", lambda *a: made.shadows)
        return made

    return make


def run(subjects, by_name, **settings):
    return by_name(LiRA(**settings).run(subjects[1], subjects[2:], Runtime()))


def test_baselines_vision_scores_are_the_papers_by_hand():
    """The card's score: log-odds, one normal distribution of each side and sample."""
    rng = np.random.default_rng(0)
    masks, odds = rng.random((40, 3)) < 0.5, rng.normal(1, 2, (40, 3))
    made = Shadows(torch.from_numpy(masks), torch.from_numpy(odds), torch.arange(2), torch.arange(1), True)  # fmt: skip
    inside, out = fit(made, True, False), fit(made, False, False)
    phi, at = np.array([0.3, -2.0]), np.array([2, 0])
    for n, column in enumerate(at):
        a, b = (odds[rows, column] for rows in (masks[:, column], ~masks[:, column]))
        one, zero = norm(a.mean(), a.std(ddof=1)), norm(b.mean(), b.std(ddof=1))
        wanted = one.logpdf(phi[n]) - zero.logpdf(phi[n])
        assert scores(phi, out, inside, at)[n] == pytest.approx(wanted)
        # offline: the tail of the paper is a rising function of it
        assert norm.cdf(scores(phi, out, None, at)[n]) == pytest.approx(zero.cdf(phi[n]))
    assert out.models == (~masks).sum(0).min()


def test_the_pooled_variance_is_within_samples():
    odds = torch.tensor([[0.0, 100.0], [2.0, 102.0], [0.0, 100.0], [2.0, 102.0]])
    masks = torch.tensor([[True, True]] * 2 + [[False, False]] * 2)
    pooled = fit(Shadows(masks, odds, torch.arange(1), torch.arange(1), True), True, True)
    assert pooled.std.tolist() == pytest.approx([2**0.5] * 2)  # not the 50 between the samples


def test_exchangeable_samples_are_at_chance(world, by_name):
    names = [f"lira/auc-{v}" for v in ("online", "offline")]
    alarms = dict.fromkeys([*names, "lira/tpr-online-at-0.1", "lira/balanced-accuracy-online"], 0)
    for seed in range(40):
        w = world(seed=seed)
        found = run(w.subjects(w.logits(2.0), w.logits(), w.logits()), by_name)
        for name in alarms:
            alarms[name] += found[name].low > (0.1 if "tpr" in name else 0.5)
    assert max(alarms.values()) <= 5, alarms


def test_planted_members_are_found_where_a_threshold_on_the_loss_is_blind(world, by_name):
    w = world(hard=8.0)
    subjects = w.subjects(w.logits(2.0), w.logits(2.0), w.logits(), w.logits())
    found = run(subjects, by_name)
    for variant in ("online", "offline"):
        f = found[f"lira/auc-{variant}"]
        assert f.low > 0.75 and f.value == pytest.approx(norm.cdf(2**0.5), abs=0.07)
        assert f.reference < 0.62 and f.original > 0.75 and len(f.per_sample["score"]) == 60
        assert found[f"lira/tpr-{variant}-at-0.1"].low > 0.1
        assert found[f"lira/balanced-accuracy-{variant}"].low > 0.6
        assert found[f"lira/tpr-{variant}-at-0.001"].value is None
        roc = f.detail["roc"]
        assert roc["side"] == "member" and len(roc["tpr"]) == len(roc["reference_tpr"])
        assert roc["fpr"][0] <= 0.01 and np.mean(roc["tpr"]) > np.mean(roc["reference_tpr"])
    (loss,) = Membership(scores=("loss",), attackers=()).run(subjects[1], [], Runtime())[:1]
    assert loss.value < 0.65


def test_over_forgetting_is_found_as_memory_is(world, by_name):
    w = world()
    found = run(w.subjects(w.logits(2.0), w.logits(-2.0), w.logits()), by_name)
    for variant in ("online", "offline"):
        f = found[f"lira/auc-{variant}"]
        assert f.low > 0.75 and f.detail["auc"] < 0.25 and f.detail["roc"]["side"] == "other"
        assert found[f"lira/tpr-{variant}-at-0.1"].low > 0.1
    assert found["lira/balanced-accuracy-online"].reference is not None


def test_strata_are_attacked_as_the_whole_is(world, by_name):
    w = world()
    odds = w.logits(0.0)
    memory = w.logits(4.0)
    odds[:30] = memory[:30]  # only the first half is remembered
    subjects = w.subjects(w.logits(2.0), odds, w.logits())
    audit = LiRA(variants=("online",))
    whole = audit.run(subjects[1], subjects[2:], Runtime())
    parts = Strata({"kept": torch.arange(30), "gone": torch.arange(30, 60)})
    found = by_name(stratified(audit, whole, parts, subjects[1], subjects[2:], Runtime()))
    assert found["lira/auc-online@kept"].low > 0.75
    assert found["lira/auc-online@gone"].low == 0.5
    score = by_name(whole)["lira/auc-online"].per_sample["score"]
    assert found["lira/auc-online@kept"].per_sample["score"].tolist() == score[:30].tolist()
    assert found["lira/tpr-online-at-0.1@kept"].value > found["lira/tpr-online-at-0.1@gone"].value


def test_order_of_storage_changes_nothing(world, by_name, tables):
    w = world()
    models = w.logits(2.0), w.logits(1.0)
    plain = run(w.subjects(*models), by_name)
    order = torch.from_numpy(np.random.default_rng(9).permutation(160))
    mixed = tables(w.y[:160], w.y[160:], Request(ids=tuple(range(60))), *models, order=order)
    w.shadows = Shadows(
        torch.cat([w.shadows.masks[:, :160][:, order], w.shadows.masks[:, 160:]], 1),
        torch.cat([w.shadows.odds[:, :160][:, order], w.shadows.odds[:, 160:]], 1),
        order, torch.arange(200), True,
    )  # fmt: skip
    assert run(mixed, by_name) == plain


def test_reasons(world, by_name, tables):
    def reasons(subjects, **settings):
        found = LiRA(**settings).run(subjects[0], subjects[1:], Runtime())
        assert all(f.value is None for f in found)
        return " / ".join(dict.fromkeys(f.reason for f in found))

    w = world(forget=5)
    assert "only 5 samples to forget" in reasons(w.subjects(w.logits()))
    w = world()
    assert "one class only" in reasons(tables([0] * 30, [0] * 30, Request(ids=tuple(range(12))), torch.ones(60, 1)))  # fmt: skip
    assert "one class alone" in reasons(tables([1] * 30, [1] * 30, Request(ids=tuple(range(12))), torch.rand(60, 2)))  # fmt: skip
    broken = w.logits()
    broken[3] = torch.nan
    assert "NaN" in reasons(w.subjects(w.logits(), broken)[::-1])
    flat = w.subjects(w.logits(), w.margins(w.y, np.zeros(360)))[::-1]
    w.shadows.odds[:] = 1.0
    assert "say the same of every sample" in reasons(flat)
    w = world(models=4, seed=3)
    assert "raise models" in reasons(w.subjects(w.logits()), variants=("online",))
    # samples to forget among the test data
    w = world()
    (s,) = w.subjects(w.logits())
    s.problem.test = Data((torch.arange(155.0, 355)[:, None], s.problem.test.labels))
    s.problem.train = Data((torch.arange(200.0, 360)[:, None], s.problem.train.labels))
    assert "60 of the test samples are among the samples to forget" in reasons([s])
    found = by_name(Membership(attackers=()).run(s, [], Runtime()))
    assert "among the samples to forget" in found["membership/auc-loss"].reason


def test_constant_scores_give_no_number(world, by_name):
    w = world()
    w.shadows.odds[:, 0] += 1.0  # some spread, and the same mean for all samples but one
    w.shadows.odds[:] = torch.randn(32, 1, generator=torch.Generator().manual_seed(0))
    w.shadows.masks[:] = (torch.arange(32) % 2 == 0)[:, None]
    subjects = w.subjects(w.logits(), w.margins(w.y, np.zeros(360)))
    for f in LiRA().run(subjects[1], [], Runtime()):
        assert f.value is None and f.reason == "all samples have the same score"
    (auc, attack) = Membership(scores=("loss",), attackers=()).run(subjects[1], [], Runtime())
    assert auc.value is attack.value is None and "the same score" in auc.reason


def test_too_few_shadow_models_for_a_rate(world, by_name):
    w = world(models=24, m=2400, n=100)
    found = run(w.subjects(w.logits(), w.logits(), w.logits()), by_name, fprs=(0.3, 0.001))
    f = found["lira/tpr-offline-at-0.001"]
    assert f.value is None and "too few shadow models" in f.reason and "10 are needed" in f.reason
    assert found["lira/auc-offline"].value is not None


def test_references_from_another_recipe_are_no_references(world, by_name):
    w = world()
    untrained = w.margins(w.y, w.rng.normal(-30, 1, 360))
    subjects = w.subjects(w.logits(2.0), w.logits(2.0), w.logits(), untrained)
    for f in run(subjects, by_name).values():
        assert f.reference is None and f.floor is None
        assert f.value is None or "another recipe" in f.reason
    # worse on unseen data alone is no sign: shadow models may have seen odd test data
    odd = w.logits()
    odd[160:] = untrained[160:]
    f = run(w.subjects(w.logits(2.0), w.logits(2.0), odd), by_name)["lira/auc-online"]
    assert f.reference is not None
    good = run(w.subjects(w.logits(2.0), w.logits(2.0), w.logits()), by_name)
    assert good["lira/auc-online"].reference is not None
    wide = w.subjects(w.logits(2.0), w.logits(2.0), w.logits())
    wide[2].model.rows = torch.nn.Parameter(torch.cat([wide[2].model.rows, torch.ones(360, 1)], 1))
    f = run(wide, by_name)["lira/auc-online"]
    assert f.value is not None and f.reference is None and "another architecture" in f.reason


def test_online_needs_models_that_saw_non_members(world, by_name):
    w = world(both=False)
    found = run(w.subjects(w.logits(2.0), w.logits(2.0), w.logits()), by_name)
    assert found["lira/auc-online"].value is None
    assert "cannot be run on test data" in found["lira/auc-online"].reason
    assert found["lira/auc-offline"].low > 0.7


def test_without_a_recipe_it_is_not_computed(tables):
    torch.manual_seed(0)
    (s,) = tables([0, 1] * 20, [0, 1] * 20, Request(ids=tuple(range(12))), torch.rand(80, 2))
    found = LiRA().run(s, [], Runtime())
    assert "pass recipe=" in found[0].reason and found[0].value is None
    with pytest.raises(xp.UserError, match="recipe"):
        LiRA().needs.check("lira", s.problem)

"""u-lira: the card's invariant, both hypotheses, draws, strata, the store and reasons."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits.run import stratified
from expunge.audits.u_lira import ULiRA, World, auc_of, balanced, tell
from expunge.core.runtime import Runtime
from expunge.core.strata import Strata
from expunge.fleet import unlearned_shadows
from expunge.fleet.unlearned_shadows import plan

POOL = 16
QUICK = {"models": 60, "targets": 20, "fprs": (0.1,)}


def net():
    return nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 2))


@functools.cache
def problem():
    """Random labels in 20 dimensions: whatever is known of a sample was memorised."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(120, 20, generator=g), torch.randint(0, 2, (120,), generator=g)
    train, test = xp.Data((x[:80], y[:80])), xp.Data((x[80:], y[80:]))
    recipe = xp.ClassifierRecipe(net, train, epochs=30, lr=0.1, batch_size=20, weight_decay=0.0)
    tuned = {
        "finetune": {"epochs": 1, "lr": 0.01, "batch_size": 32},
        "gradient-ascent": {"epochs": 20, "lr": 0.5, "batch_size": 8},
    }
    return xp.Classification(recipe(train.ids, 0), train, test, recipe=recipe, tuned=tuned)


def subject(ids=range(POOL), outcome=None):
    p = problem()
    return xp.Subject(p.model, p, xp.forget(ids=list(ids)), Runtime(), outcome=outcome)


@functools.cache
def found(method, **settings):
    made = ULiRA(method=method, **(QUICK | settings))
    return {f.name.split("/")[1]: f for f in made.run(subject(), [], Runtime(threads=1))}


def worlds(gain=2.0, models=200, samples=10, seed=0):
    rng = np.random.default_rng(seed)
    forgot = rng.random((models, samples)).argsort(1) < samples // 2
    odds = rng.normal(0, 3, samples) + gain * forgot + rng.normal(size=forgot.shape)
    return World(odds, odds, forgot, ~forgot, np.arange(models))


def test_baselines_vision_invariant_7_u_lira_of_retrain_and_of_doing_nothing():
    retrained, nothing = found("retrain"), found("original")
    for what in ("auc", "balanced-accuracy"):
        f = retrained[what]
        raw = f.detail[what.replace("-", "_")]
        error = (f.high - f.low) / 3.92 if f.low > 0.5 else (f.high - raw) / 1.96
        assert abs(raw - 0.5) < 3 * error
        assert nothing[what].low > 0.65
        assert nothing[what].original == nothing[what].value  # leaving models is what it is
        assert nothing[what].reference < 0.6
    assert retrained["auc"].original == nothing["auc"].value
    assert retrained["auc"].detail["retain_accuracy"] > 0.9


def test_baselines_vision_invariant_7_swapping_hypotheses():
    world = worlds()
    told = tell(world, 150)
    auc, *_ = auc_of(told)
    assert auc == pytest.approx(0.92, abs=0.03)  # Φ(2/√2), less what the fits err
    # who is called forgotten and who never seen, with the scores as they are
    swapped = told._replace(
        positive=told.negative, negative=told.positive,
        of_positive=told.of_negative, of_negative=told.of_positive,
    )  # fmt: skip
    assert auc_of(swapped)[0] == pytest.approx(1 - auc)
    # the distributions with them: the score changes its sign, and the test is the same one
    other = World(world.unseen, world.forgotten, world.never, world.forgot, world.shadow)
    again = tell(other, 150)
    assert auc_of(again)[0] == pytest.approx(auc)
    np.testing.assert_allclose(np.sort(again.positive), np.sort(-told.negative))


def test_targets_are_no_part_of_their_own_fit():
    world = worlds(gain=0.0, models=40)
    far = World(world.forgotten.copy(), world.unseen.copy(), *world[2:])
    for values in (far.forgotten, far.unseen):
        values[30:] += 50.0
    one, two = tell(world, 30), tell(far, 30)
    assert np.array_equal(one.separation, two.separation)
    assert not np.array_equal(one.positive, two.positive)
    assert set(one.of_positive) == set(range(30, 40))


def test_exchangeable_models_are_at_chance():
    alarms = 0
    for seed in range(60):
        _, low, high, _ = auc_of(tell(worlds(gain=0.0, models=80, seed=seed), 50))
        alarms += not low <= 0.5 <= high
    assert alarms <= 7
    balance, low, high = balanced(tell(worlds(gain=0.0), 150))
    assert low <= 0.5 <= high and low <= balance <= high


def test_methods_stand_between():
    nothing, tuned, gone = (found(m) for m in ("original", "finetune", "gradient-ascent"))
    assert tuned["auc"].value > 0.6 and tuned["auc"].value <= nothing["auc"].value + 0.05
    assert gone["auc"].detail["retain_accuracy"] < nothing["auc"].detail["retain_accuracy"]
    assert tuned["auc"].detail["method"] == "finetune"
    roc = tuned["auc"].detail["roc"]
    assert len(roc["tpr"]) == len(roc["reference_tpr"]) == len(roc["original_tpr"])


def test_the_method_is_the_outcomes():
    p = problem()
    method = xp.methods.FineTune(epochs=1, lr=0.01, batch_size=32)
    outcome = xp.unlearn(p, xp.forget(ids=list(range(POOL))), method)
    (auc, *_) = ULiRA(**QUICK).run(subject(outcome=outcome), [], Runtime(threads=1))
    assert auc.value == found("finetune")["auc"].value
    (auc, *rest) = ULiRA(**QUICK).run(subject(), [], Runtime())
    assert "pass method=" in auc.reason and all(f.value is None for f in (auc, *rest))


def test_both_null_hypotheses():
    strict, loose = found("gradient-ascent"), found("gradient-ascent", null="original")
    # against models as trained, what ascent did to the others gives it away
    assert loose["auc"].value > strict["auc"].value + 0.1
    same = found("original", null="original")
    assert same["auc"].value == found("original")["auc"].value


def test_draws_forget_a_share_of_what_a_model_saw():
    p, pool = problem(), torch.arange(POOL)
    drawn = plan(p, pool, 6, 3, 0.5, Runtime())
    assert drawn.inside.sum(1).tolist() == [8] * 6 and {len(k) for k in drawn.keeps} == {40}
    assert drawn.forgot.shape == (18, POOL) and drawn.forgot.sum(1).tolist() == [4] * 18
    assert not (drawn.forgot & ~drawn.inside.repeat_interleave(3, 0)).any()
    assert not torch.equal(drawn.forgot[0], drawn.forgot[1])
    for keep, inside in zip(drawn.keeps, drawn.inside, strict=True):
        assert torch.equal(keep[keep < POOL], pool[inside])
    f = found("original", draws=2, share=0.5, models=40, targets=12)["auc"]
    assert f.low > 0.55


def test_strata_are_parts_of_the_same_runs(monkeypatch):
    whole = list(found("original").values())
    monkeypatch.setattr(unlearned_shadows, "ask_many", None)  # nothing is trained again
    parts = Strata({"a": torch.arange(5), "b": torch.arange(5, POOL)})
    audit = ULiRA(method="original", **QUICK)
    made = {f.name: f for f in stratified(audit, whole, parts, subject(), [], Runtime(threads=1))}
    separation = found("original")["auc"].per_sample["separation"]
    a, b = (made[f"u-lira/auc@{p}"].per_sample["separation"] for p in "ab")
    assert np.r_[a, b] == pytest.approx(separation, rel=0.2)  # the pooled variance is the part's
    assert made["u-lira/auc@a"].value is not None


def test_runs_are_kept_in_the_store(monkeypatch):
    calls = []
    true = unlearned_shadows._unlearned
    monkeypatch.setattr(unlearned_shadows, "_unlearned", lambda *a: calls.append(1) or true(*a))
    store, settings = xp.Store.temporary(), {"models": 12, "targets": 4, "fprs": (0.1,)}
    audit = ULiRA(method="finetune", **settings)
    values = []
    for _ in range(2):
        s = subject(range(20, 40))
        s.store = store
        s.problem.__dict__.pop("_u_lira", None)
        values.append([f.value for f in audit.run(s, [], Runtime(threads=1))])
        problem().__dict__.pop("_u_lira", None)
    found.cache_clear()
    assert values[0] == values[1] and len(calls) == 12


def test_a_stopped_audit_goes_on_where_it_was(monkeypatch):
    true = unlearned_shadows._unlearned
    calls, left = [], [5]

    def stopping(*a):
        calls.append(1)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return true(*a)

    monkeypatch.setattr(unlearned_shadows, "_unlearned", stopping)
    audit = ULiRA(method="finetune", models=12, targets=4, fprs=(0.1,))
    s = subject(range(20, 40))
    s.store = xp.Store.temporary()
    with pytest.raises(KeyboardInterrupt):
        audit.run(s, [], Runtime(threads=1))
    assert len(calls) == 5
    audit.run(s, [], Runtime(threads=1))
    assert len(calls) == 5 + 8  # four models had said all there was to say
    resumed = s.problem.__dict__.pop("_u_lira")
    s.store = None
    audit.run(s, [], Runtime(threads=1))
    plain = s.problem.__dict__.pop("_u_lira")
    for key, tensors in resumed.items():
        for name, values in tensors.items():
            torch.testing.assert_close(values, plain[key][name], rtol=1e-4, atol=1e-4)


def test_reasons():
    def reason(s, **settings):
        made = ULiRA(**{"method": "original", **QUICK, **settings}).run(s, [], Runtime(threads=1))
        assert all(f.value is None for f in made)
        return made[0].reason

    assert "leave too few to fit on" in reason(subject(), models=20, targets=20)
    f = {
        f.name: f
        for f in ULiRA(method="original", models=12, targets=4, fprs=(0.1, 0.001)).run(
            subject(), [], Runtime(threads=1)
        )
    }
    assert "are needed" in f["u-lira/tpr-at-0.001"].reason
    assert tell(worlds(models=4), 2).startswith("2 shadow models leave some sample")
    broken = worlds(models=40)
    broken.forgotten[0, 0] = np.nan
    assert "NaN" in tell(broken, 30)
    flat = worlds(models=40)
    flat.forgotten[:] = flat.unseen[:] = 1.0
    assert "say the same" in tell(flat, 30)
    boundary = reason(subject(), method="boundary-shrink")
    assert "boundary-shrink failed on the shadow models" in boundary

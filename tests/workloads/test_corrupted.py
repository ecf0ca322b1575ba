"""The invariants of the card corrective: manipulated data, and the audit that judges a correction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits.corrective import Corrective
from expunge.core.audit import Subject
from expunge.core.errors import NeedsError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification
from expunge.suite.identified import identified_curve
from expunge.workloads import corrupted, registry
from expunge.workloads.corrupted import Confusion, Patch, found
from expunge.workloads.nets import DigitsCNN


def clean():
    (x, y), _ = corrupted._digits()
    return xp.Data((x, y))


def test_corrective_invariant_1_what_is_not_found_stays():
    train = corrupted.poisoned().train
    all_of_them = found(1.0, 60).resolve(train)
    half = found(0.5, 60).resolve(train)
    assert len(half) == 30 and len(all_of_them) == 60
    assert set(half.tolist()) < set(all_of_them.tolist())
    kept = train.fetch(train.without(half))
    hidden = torch.isin(train.without(half), all_of_them)
    assert int(hidden.sum()) == 30
    assert bool((kept.x[hidden][:, :, -2:, -2:] == 1.5).all())
    assert bool((kept.y[hidden] == 0).all())
    rest, own = train.without(all_of_them), clean()
    assert torch.equal(train.fetch(rest).x, own.fetch(rest).x)
    assert torch.equal(train.fetch(rest).y, own.fetch(rest).y)


def test_corrective_invariant_2_the_trigger():
    x = torch.rand(5, 3, 8, 8)
    once = Patch(size=2).trigger(x)
    assert torch.equal(Patch(size=2).trigger(once), once)
    assert ((once != x).flatten(1).sum(1) == 2 * 2 * 3).all()
    assert not torch.equal(x, once), "the images given were changed"
    turned = Patch(size=2).trigger(x.flip(-1))
    assert bool((turned[..., -2:, -2:] == 1.5).all())


def test_corrective_invariant_3_as_many_of_each():
    splits = corrupted.confused()
    labels, true = splits.train.labels, torch.as_tensor(splits.train.columns["true"])
    moved = labels != true
    assert int((moved & (true == 3)).sum()) == int((moved & (true == 5)).sum()) == 60
    assert bool((labels[moved] == 8 - true[moved]).all())
    assert torch.equal(labels.bincount(), true.bincount())
    rank = torch.as_tensor(splits.train.columns["manipulated"])
    assert torch.equal(rank > 0, moved)
    assert rank[moved].sort().values.tolist() == list(range(1, 121))
    first = true[(rank > 0) & (rank <= 30)]
    assert 5 < int((first == 3).sum()) < 25, "the order of finding goes by class"


class Constant(nn.Module):
    def __init__(self, label):
        super().__init__()
        self.logits = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(label), 10).float())

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def audited(workload, model, request=None, **more):
    splits, of = workload.data(), workload
    problem = Classification(DigitsCNN(), splits.train, splits.test)
    subject = Subject(model, problem, request or of.request, Runtime())
    return {f.name: f for f in Corrective(**more).run(subject, [subject], Runtime())}


def test_corrective_invariant_4_true_labels_count():
    workload = registry.get("digits-poison")
    one = audited(workload, Constant(0))
    assert 0.089 <= one["corrective/affected"].value <= 0.122
    assert one["corrective/affected"].value == one["corrective/rest"].value
    assert one["corrective/still-wrong"].value == 1.0
    assert one["corrective/affected"].direction == "up"
    test = workload.data().test
    assert one["corrective/affected"].detail["n"] == len(test) / 2
    low, high = one["corrective/affected"].low, one["corrective/affected"].high
    assert low < one["corrective/affected"].value < high


def test_of_confused_classes_theirs_are_affected():
    found_ = audited(registry.get("digits-confusion"), Constant(3))
    test = registry.get("digits-confusion").data().test
    three, five = (int((test.labels == c).sum()) for c in (3, 5))
    assert found_["corrective/affected"].detail["n"] == three + five
    assert found_["corrective/affected"].value == pytest.approx(three / (three + five))
    assert found_["corrective/rest"].value == 0


@pytest.mark.parametrize("reset", [False, True])
def test_corrective_invariant_6_the_first_layers_keep_every_bit(reset):
    torch.manual_seed(0)
    x, y = torch.randn(60, 1, 6, 6), torch.arange(60) % 3
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )  # fmt: skip
    problem = xp.Classification(model, (x, y), build=lambda: copy.deepcopy(model))
    method = xp.methods.FineTune(train="last(2)", norm="frozen", epochs=2, lr=0.1, reset=reset)
    found = xp.unlearn(problem, xp.forget(ids=[0, 1, 2]), method).runnable().state_dict()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, found[n])}
    assert changed == {"4.weight", "4.bias", "6.weight", "6.bias"}


def test_corrective_invariant_7_with_all_found_retraining_is_training_on_clean_data():
    train = corrupted.poisoned().train
    kept = train.without(found(1.0, 60).resolve(train))
    models = [
        xp.ClassifierRecipe(DigitsCNN, data, epochs=1, lr=1e-3, step="adam")(kept, 3)
        for data in (train, clean())
    ]
    assert hash_model(models[0]) == hash_model(models[1])


def test_corrective_invariant_8_the_same_samples_are_found_every_time():
    (x, y), test = corrupted._digits()
    twice = [corrupted.manipulated(Patch(), (x, y), test, 60).train for _ in range(2)]
    shares = (0.1, 0.5, 1.0)
    ids = [[found(s, 60).resolve(t).tolist() for s in shares] for t in twice]
    assert ids[0] == ids[1]
    other = corrupted.manipulated(Patch(), (x, y), test, 60, seed=1).train
    assert found(0.5, 60).resolve(other).tolist() != ids[0][1]


def test_only_wrong_labels_can_be_still_wrong():
    workload = registry.get("digits-poison")
    train = workload.data().train
    ids = workload.request.resolve(train)
    true = torch.as_tensor(train.columns["true"])[train.positions(ids)]
    zeros = int((true == 0).sum())
    assert zeros > 0
    one = audited(workload, Constant(0))["corrective/still-wrong"]
    assert one.detail["n"] == len(ids) - zeros and one.value == 1


def test_no_verdict_on_what_is_not_the_goal():
    from expunge.report.verdict import judge

    finding = {
        "value": 0.95,
        "reference": 0.12,
        "direction": "up",
        "low": 0.9,
        "high": 1.0,
        "detail": {},
    }
    found_ = judge("corrective/affected", finding)
    assert found_.state == "unjudged" and "not the goal" in found_.sentence


def test_without_a_marked_domain_there_is_a_reason():
    found_ = audited(registry.get("digits-poison"), Constant(0), column="domain")
    assert all(f.value is None and "'domain'" in f.reason for f in found_.values())
    splits = corrupted.poisoned()
    problem = Classification(DigitsCNN(), splits.train)
    subject = Subject(Constant(0), problem, found(0.5, 60), Runtime())
    assert all(f.reason for f in Corrective().run(subject, [], Runtime()))


def test_bad_questions():
    with pytest.raises(SettingError, match="none or too many"):
        found(0.001, 60)
    with pytest.raises(SettingError, match="fewer than 500"):
        Confusion(3, 5).choose(torch.arange(100) % 10, 1000, torch.Generator())


def test_the_curve_asks_for_growing_parts(tmp_path):
    from expunge.report.identified import identified_picture
    from expunge.store import Store
    from expunge.suite.bench import Bench

    splits = corrupted.poisoned()
    recipe = xp.ClassifierRecipe(DigitsCNN, splits.train, epochs=1, lr=1e-3, step="adam")
    problem = Classification(recipe(splits.train.ids, 0), splits.train, splits.test, recipe=recipe)
    bench = Bench(Store.open(tmp_path), Runtime())
    tuned = {"name": "finetune", "epochs": 1, "lr": 1e-3}
    rows = identified_curve(problem, [tuned], (0.1, 1.0), bench=bench)
    assert {(r["share"], r["method"]) for r in rows} == {
        (s, m) for s in (0.1, 1.0) for m in ("original", "retrain", "finetune")
    }
    forgotten = sorted(r.record["forgotten"] for r in bench.store.runs(kind="unlearn"))
    assert forgotten == [6, 60]
    assert identified_picture(rows).count("<polyline") == 3
    idle = {"name": "ssd", "alpha": 199.0}
    rows = identified_curve(problem, [idle, tuned], (0.1,), bench=bench)
    ssd = next(r for r in rows if r["method"] == "ssd")
    before = next(r for r in rows if r["method"] == "original")
    assert ssd["unchanged"] and ssd["affected"] == before["affected"]
    assert not next(r for r in rows if r["method"] == "finetune")["unchanged"]
    plain = Classification(DigitsCNN(), clean(), splits.test)
    with pytest.raises(NeedsError, match="manipulated"):
        identified_curve(plain, [tuned], bench=bench)

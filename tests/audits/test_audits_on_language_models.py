"""General audits on a language model, with its weights moved and with adapters beside them."""

from __future__ import annotations

import pytest

import expunge as xp
from expunge.audits.relearn_time import RelearnTime
from expunge.audits.run import audit_list
from expunge.core.hashing import hash_model
from expunge.train.adapters import merged

RUNTIME = xp.Runtime(threads=1)


@pytest.fixture(scope="module")
def adapted(facts):
    """An outcome with adapters, the model as a subject, and the same with the adapters in the weights."""
    original, *_ = facts
    npo = xp.methods.NPO(train="lora(4)", epochs=6, lr=1e-2, batch_size=5)
    outcome = xp.unlearn(original.problem, original.request, npo, runtime=RUNTIME)
    pair = [
        xp.Subject(m, original.problem, original.request, RUNTIME, cost=outcome.cost)
        for m in (outcome.runnable(), merged(outcome.runnable()))
    ]
    return outcome, *pair


def run(name, subject, references=(), **settings):
    audit = xp.audits.registry.get(name)(**settings)
    return {f.name.split("/")[1]: f for f in audit.run(subject, references, RUNTIME)}


def test_adapters_count_as_what_they_add_to_the_weights(facts, adapted):
    _, beside, inside = adapted
    first, second = (run("weight-distance", s, facts[1:]) for s in (beside, inside))
    assert first["original"].value > 0
    assert first["original"].value == pytest.approx(second["original"].value)
    assert first["reference"].value == pytest.approx(second["reference"].value)
    moved = {n for n, d in first["original"].detail["per_tensor"].items() if d > 0}
    assert moved and all(".layers." in n and "norm" not in n for n in moved)
    assert hash_model(beside.model) != hash_model(inside.model)  # the model itself is left alone


def test_hidden_layers_of_a_model_with_adapters(facts, adapted):
    _, beside, inside = adapted
    first, second = (run("cka", s, facts[1:]) for s in (beside, inside))
    layers = ["model.layers.0", "model.layers.1"]
    for name, f in first.items():
        assert f.detail["layers"] == layers
        assert f.value == pytest.approx(second[name].value, abs=1e-4)
    assert run("cka", facts[0])["original"].value == pytest.approx(1)
    assert first["original"].value < 1


def test_relearning_by_the_loss_with_and_without_adapters(facts, adapted):
    quick = {"lr": 0.01, "batch_size": 20, "repeats": 1, "cap": 40, "alpha": 100.0}
    _, beside, inside = adapted
    first, second = (run("relearn-time", s, facts[1:], **quick) for s in (beside, inside))
    assert first["updates"].value == second["updates"].value
    assert first["updates"].original == 1
    assert 1 < first["updates"].value < first["updates"].reference
    assert first["updates"].detail["measured_on"] == "forget-train"


def test_the_error_does_not_depend_on_how_much_is_read_at_a_time(facts, monkeypatch):
    from expunge.audits import relearn_time

    original = facts[0]
    seen = []
    for held in (3, 256):
        monkeypatch.setattr(relearn_time, "HELD", held)
        errors = [
            relearn_time._errors(original.problem, original.model, b).mean()
            for b in original.problem.train.batches(held, original.splits["forget-train"])
        ]
        seen.append(len(errors))
        assert relearn_time._good_enough(original, "forget-train", 1e-4)(original.model)
    assert seen == [4, 1]


def test_cost_of_adapters(adapted):
    outcome, beside, _ = adapted
    found = run("cost", beside)
    assert found["samples"].value == outcome.cost.samples > 0
    assert found["gradients"].value == outcome.cost.gradients > 0


def test_standard_runs_all_that_apply(adapted):
    outcome, *_ = adapted
    found = {f.name: f for f in xp.audit(outcome, "standard", references=0, runtime=RUNTIME)}
    audits = {name.split("/")[0] for name in found}
    assert audits == {
        "memorisation", "rouge", "truth-ratio", "text-membership",
        "cka", "weight-distance", "norm-statistics", "cost",
    }  # fmt: skip
    assert all(f.value is not None or f.reason for f in found.values())
    for name in ("memorisation/exact-forget-train", "rouge/recall-forget-train",
                 "truth-ratio/forget-train", "text-membership/auc-loss", "cka/original",
                 "weight-distance/original", "cost/seconds"):  # fmt: skip
        assert found[name].value is not None
    quick = {a.name for a in audit_list("quick", outcome.problem)}
    assert quick == {"memorisation", "cost"}


def test_unlabelled_data_cannot_be_relearnt(facts):
    import torch

    problem = xp.Problem.of(
        torch.nn.Linear(2, 1), torch.zeros(6, 2), each_loss=lambda m, b: m(b.x)[:, 0]
    )
    subject = xp.Subject(problem.model, problem, xp.Request(ids=(0,)), RUNTIME)
    assert {f.reason for f in RelearnTime().run(subject, [], RUNTIME)} == {
        "the data has no labels to relearn"
    }

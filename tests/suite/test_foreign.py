"""Models that somebody else unlearned: what can be read, what is refused, and that nothing else counts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import expunge as xp
from expunge.core.errors import ModelError
from expunge.core.hashing import hash_model
from expunge.store import Store
from expunge.suite.foreign import audit_model, read_artefact

REQUEST = xp.Request(label=1)


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(150) % 3
    x = 2 * torch.randn(3, 6, generator=generator)[y] + torch.randn(150, 6, generator=generator)
    train, test = xp.Data((x[:90], y[:90])), xp.Data((x[90:], y[90:]))
    recipe = xp.ClassifierRecipe(net, train, epochs=5, lr=0.1, batch_size=16)
    return xp.Classification(recipe(train.ids, 0), train, test, recipe=recipe, name="blobs")


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "store")


def values(findings):
    return {f.name: f.value for f in findings}


def test_weights_are_read_and_audited_as_the_outcome_is(problem, store, tmp_path):
    outcome = xp.unlearn(problem, REQUEST, xp.methods.FineTune(epochs=2, lr=0.1))
    save_file(outcome.model.state_dict(), tmp_path / "theirs.safetensors")
    found = audit_model(
        tmp_path / "theirs.safetensors", problem, REQUEST, ["accuracy"], references=2, store=store
    )
    own = xp.audit(outcome, ["accuracy"], references=2, store=store)
    assert values(found) == values(own)
    assert [f.reference for f in found] == [f.reference for f in own]
    assert found[0].reference is not None
    (run,) = store.runs(kind="artefact")
    assert run.record["weights"] == hash_model(outcome.model)
    assert run.record["artefact"].endswith("theirs.safetensors")
    assert "method" not in run.record


def test_a_saved_outcome_s_record_is_not_believed(problem, store, tmp_path):
    outcome = xp.unlearn(problem, REQUEST, xp.methods.FineTune(epochs=1, lr=0.1))
    folder = outcome.save(tmp_path / "theirs")
    record = json.loads((folder / "record.json").read_text())
    record["details"] = {"forgotten": "everything"}
    (folder / "record.json").write_text(json.dumps(record))
    assert hash_model(read_artefact(folder, problem)) == hash_model(outcome.model)


def test_a_model_in_memory_is_enough_and_keeps_its_mode(problem, store):
    theirs = net().train()
    found = audit_model(theirs, problem, REQUEST, ["accuracy", "cost"], references=0, store=store)
    assert theirs.training
    by_name = {f.name: f for f in found}
    assert by_name["accuracy/forget-test"].value is not None
    assert by_name["accuracy/forget-test"].reference is None
    assert all(f.value is None and f.reason for n, f in by_name.items() if n.startswith("cost/"))


def test_the_same_artefact_is_not_audited_twice(problem, store):
    theirs = net()
    for _ in range(2):
        audit_model(theirs, problem, REQUEST, ["accuracy"], references=1, store=store)
    assert len(store.runs(kind="artefact")) == len(store.runs(kind="audit")) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.pop("0.bias"), "missing: 0.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "not the model's: extra"),
        (lambda w: w.update({"0.bias": torch.zeros(3)}), "another shape: 0.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, why, problem, tmp_path):
    weights = dict(net().state_dict())
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=why):
        read_artefact(tmp_path / "w.safetensors", problem)


def test_what_is_no_model_is_refused(problem, store, tmp_path):
    with pytest.raises(ModelError, match="there is no"):
        read_artefact(tmp_path / "nothing", problem)
    (tmp_path / "w.safetensors").write_text("no")
    with pytest.raises(ModelError, match="cannot be read"):
        read_artefact(tmp_path / "w.safetensors", problem)
    with pytest.raises(ModelError, match="does not take"):
        audit_model(nn.Linear(2, 3), problem, REQUEST, ["accuracy"], store=store)


class Masked(nn.Module):
    """Never says one class, with the weights of what is inside."""

    def __init__(self, inner, label):
        super().__init__()
        self.inner, self.label = inner, label

    def forward(self, x):
        logits = self.inner(x).clone()
        logits[:, self.label] = -30
        return logits


def test_wrappers_around_the_same_weights_are_not_mistaken_for_each_other(problem, store):
    found = [
        values(audit_model(Masked(problem.model, c), problem, REQUEST, ["accuracy"], references=1, store=store))
        for c in (1, 2)
    ]  # fmt: skip
    assert found[0]["accuracy/forget-train"] == 0
    assert found[1]["accuracy/forget-train"] > 0.5
    assert len(store.runs(kind="artefact")) == 2


def test_another_number_of_outputs_is_refused(problem, store):
    other = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    with pytest.raises(ModelError, match="5 outputs, the original 3"):
        audit_model(other, problem, REQUEST, ["accuracy"], store=store)


def test_tied_weights_may_be_written_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    problem = xp.Classification(Tied(), (torch.randn(20, 4), torch.arange(20) % 4))
    theirs = Tied()
    save_file({"a.weight": theirs.a.weight.detach()}, tmp_path / "w.safetensors")
    read = read_artefact(tmp_path / "w.safetensors", problem)
    assert torch.equal(read.b.weight, theirs.a.weight)


def test_findings_of_another_recipe_are_not_reused(problem, store):
    from dataclasses import replace

    other = xp.Classification(
        problem.model, problem.train, problem.test, recipe=replace(problem.recipe, epochs=1)
    )
    for one in (problem, other):
        audit_model(problem.model, one, REQUEST, ["accuracy"], references=0, store=store)
    assert len(store.runs(kind="audit")) == 2

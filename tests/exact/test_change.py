"""src/expunge/exact/change.py: what a sharded model serves, stored and audited as a method's outcome."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from sharded_world import Blocky, of, problem_of, train

import expunge as xp
from expunge.core.errors import ModelError, NeedsError, RequestError, UserError
from expunge.core.hashing import hash_model
from expunge.core.outcome import CHANGES, Shards
from expunge.exact import change
from expunge.exact.change import put_on


def deleted(sharded):
    request = xp.forget(ids=of(sharded, 0, 1)[:2])
    return request, sharded.forget(request)


def test_there_and_back_gives_what_is_served(sharded, tmp_path):
    request, done = deleted(sharded)
    outcome = sharded.outcome(request, done)
    assert isinstance(outcome.change, Shards) and CHANGES["shards"] is Shards
    x = sharded._problem.train.fetch(sharded._problem.train.ids).x
    wanted = sharded.predict(x)
    assert torch.equal(outcome.released()(x), wanted)
    before = hash_model(sharded._problem.model)
    folder = outcome.save(tmp_path / "outcome")
    again = xp.load(folder, model=problem_of().model)
    assert torch.equal(again.runnable()(x), wanted) and hash_model(again.model) == outcome.record["weights"]  # fmt: skip
    assert hash_model(sharded._problem.model) == before  # the backbone itself is not touched
    record = json.loads((folder / "record.json").read_text())
    assert record["change"]["kind"] == "shards" and record["served"] == done.weights_after
    assert record["forgotten"] == 2 and record["cost"]["seconds"] == done.seconds
    assert record["details"]["deletion"]["plan"]["ids"] == list(done.plan.ids)


def test_it_holds_the_live_stages_and_nothing_of_the_deleted_slice(sharded):
    first = sharded.outcome(xp.forget(ids=[1])).change
    request, _ = deleted(sharded)
    second = sharded.outcome(request).change
    served = [len(s) for s in sharded.status().served]
    assert {n.partition("/")[0] for n in second.tensors if n != "config.json"} == {
        f"{s}-{k}" for s, number in enumerate(served) for k in range(number)
    }
    assert len(second.tensors) < len(first.tensors) and first.hash() != second.hash()
    backbone = set(problem_of().model.state_dict())
    assert backbone.isdisjoint(n.partition("/")[2] for n in second.tensors)


def test_an_untrained_start_comes_with_it(tmp_path):
    sharded = train(tmp_path / "m", start="fresh", adapter="whole", orders=1, shards=2, slices=2)
    request, done = deleted(sharded)
    outcome = sharded.outcome(request, done)
    torch.manual_seed(99)
    other = Blocky()  # any weights of the architecture
    x = torch.randn(4, 5)
    assert torch.equal(outcome.change.apply(copy.deepcopy(other))(x), sharded.predict(x))
    again = xp.load(outcome.save(tmp_path / "outcome"), model=other)
    assert torch.equal(again.runnable()(x), sharded.predict(x))


def test_a_backbone_that_is_not_in_it_must_be_the_one(sharded, tmp_path):
    folder = sharded.outcome(*deleted(sharded)).save(tmp_path / "outcome")
    torch.manual_seed(99)
    with pytest.raises(ModelError, match="not the original"):
        xp.load(folder, model=Blocky())


def test_what_was_not_deleted_is_no_outcome(sharded):
    gone, left = of(sharded, 0, 1)[:2]
    sharded.forget(gone)
    with pytest.raises(RequestError, match=f"such as {left}; forget it first"):
        sharded.outcome(xp.forget(ids=[gone, left]))
    sharded.forget(of(sharded, 1, 0)[0])
    assert sharded.outcome(xp.forget(ids=[gone])).record["forgotten"] == 1  # not the other one


def test_a_deletion_meanwhile_leaves_no_mixture(sharded, monkeypatch):
    request, _ = deleted(sharded)
    real, other = change.change_of, [xp.Sharded.load(sharded.folder)]

    def late(*given):
        if other:
            other.pop().forget(of(sharded, 1, sharded.status().served[1][0])[0])
        return real(*given)

    monkeypatch.setattr(change, "change_of", late)
    outcome = sharded.outcome(request)
    assert not other and outcome.record["served"] == sharded.weights_hash()
    assert (
        hash_model(outcome.released()) == outcome.record["weights"] == hash_model(sharded.module())
    )


def test_it_can_be_audited(sharded):
    request, done = deleted(sharded)
    found = xp.audit(sharded.outcome(request, done), ["accuracy"], references=0)
    names = {f.name for f in found}
    assert any(n.startswith("accuracy/forget-train") for n in names)


def test_what_does_not_fit_is_refused(sharded):
    tensors = dict(sharded.outcome(xp.forget(ids=[1])).change.tensors)
    with pytest.raises(ModelError):
        put_on(Blocky(blocks=2), tensors)
    with pytest.raises(ModelError, match="no sharded model"):
        put_on(Blocky(), {n: t for n, t in tensors.items() if n != "config.json"})
    with pytest.raises(NeedsError, match="problem"):
        xp.Sharded.load(sharded.folder).outcome(xp.forget(ids=[1]))
    with pytest.raises(UserError, match="backbone"):
        xp.Sharded.load(sharded.folder).module()

"""What methods for language models share: pairs of batches, the retain term, the pace, the reference."""

from __future__ import annotations

import pytest
import torch

import expunge as xp
from expunge.core.errors import SettingError
from expunge.core.runtime import Budget, Runtime
from expunge.core.view import View
from expunge.methods.text.npo import NPO
from expunge.train.reference import Reference
from expunge.train.text import Text
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts

FORGET = xp.forget(where="entity < 4")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return tinyfacts.problem(weights=tiny_llama().state_dict())


def view_of(problem, method):
    return View(problem, FORGET, method.needs, Runtime())


def test_pace_rises_and_falls():
    pace = NPO(warmup=0.2).pace(10)
    assert [round(pace(s), 3) for s in range(10)] == [
        0.5,
        1.0,
        1.0,
        0.875,
        0.75,
        0.625,
        0.5,
        0.375,
        0.25,
        0.125,
    ]
    assert [NPO(warmup=0, decay="none").pace(10)(s) for s in (0, 9)] == [1.0, 1.0]


def test_every_forget_sample_is_read_once_a_pass_beside_as_many_retain_samples(problem):
    method = NPO(batch_size=8)
    view = view_of(problem, method)
    pairs = list(method.pairs(view, Runtime(), 0))
    assert [len(f) for f, _ in pairs] == [len(r) for _, r in pairs] == [8, 8, 4]
    forget = torch.cat([f.ids for f, _ in pairs])
    assert sorted(forget.tolist()) == sorted(FORGET.resolve(problem.train).tolist())
    assert not torch.isin(torch.cat([r.ids for _, r in pairs]), forget).any()
    assert [r.ids.tolist() for _, r in method.pairs(view, Runtime(), 1)] != [
        r.ids.tolist() for _, r in pairs
    ]


def test_more_of_the_rest_may_be_rehearsed(problem):
    method = NPO(batch_size=8, rehearse=3)
    pairs = list(method.pairs(view_of(problem, method), Runtime(), 0))
    assert [(len(f), len(r)) for f, r in pairs] == [(8, 24), (8, 24), (4, 12)]


def test_the_divergence_from_the_original_is_zero_at_first_and_has_no_gradient(problem):
    method = NPO(retain="kl")
    view = view_of(problem, method)
    model = view.model()
    text = Text(view, Runtime(), method.original(view, model))
    loss = method.retain_loss(model, next(view.retain.batches(8)), text)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-5


@pytest.mark.parametrize("train", ["full", "lora(4)"])
def test_references_give_the_same_losses(problem, train):
    kinds = ["copy", "cache", *(["adapter"] if "lora" in train else [])]
    settings = {"epochs": 3, "lr": 5e-3, "batch_size": 7, "train": train}
    curves = []
    for kind in kinds:
        outcome = xp.unlearn(problem, FORGET, NPO(reference=kind, **settings))
        assert outcome.details["reference"] == kind
        curves.append(outcome.details["losses"]["forget"])
    assert len(curves[0]) == 3 * 3
    for other in curves[1:]:
        assert other == pytest.approx(curves[0], abs=1e-4)


def test_a_cache_of_several_processes_is_not_taken_for_a_whole_one(problem, tmp_path, monkeypatch):
    """Each of them keeps its share; a run that broke off may go on in one process."""
    method, folder = NPO(reference="cache"), Runtime(checkpoint=tmp_path)
    for processes in (2, 1):
        with monkeypatch.context() as patched:
            patched.setattr(Runtime, "processes", processes)
            view = View(problem, FORGET, method.needs, folder)
            model = view.model()
            reference = Reference(view, "cache", model, only_nll=True)
            compared = method.compared(Text(view, folder, reference))
            reference.fill(model, compared, folder, view.forget.ids)
    batch = view.forget.fetch(view.forget.ids)
    torch.testing.assert_close(
        reference.nll(model, batch), problem.token_nll(problem.model, batch)[0].detach()
    )


def test_a_cache_survives_in_the_folder_of_checkpoints(problem, tmp_path):
    method = NPO()
    view, runtime = view_of(problem, method), Runtime(checkpoint=tmp_path)
    model = view.model()
    batch = next(view.forget.batches(20))
    first = Reference(view, "cache", model, only_nll=True)
    first.fill(model, [("train", batch)], runtime, batch.ids)
    wanted = first.nll(model, batch)
    second = Reference(view, "cache", model, only_nll=True)
    second.fill(model, [], runtime, batch.ids)  # nothing but the file is left to ask
    assert torch.equal(second.nll(model, batch.rows(slice(3, 9))), wanted[3:9])


def test_what_a_reference_cannot_do_is_said(problem):
    with pytest.raises(SettingError, match=r"reference=adapter needs train=lora\(R\)"):
        xp.unlearn(problem, FORGET, NPO(reference="adapter"))
    with pytest.raises(SettingError, match="this method compares more"):
        xp.unlearn(problem, FORGET, NPO(reference="cache", retain="kl"))


def test_training_resumes_to_the_same_adapters(problem, tmp_path):
    settings = {"epochs": 4, "lr": 5e-3, "batch_size": 10, "train": "lora(4)"}
    whole = xp.unlearn(problem, FORGET, NPO(**settings))
    budget = xp.unlearn(
        problem, FORGET, NPO(**settings),
        runtime=Runtime(checkpoint=tmp_path, checkpoint_every=1, budget=Budget(steps=3)),
    )  # fmt: skip
    assert budget.details["steps"] == 3
    again = xp.unlearn(
        problem, FORGET, NPO(**settings), runtime=Runtime(checkpoint=tmp_path, checkpoint_every=1)
    )
    assert again.record["weights"] == whole.record["weights"]

"""TaskVector: the step from its formula, adapters, buffers, and invariant 9 of the card baselines-llm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import SettingError, UnchangedError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.task_vector import TaskVector, turn
from expunge.problems.causal_lm import CausalLM
from expunge.problems.classification import Classification
from expunge.train.adapters import merged
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts

FORGET = xp.forget(where="entity < 2")


@pytest.fixture
def facts():
    """An untrained Llama in float64 about the facts."""
    torch.manual_seed(0)
    train = tinyfacts.data().train
    return CausalLM(tiny_llama(16, 2).double(), train)


def moved(model, original):
    start = dict(original.named_parameters())
    return {n: p.detach() - start[n].detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_one_plain_step_reversed_is_ascent(facts, strength):
    """With one step of sgd, θ' = θ + a η ∇ mean loss; a sum over tokens or a + would show."""
    method = TaskVector(
        strength=strength, epochs=1, lr=0.1, step="sgd", momentum=0.0, clip=1e9, batch_size=99
    )
    outcome = xp.unlearn(facts, FORGET, method)
    model = copy.deepcopy(facts.model)
    batch = facts.train.fetch(FORGET.resolve(facts.train))
    facts.each_loss(model, batch).mean().backward()
    for name, change in moved(outcome.runnable(), facts.model).items():
        torch.testing.assert_close(
            change, strength * 0.1 * dict(model.named_parameters())[name].grad, atol=1e-9, rtol=1e-5
        )


def test_adapters_are_turned_by_the_same_rule(facts):
    method = TaskVector(strength=3.0, epochs=2, lr=1e-2, train="lora(2)")
    view = View(facts, FORGET, method.needs, Runtime())
    there = moved(merged(method.reinforced(view, Runtime()).runnable()), facts.model)
    outcome = xp.unlearn(facts, FORGET, method)
    back = moved(merged(outcome.runnable()), facts.model)
    assert outcome.change.kind == "adapter"
    assert max(float(v.abs().max()) for v in there.values()) > 1e-4
    for name, vector in there.items():
        torch.testing.assert_close(back[name], -3.0 * vector)
    batch = facts.train.fetch(facts.train.ids[:2])
    released = facts.token_logits(outcome.released(), batch)
    assert torch.equal(released, facts.token_logits(outcome.runnable(), batch))


def test_half_precision_is_rounded_once():
    torch.manual_seed(0)
    original = nn.Linear(64, 64)
    model = nn.Linear(64, 64)
    model.load_state_dict({
        n: v + 1e-3 * torch.randn_like(v) for n, v in original.state_dict().items()
    })
    original, model = original.bfloat16(), model.bfloat16()
    a, b = original.weight.float(), model.weight.float()
    turn(model, original, 2.7)
    assert torch.equal(model.weight, (a - 2.7 * (b - a)).bfloat16())


def test_running_statistics_stay_those_of_the_original():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    problem = Classification(net, (torch.randn(30, 4), torch.arange(30) % 3))
    settings = {"epochs": 2, "lr": 0.1, "step": "sgd", "batch_size": 5}
    kept = problem.model[1].state_dict()
    for norm in ("train", "frozen", "recalibrate"):
        model = xp.unlearn(
            problem, xp.forget(label=1), TaskVector(norm=norm, **settings)
        ).runnable()
        same = torch.equal(model[1].running_mean, kept["running_mean"])
        assert same == (norm != "recalibrate")
        assert not torch.equal(model[0].weight, problem.model[0].weight)
    hidden = model[0](problem.train.fetch(problem.train.ids[torch.arange(30) % 3 != 1]).x)
    torch.testing.assert_close(model[1].running_mean, hidden.mean(0), atol=1e-5, rtol=1e-4)


def test_baselines_llm_invariant_9_a_step_of_nothing_is_the_identity(facts):
    model = copy.deepcopy(facts.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    turn(model, facts.model, 0.0)
    for name, value in facts.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_baselines_llm_invariant_9_a_step_of_nothing_is_refused(facts):
    with pytest.raises(SettingError, match="strength must be above 0"):
        TaskVector(strength=0.0)
    with pytest.raises(UnchangedError, match="task-vector returned the original weights"):
        xp.unlearn(facts, FORGET, TaskVector(strength=1e-30, epochs=1))


def test_what_is_frozen_keeps_its_bits(facts):
    outcome = xp.unlearn(facts, FORGET, TaskVector(train="last(1)", epochs=2, lr=1e-2))
    assert set(outcome.change.tensors) == {"lm_head.weight"}


def test_it_reads_no_retain_data(facts):
    assert TaskVector().needs.words() == ["forget data", "forget labels", "original model"]
    assert TaskVector(train="lora(2)").needs.words() == ["forget data", "forget labels"]
    outcome = xp.unlearn(facts, FORGET, TaskVector(epochs=3))
    assert outcome.cost.samples == outcome.cost.gradients == 3 * 10
    assert outcome.details["vector_norm"] > 0

"""DPO: the factor 2 / β, the turns of alternates, and where there are none."""

from __future__ import annotations

import copy

import pytest
import torch

import expunge as xp
from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.dpo import DPO
from expunge.problems.causal_lm import CausalLM
from expunge.workloads.tinyfacts import splits, tiny_llama

FORGET = xp.forget(where="entity < 2")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return CausalLM(tiny_llama(16, 1), splits().train)


def first_gradient(problem, beta):
    method = DPO(beta=beta)
    view = View(problem, FORGET, method.needs, Runtime())
    model = view.model()
    method.forget_loss(
        model, next(view.forget.batches(10)), method.text(view, Runtime(), model)
    ).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_first_gradient_does_not_depend_on_beta(problem):
    """At the original it is that of the mean of N_w − N_l, since 2 / β · β σ(0) = 1."""
    batch = problem.train.fetch(FORGET.resolve(problem.train))
    won = problem.alternates(batch)
    lost_sum, won_sum = (problem.token_nll(problem.model, b)[0].sum(1) for b in (batch, won))
    wanted = torch.autograd.grad((won_sum - lost_sum).mean(), list(problem.model.parameters()))
    wanted = torch.cat([g.flatten() for g in wanted])
    for beta in (0.05, 1.0):
        torch.testing.assert_close(first_gradient(problem, beta), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reference", ["copy", "cache"])
def test_alternates_come_in_turn(problem, monkeypatch, reference):
    seen = []
    inner = type(problem).alternates

    def noted(self, batch, turn=0):
        seen.append(turn)
        return inner(self, batch, turn)

    monkeypatch.setattr(type(problem), "alternates", noted)
    method = DPO(epochs=5, batch_size=10, alternates=3, reference=reference)
    xp.unlearn(problem, FORGET, method)
    if reference == "cache":
        assert seen[:3] == [0, 1, 2]
    assert seen[-7:] == [0, 1, 2, 0, 1, 0, 0]  # at the end the first ones are looked at


def test_copy_and_cache_give_the_same_losses(problem):
    curves = [
        xp.unlearn(problem, FORGET, DPO(epochs=4, batch_size=7, lr=5e-3, alternates=3, reference=kind))
        .details["losses"]["forget"]
        for kind in ("copy", "cache")
    ]  # fmt: skip
    assert len(curves[0]) == 8 and curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert len({round(x, 3) for x in curves[0]}) > 4


def test_data_without_alternates_is_said(problem):
    bare = copy.copy(problem)
    bare.train = copy.copy(problem.train)  # the data is shared between tests
    bare.train.alternates = None
    with pytest.raises(
        NeedsError, match="no alternate answers; give each sample a column `alternate`"
    ):
        xp.unlearn(bare, FORGET, DPO())

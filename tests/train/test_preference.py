"""Preference losses: invariant 4 of the card baselines-llm, and the formula on a real batch."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.dpo import DPO
from expunge.methods.text.npo import npo
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.preference import preference

MARGINS = torch.tensor([-6.0, -0.5, 0.0, 2.0, 9.0], dtype=torch.float64)


def model_of(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


def row(prompt, answer, seed):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 30, (prompt + answer,), generator=rng)
    return Tokens(ids, torch.arange(len(ids)) >= prompt)


@pytest.fixture
def problem():
    rows = [row(3, 2, 0), row(5, 1, 1), row(2, 4, 2), row(4, 3, 3)]
    others = [[row(3, 5, 10)], [row(5, 2, 11)], [row(2, 1, 12)], [row(4, 3, 13)]]
    return CausalLM(model_of(0), TokenData(rows, alternates=others))


def trained_on(problem, method):
    view = View(problem, Request(ids=(0, 1, 2)), method.needs, Runtime())
    text = method.text(view, Runtime(), model_of(1))
    return view, text


@torch.no_grad()
def summed(model, tokens):
    """−log p of the answer by itself, without padding."""
    logp = model(input_ids=tokens.ids[None]).logits[0].log_softmax(-1)
    return -sum(logp[t - 1, tokens.ids[t]] for t in range(len(tokens)) if tokens.answered[t])


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 4.5])
def test_preference_is_its_formula(beta):
    wanted = [2 / beta * math.log1p(math.exp(-beta * m)) for m in MARGINS.tolist()]
    torch.testing.assert_close(preference(MARGINS, beta), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("beta", [0.1, 1.5])
def test_the_loss_is_its_formula_whatever_shares_a_batch(problem, size, beta):
    method = DPO(beta=beta)
    view, text = trained_on(problem, method)
    model = model_of(1)
    for batch in view.forget.batches(size):
        found = method.forget_loss(model, batch, text)
        each = []
        for i in batch.ids.tolist():
            lost, won = problem.train.rows[i], problem.train.alternates[i][0]
            margin = (summed(model, lost) - summed(problem.model, lost)) - (
                summed(model, won) - summed(problem.model, won)
            )
            each.append(2 / beta * math.log1p(math.exp(-beta * float(margin))))
        assert float(found.detach()) == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_baselines_llm_invariant_4_the_same_answer_on_both_sides_has_no_gradient(problem, beta):
    method = DPO(beta=beta)
    problem.train.alternates = [[r] for r in problem.train.rows]
    view, text = trained_on(problem, method)
    model = model_of(1)
    loss = method.forget_loss(model, next(view.forget.batches(3)), text)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2 * math.log(2) / beta, rel=1e-6)
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-6


def test_baselines_llm_invariant_4_without_a_preferred_answer_it_is_npo():
    mine, theirs = MARGINS + 3, torch.full_like(MARGINS, 3)
    for beta in (0.1, 1.0):
        torch.testing.assert_close(preference(mine - theirs, beta), npo(mine, theirs, beta))


def test_alternates_are_counted_as_gradients(problem):
    method = DPO()
    view, text = trained_on(problem, method)
    method.forget_loss(model_of(1), next(view.forget.batches(3)), text)
    assert text.runtime.cost.gradients == 3

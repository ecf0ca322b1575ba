"""Gradient checkpointing: the same weights, activations computed anew, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import expunge as xp
from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.recompute import recomputes


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    ))  # fmt: skip
    rows = [Tokens(torch.arange(3, 9) + n, torch.arange(6) >= 2) for n in range(6)]
    return xp.CausalLM(model, TokenData(rows))


def passes_through(problem, method, again):
    """Outcome of a method, and how often a block was asked with gradient."""
    calls = []
    block = type(problem.model.model.layers[0].mlp)
    forward = block.forward

    def counted(self, x):
        calls.append(torch.is_grad_enabled())
        return forward(self, x)

    block.forward = counted
    try:
        runtime = Runtime(gradient_checkpointing=again)
        outcome = xp.unlearn(problem, xp.forget(ids=[0, 1]), method, runtime=runtime)
    finally:
        block.forward = forward
    return outcome, sum(calls)


@pytest.mark.parametrize("train", ["full", "lora(2)"])
def test_weights_are_the_same_and_blocks_are_asked_again(problem, train):
    method = xp.methods.GradDiff(epochs=1, lr=0.1, step="sgd", batch_size=2, train=train)
    plain, once = passes_through(problem, method, False)
    again, twice = passes_through(problem, method, True)
    for one, other in zip(plain.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert twice == 2 * once
    assert not recomputes(again.model) and not recomputes(problem.model)
    assert not again.model.get_input_embeddings()._forward_hooks
    assert again.record["runtime"]["gradient_checkpointing"] is True
    assert "gradient_checkpointing" not in plain.record["runtime"]


def test_a_model_without_it_is_refused():
    torch.manual_seed(0)
    problem = xp.Classification(nn.Linear(4, 3), (torch.randn(9, 4), torch.arange(9) % 3))
    with pytest.raises(NeedsError, match="Linear offers no gradient checkpointing"):
        xp.unlearn(
            problem, xp.forget(label=0), xp.methods.FineTune(epochs=1),
            runtime=Runtime(gradient_checkpointing=True),
        )  # fmt: skip

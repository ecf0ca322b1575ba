"""A tiny language model in float64 and four sequences of unequal lengths, for tests of losses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import expunge as xp
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.text import Text

# an initial range this wide makes the model sure enough of some tokens for terms to differ
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    attn_implementation="sdpa",
)  # fmt: skip
LENGTHS = ((3, 2), (5, 1), (2, 4), (4, 3))
"""Tokens of prompts and of answers."""


def build(seed):
    """A model of its own; seed 0 is the original."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG).eval().double()


def answers(model, rows):
    """Logits [n, V] of every answered token, each sequence by itself, and the tokens [n]."""
    logits, tokens = [], []
    for row in rows:
        found = model(input_ids=row.ids[None]).logits[0]
        for t in row.answered.nonzero()[:, 0].tolist():
            logits.append(found[t - 1])
            tokens.append(row.ids[t])
    return torch.stack(logits).detach(), torch.stack(tokens)


@pytest.fixture(name="build")
def _build():
    return build


@pytest.fixture(name="answers")
def _answers():
    return answers


@pytest.fixture
def tiny_rows():
    rng = torch.Generator().manual_seed(0)
    return [
        Tokens(torch.randint(3, 40, (p + a,), generator=rng), torch.arange(p + a) >= p)
        for p, a in LENGTHS
    ]


@pytest.fixture
def tiny(tiny_rows):
    return CausalLM(build(0), TokenData(tiny_rows, alternates=[[r] for r in tiny_rows[::-1]]))


@pytest.fixture
def losses(tiny):
    """Forget and retain terms of a method's loss of sequences 0 to 2, in one batch."""

    def terms(method, model):
        view = View(tiny, xp.forget(ids=[0, 1, 2]), method.needs, Runtime())
        text = Text(view, Runtime(), method.original(view, view.model()))
        batch = tiny.train.fetch(torch.arange(3))
        retain = method.retain_loss(model, batch, text) if method.keeps else None
        return method.forget_loss(model, batch, text), retain

    return terms

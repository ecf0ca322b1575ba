"""Packed batches give the numbers of padded ones, and no sequence sees another."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
)

import expunge as xp
from expunge.core.errors import ModelError
from expunge.problems.causal_lm import CausalLM
from expunge.problems.packing import packed_logits
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.token_losses import IGNORED

SIZE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZE | {"num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=3),
    "mistral": MistralConfig(**GROUPED, sliding_window=3),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
    "neox": GPTNeoXConfig(**SIZE),
    "phi": PhiConfig(**SIZE),
}  # fmt: skip


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()


@pytest.fixture
def data():
    drawn = torch.Generator().manual_seed(3)
    lengths = (3, 9, 2, 6)
    return TokenData([
        Tokens(torch.randint(3, 40, (n,), generator=drawn), torch.arange(n) >= n // 2)
        for n in lengths
    ])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_logits_and_gradients_are_the_padded_ones(name, train, data):
    model = model_of(name)
    packed, padded = CausalLM(model, data, packing=True), CausalLM(model, data)
    batch = data.fetch(data.ids)
    for problem in (packed, padded):
        problem.model.train(train)
    found, wanted = (p.token_nll(p.model, batch)[0] for p in (packed, padded))
    torch.testing.assert_close(found, wanted)
    by_hand = torch.stack([p.each_loss(p.model, batch) for p in (packed, padded)])
    each = wanted.sum(1) / (batch.y[:, 1:] != IGNORED).sum(1)
    torch.testing.assert_close(by_hand, torch.stack([each, each]))
    for one, other in zip(
        torch.autograd.grad(found.sum(), list(packed.model.parameters())),
        torch.autograd.grad(wanted.sum(), list(padded.model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_does_not_see_its_neighbours(name, data):
    model = model_of(name)
    batch = data.fetch(data.ids)
    before = packed_logits(model, batch.x)
    batch.x["input_ids"][0] = batch.x["input_ids"][0].flip(0) + 1
    after = packed_logits(model, batch.x)
    assert bool((before[0] != after[0]).any())
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=1e-5)


def test_no_padding_is_asked_about(data):
    problem = CausalLM(model_of("llama"), data, packing=True)
    seen = []
    problem.model.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    problem.each_loss(problem.model, data.fetch(data.ids))
    problem.each_loss(problem.model, data.fetch(data.ids[1:2]))  # nothing to pack
    assert seen == [(1, 20), (1, 9)]


def test_unlearning_with_packing_gives_the_weights_without(data):
    models = []
    for packing in (False, True):
        problem = CausalLM(model_of("llama").double(), data, packing=packing)
        method = xp.methods.NPO(epochs=2, lr=0.1, step="sgd", batch_size=2)
        models.append(xp.unlearn(problem, xp.forget(ids=[0, 1]), method).runnable())
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other)


class Mixing(torch.nn.Module):
    """Ignores positions, so that a packed sequence sees those before it."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(40, 40)

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=True):
        mixed = self.table(input_ids).cumsum(1)
        return type("Output", (), {"logits": mixed})()


class Plain(Mixing):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids)


def test_a_model_that_cannot_be_packed_is_refused(data):
    with pytest.raises(ModelError, match="packed sequences see each other"):
        CausalLM(Mixing(), data, packing=True).check()
    with pytest.raises(ModelError, match=r"takes no packed sequences .*leave packing off"):
        CausalLM(Plain(), data, packing=True).check()
    CausalLM(Mixing(), data).check()


def test_labels_at_padding_stay_ignored(data):
    batch = data.fetch(data.ids)
    assert bool((batch.y[batch.x["attention_mask"] == 0] == IGNORED).all())

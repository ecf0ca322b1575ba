"""CausalLM: losses from the formula, roles of families, generation, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
)

from expunge.core.errors import DataError, ModelError, SettingError
from expunge.problems.causal_lm import CausalLM
from expunge.problems.generation import generate
from expunge.problems.lm_roles import lm_roles
from expunge.problems.tokens import TokenData, Tokens
from generated import without_cache

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
)
NEOX = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def rows(lengths=((3, 2), (5, 1), (2, 4))):
    rng = torch.Generator().manual_seed(0)
    return [
        Tokens(torch.randint(3, 40, (p + a,), generator=rng), torch.arange(p + a) >= p)
        for p, a in lengths
    ]


@pytest.fixture
def problem():
    return CausalLM(model_of(LlamaConfig(**SMALL), torch.float64), TokenData(rows()))


@pytest.mark.parametrize("size", [1, 2, 3])
@torch.no_grad()
def test_losses_are_those_of_each_sequence_by_itself(problem, size):
    """Whatever shares its batch, and however much padding there is."""
    for batch in problem.train.batches(size):
        nll, mask = problem.token_nll(problem.model, batch)
        losses = problem.each_loss(problem.model, batch)
        for n, place in enumerate(batch.ids.tolist()):
            row = problem.train.rows[place]
            logp = problem.model(input_ids=row.ids[None]).logits[0].log_softmax(-1)
            by_hand = [-float(logp[t - 1, row.ids[t]]) for t in range(len(row)) if row.answered[t]]
            assert nll[n][mask[n]].tolist() == pytest.approx(by_hand, abs=1e-5)
            assert float(losses[n].detach()) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
            assert not nll[n][~mask[n]].any()


FAMILIES = {
    "llama": (LlamaConfig(**SMALL), 7, "mlp.down_proj"),
    "qwen2": (Qwen2Config(**SMALL), 7, "mlp.down_proj"),
    "gemma2": (Gemma2Config(**SMALL, head_dim=8), 7, "mlp.down_proj"),
    "phi": (PhiConfig(**SMALL), 6, "mlp.fc2"),
    "gpt2": (GPT2, 4, "mlp.c_proj"),
    "gpt-neox": (GPTNeoXConfig(**NEOX), 4, "mlp.dense_4h_to_h"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_of_families(family):
    config, linear, out = FAMILIES[family]
    roles = lm_roles(model_of(config))
    assert len(roles["blocks"]) == 2
    assert len(roles["linear"]) == 2 * linear
    assert roles["mlp out"] == [f"{block}.{out}" for block in roles["blocks"]]
    assert len(roles["embeddings"]) == len(roles["last layer"]) == 1
    inside = [n for r in ("attention in", "attention out", "mlp in", "mlp out") for n in roles[r]]
    assert sorted(inside) == sorted(roles["linear"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_generation_equals_that_of_each_prompt_without_a_cache(family):
    model = model_of(FAMILIES[family][0])
    prompts = [r.ids for r in rows(((2, 1), (6, 1), (3, 1), (5, 1)))]
    # a token that one of them says ends a text
    ends = [without_cache(model, prompts[1], 6)[2]]
    for size in (1, 3):
        found = generate(model, prompts, tokens=6, ends=ends, batch_size=size)
        assert [f.tolist() for f in found] == [without_cache(model, p, 6, ends) for p in prompts]
    assert len(found[1]) <= 2 and not model.training


class Behind(torch.nn.Module):
    """A model behind another module, which might remember its rows: they stay where they are."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_rows_that_ended_make_room_and_change_nothing(family, temperature):
    """22 prompts of which some end early, in batches of 8: the same as one by one, in fewer steps."""
    model = model_of(FAMILIES[family][0])
    drawn = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 40, (2 + n % 7,), generator=drawn) for n in range(22)]
    heat = {"temperature": temperature, "tokens": 12}
    free = generate(model, prompts, ends=[], batch_size=1, seeds=range(22), **heat)
    ends = sorted({int(f[2]) for f in free[:6]})
    wanted = [
        generate(model, [p], ends=ends, seeds=[n], **heat)[0].tolist()
        for n, p in enumerate(prompts)
    ]
    assert len({len(w) for w in wanted}) > 2
    steps = {}
    for name, one in (("alone", model), ("behind", Behind(model))):
        calls = []
        hook = model.register_forward_pre_hook(
            lambda _m, _a, given, calls=calls: calls.append(len(given["input_ids"])),
            with_kwargs=True,
        )
        found = generate(one, prompts, ends=ends, batch_size=8, seeds=range(22), **heat)
        hook.remove()
        assert [f.tolist() for f in found] == wanted
        assert max(calls) <= 8 + 2
        steps[name] = sum(calls)
    if family == "gemma2":  # a cache of a sliding window is not cut
        assert steps["alone"] == steps["behind"]
    else:
        assert steps["alone"] < steps["behind"]


def test_generation_ends_where_the_context_does():
    model = model_of(FAMILIES["llama"][0])
    prompts = [torch.full((n,), 5) for n in (3, 29, 31, 32)]
    found = generate(model, prompts, tokens=6, ends=[], context=32)
    assert [len(f) for f in found] == [6, 3, 1, 1]


def test_generation_of_no_tokens_or_no_prompts():
    model = model_of(FAMILIES["llama"][0])
    prompts = [torch.tensor([5, 6]), torch.tensor([7])]
    for context in (None, 2):
        assert [len(f) for f in generate(model, prompts, tokens=0, ends=[], context=context)] == [0, 0]  # fmt: skip
    assert generate(model, [], tokens=3, ends=[]) == []
    with pytest.raises(DataError, match="a prompt has no tokens"):
        generate(model, [*prompts, prompts[0][:0]], tokens=3, ends=[])


def test_draws_need_a_seed_for_each_prompt():
    model = model_of(FAMILIES["llama"][0])
    prompts = [torch.tensor([5, 6]), torch.tensor([7])]
    for seeds in ([], [1]):
        with pytest.raises(SettingError, match=f"one seed a prompt: {len(seeds)} seeds for 2"):
            generate(model, prompts, tokens=3, ends=[], temperature=1.0, seeds=seeds)


def test_features_leave_padding_out(problem):
    alone = [
        problem.features(problem.model, problem.train.fetch(torch.tensor([i])), problem.layers())
        for i in range(3)
    ]
    together = problem.features(
        problem.model, problem.train.fetch(torch.arange(3)), problem.layers()
    )
    for n, one in enumerate(alone):
        for layer, value in one.items():
            torch.testing.assert_close(together[layer][n], value[0])


def test_what_does_not_fit_is_said_before_any_work(problem):
    model = problem.model
    beyond = Tokens(torch.tensor([3, 99]), torch.tensor([False, True]))
    with pytest.raises(DataError, match="token id 99 is beyond the model's vocabulary of 40"):
        CausalLM(model, TokenData([beyond])).check()
    long = Tokens(torch.full((40,), 3), torch.ones(40, dtype=torch.bool))
    with pytest.raises(
        DataError, match=r"40 tokens, the model's context 32; encode it with max_length="
    ):
        CausalLM(model, TokenData([long])).check()
    with pytest.raises(DataError, match="needs TokenData"):
        CausalLM(model, (torch.zeros(3, 4), torch.zeros(3)))
    broken = model_of(LlamaConfig(**SMALL))
    broken.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinite logits"):
        CausalLM(broken, TokenData(rows())).check()


def test_drawn_tokens_follow_the_softmax_at_a_temperature():
    model, prompt = model_of(FAMILIES["llama"][0]), torch.tensor([5, 6, 7])
    count, temperature = 4000, 0.05
    with torch.no_grad():
        wanted = (model(prompt[None]).logits[0, -1].double() / temperature).softmax(-1)
    assert float(wanted.max()) < 0.9  # or else a greedy choice would pass
    found = generate(
        model, [prompt] * count, tokens=1, ends=[], batch_size=1000,
        temperature=temperature, seeds=range(count),
    )  # fmt: skip
    shares = torch.cat(found).bincount(minlength=40) / count
    assert float((shares - wanted).abs().max()) < 4 * 0.5 / count**0.5


def test_what_is_drawn_depends_on_a_prompt_s_own_seed_only():
    model = model_of(FAMILIES["llama"][0])
    prompts, seeds = [r.ids for r in rows(((2, 1), (6, 1), (3, 1), (5, 1)))], [3, 1, 4, 1]
    more = {"tokens": 5, "ends": [], "temperature": 1.0}
    together = generate(model, prompts, seeds=seeds, batch_size=3, **more)
    alone = [
        generate(model, [p], seeds=[s], **more)[0] for p, s in zip(prompts, seeds, strict=True)
    ]
    assert [t.tolist() for t in together] == [a.tolist() for a in alone]
    assert generate(model, prompts[:1], seeds=[9], **more)[0].tolist() != alone[0].tolist()

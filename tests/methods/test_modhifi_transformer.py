"""ModHiFi on transformers: neurons and heads of Llama, GPT-2 and ViT; the card's invariants there."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    ViTConfig,
    ViTForImageClassification,
)

import expunge as xp
from expunge.core.data import Batch
from expunge.core.errors import ModelError, NeedsError, SettingError
from expunge.curvature.fidelity import by_output, contributions, keep_inputs
from expunge.methods.general.modhifi_u import ModHiFiU
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.hifi_transformer import (
    prune_transformer,
    real_tokens,
    take_out,
    transformer_fidelity,
)

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=16, n_inner=24, n_layer=2, n_head=4, n_positions=32,
        bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    ),
    "vit": ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        image_size=8, patch_size=2, num_channels=1, num_labels=4, initializer_range=0.3,
    ),
}  # fmt: skip


def model_of(kind):
    torch.manual_seed(0)
    config = CONFIGS[kind]
    if kind == "vit":
        return ViTForImageClassification(config).eval()
    return AutoModelForCausalLM.from_config(config).eval()


def batch_of(kind, count=12, seed=0):
    """Sequences of unequal lengths, or images."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "vit":
        x = torch.randn(count, 1, 8, 8, generator=rng)
        return Batch(x, None, torch.arange(count), count)
    lengths = [6 + n % 5 for n in range(count)]
    rows = [
        Tokens(torch.randint(3, 40, (n,), generator=rng), torch.ones(n, dtype=torch.bool))
        for n in lengths
    ]
    return TokenData(rows).fetch(torch.arange(count))


def forward_of(model):
    return lambda b: model(b.x) if isinstance(b.x, torch.Tensor) else model(**b.x)


def counted_of(kind):
    return None if kind == "vit" else real_tokens


def logits(kind, model, batch):
    """Of real tokens alone, [n, V]."""
    with torch.no_grad():
        found = forward_of(model)(batch).logits
    return found if kind == "vit" else found[real_tokens(batch)]


def fidelities(kind, model, batch):
    return transformer_fidelity(model, [batch], forward_of(model), counted_of(kind))


KINDS = pytest.mark.parametrize("kind", list(CONFIGS))


@KINDS
def test_modhifi_invariant_7_neurons_and_heads_equal_explicit_contributions(kind):
    """Of real tokens alone: what padding reads does not count."""
    model, batch = model_of(kind), batch_of(kind)
    found, read = fidelities(kind, model, batch), {}
    assert len(found) == 4
    assert [c.weight.shape[1] for c in found.values()] == [4, 24, 4, 24]  # attention comes first
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _m, a, n=n: read.__setitem__(n, a[0].detach())
        )
        for n in found
    ]
    logits(kind, model, batch)
    for handle in handles:
        handle.remove()
    for name, one in found.items():
        x = read[name].flatten(0, 1) if kind == "vit" else read[name][real_tokens(batch)]
        assert one.samples == len(x)
        weight = by_output(model.get_submodule(name)).detach()
        size = weight.shape[1] // one.weight.shape[1]
        for c in (0, 7):
            a = (x * weight[c]).double().unflatten(1, (-1, size)).sum(2)
            assert one.gram(c).allclose(a.T @ a, rtol=1e-4, atol=1e-6)


@KINDS
def test_modhifi_invariant_1_and_5_of_neurons_and_heads(kind):
    found = fidelities(kind, model_of(kind), batch_of(kind))
    for one in found.values():
        s, count = one.singleton(), one.weight.shape[1]
        assert float(s.min()) >= 0 and float(s.max()) <= 1
        assert one.fidelity(0, torch.arange(count))[0] == pytest.approx(1, abs=1e-6)
        alone = one.fidelity(3, torch.tensor([2]))[0]
        assert alone == pytest.approx(float(s[3, 2]), abs=1e-5)
        grown = [one.fidelity(0, torch.arange(k))[0] for k in range(1, count + 1)]
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(grown))


@KINDS
def test_modhifi_invariant_5_compensation_of_all_outputs_at_once_is_that_of_each(kind):
    """One solve in place of one an output, and never more error than without."""
    model, batch = model_of(kind), batch_of(kind, 40)
    kept = torch.arange(0, 24, 2)
    for name, one in fidelities(kind, model, batch).items():
        places = kept if one.weight.shape[1] == 24 else torch.tensor([0, 3])
        module = copy.deepcopy(model.get_submodule(name))
        keep_inputs(module, one, places)
        new = by_output(module).detach().reshape(one.weight.shape)
        assert not new[:, [i for i in range(new.shape[1]) if i not in places]].any()
        for c in range(16):
            scales = one.fidelity(c, places)[1][:, None]
            by_hand = one.weight[c, places].double() * scales
            assert new[c, places].double().allclose(by_hand, rtol=1e-3, atol=1e-4)
        flat, old = new.flatten(1).double(), one.weight.flatten(1).double()
        bare = torch.zeros_like(one.weight)
        bare[:, places] = one.weight[:, places]
        errors = [((old - w) @ one.moment * (old - w)).sum(1) for w in (flat, bare.flatten(1))]
        assert bool((errors[0] <= errors[1] * (1 + 1e-6) + 1e-9).all())


def test_modhifi_weights_of_zero_stay_zero():
    """δ* scales weights: where one is 0 already, nothing may come in its place."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[1, 2] = 0
    x = torch.randn(50, 6)
    batch = Batch(x, None, torch.arange(50), 50)
    found = contributions(nn.Sequential(layer), "0", [batch], lambda b: layer(b.x))
    keep_inputs(layer, found, torch.tensor([0, 2, 4]))
    assert float(layer.weight[1, 2].detach()) == 0 and bool(layer.weight[0, [0, 2, 4]].all())


@KINDS
@pytest.mark.parametrize("shares", [{"neurons": 0.5}, {"heads": 0.5}, {"neurons": 0.5, "heads": 0.5}], ids=str)  # fmt: skip
def test_modhifi_p_keeps_the_best_and_compensation_helps(kind, shares):
    model, batch, errors = model_of(kind), batch_of(kind, 60), {}
    other = batch_of(kind, 30, seed=1)
    first = next(iter(fidelities(kind, model, batch).items()))
    for compensate in (False, True):
        pruned = copy.deepcopy(model)
        kept = prune_transformer(
            pruned, lambda: [batch], forward_of(pruned), **shares, compensate=compensate,
            counted=counted_of(kind),
        )  # fmt: skip
        assert len(kept) == 2 * len(shares)
        for name, places in kept.items():
            weight = by_output(pruned.get_submodule(name)).detach()
            count = 24 if weight.shape[1] == 24 else 4
            columns = weight.reshape(16, count, -1).ne(0).any(2).any(0)
            assert torch.equal(columns.nonzero()[:, 0], places) and len(places) == count // 2
        if first[0] in kept:  # measured on the model before any pruning
            assert set(kept[first[0]].tolist()) == set(first[1].channels().topk(2).indices.tolist())
        difference = logits(kind, pruned, other) - logits(kind, model, other)
        errors[compensate] = float(difference.square().mean())
    # what each layer gives is nearer for sure; what untrained blocks behind it make of that is not
    assert errors[True] < errors[False] * (1 if "neurons" in shares else 1.05)
    changed = {n for n, p in pruned.state_dict().items() if not torch.equal(p, model.state_dict()[n])}  # fmt: skip
    assert changed == {f"{name}.weight" for name in kept}


@KINDS
def test_modhifi_p_neurons_can_be_taken_out(kind, tmp_path):
    model, batch = model_of(kind), batch_of(kind, 40)
    kept = prune_transformer(
        model, lambda: [batch], forward_of(model), neurons=0.25, heads=0.5, counted=counted_of(kind)
    )
    small = take_out(model, kept)
    assert logits(kind, small, batch).allclose(logits(kind, model, batch), atol=1e-5)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, model)]
    matrices = 3 if kind == "llama" else 2
    biases = 0 if kind == "llama" else 18
    assert sizes[1] - sizes[0] == 2 * (matrices * 18 * 16 + biases)
    small.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path).eval()
    assert logits(kind, again, batch).allclose(logits(kind, model, batch), atol=1e-5)


def test_modhifi_p_keeping_all_does_nothing():
    model = model_of("llama")
    before = copy.deepcopy(model.state_dict())
    assert prune_transformer(model, list, forward_of(model)) == {}
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert logits("llama", take_out(model, {}), batch_of("llama")).shape[1] == 40


def test_modhifi_p_what_it_cannot_do_is_said():
    model, batch = model_of("llama"), batch_of("llama")
    for share in (0.0, 1.5):
        with pytest.raises(SettingError, match="share of neurons"):
            prune_transformer(model, lambda: [batch], forward_of(model), neurons=share)
        with pytest.raises(SettingError, match="share of heads"):
            prune_transformer(model, lambda: [batch], forward_of(model), heads=share)
    with pytest.raises(NeedsError, match="prune layers by name"):
        prune_transformer(nn.Linear(3, 3), list, print, neurons=0.5)
    with pytest.raises(ModelError, match="was not run"):
        prune_transformer(model, list, forward_of(model), neurons=0.5)
    headless = copy.deepcopy(model)
    headless.config.num_attention_heads = 5
    with pytest.raises(NeedsError, match="how many heads"):
        prune_transformer(headless, lambda: [batch], forward_of(model), heads=0.5)
    found = contributions(model, "model.layers.0.mlp.down_proj", [batch], forward_of(model))
    with pytest.raises(SettingError, match="no groups of 7"):
        found.grouped(7)
    torch.manual_seed(0)
    fused = AutoModelForCausalLM.from_config(Phi3Config(**SMALL)).eval()
    kept = prune_transformer(fused, lambda: [batch], forward_of(fused), neurons=0.5)
    with pytest.raises(NeedsError, match="leave them masked"):
        take_out(fused, kept)


# ---------------------------------------------------------------- ModHiFi-U


def test_modhifi_invariant_6_feed_forward_outputs_of_a_vit_by_their_role():
    """Only the neurons of the chosen block change, as many as the budget says; no retain data."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 4
    problem = xp.Classification(model_of("vit"), (x, y))
    layers = problem.role("mlp out")
    assert len(layers) == 2 and len(problem.role("blocks")) == 2
    assert problem.role("last layer") == ["classifier"]
    with pytest.raises(NeedsError, match="no module of this model is known as 'gate'"):
        problem.role("gate")
    method = ModHiFiU(layers="role(mlp out, 1)", budget=0.25)
    outcome = xp.unlearn(problem, xp.forget(label=2), method)
    original, edited = problem.model.state_dict(), outcome.runnable().state_dict()
    name = f"{layers[1]}.weight"
    changed = {n for n, p in edited.items() if not torch.equal(p, original[n])}
    assert changed == {name} and outcome.details["deleted"] == {layers[1]: 6}
    gone = edited[name].eq(0).all(0)
    batch = Batch(x[y == 2], None, torch.arange(10), 10)
    found = transformer_fidelity(problem.model, [batch], forward_of(problem.model))[layers[1]]
    assert set(gone.nonzero()[:, 0].tolist()) == set(found.channels().topk(6).indices.tolist())
    assert torch.equal(edited[name][:, ~gone], original[name][:, ~gone])
    assert outcome.cost.gradients == 0 and outcome.cost.samples == 10

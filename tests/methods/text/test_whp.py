"""WHP: logits from the formula, two caches, storage, and invariant 9 of the card baselines-llm."""

from __future__ import annotations

import copy

import pytest
import torch

import expunge as xp
from expunge.core.errors import ModelError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.outcome import Weights, Wrapper, load
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.whp import WHP, LoweredLogits, lower
from expunge.problems.causal_lm import CausalLM
from expunge.problems.generation import generate
from expunge.train.adapters import adapter_of, attach
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts

FORGET = xp.forget(where="entity < 2")


def llama(seed, scale=1.0):
    torch.manual_seed(seed)
    model = tiny_llama(16, 2).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.ndim == 2 else 1.0)
    return model


@pytest.fixture
def facts():
    """An untrained Llama about the facts."""
    return CausalLM(llama(0), tinyfacts.data().train)


def whp(**settings):
    return WHP(**({"epochs": 3, "lr": 3e-2, "strength": 2.0} | settings))


@pytest.fixture
def pair():
    """A wrapper of two unrelated models, which disagree everywhere."""
    first, second = llama(0, 10.0), llama(1, 40.0)
    tensors = {f"reinforced/{n}": t for n, t in Weights.between(first, second).tensors.items()}
    return first, second, LoweredLogits(first, torch.tensor(1.5), **tensors).eval()


def test_logits_are_those_of_the_formula():
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    found = lower(first, second, 2.5)
    for place in torch.cartesian_prod(*map(torch.arange, first.shape)).tolist():
        a, b = float(first[tuple(place)]), float(second[tuple(place)])
        wanted = a - 2.5 * (b - a) if b > a else a
        assert float(found[tuple(place)]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 5.0])
def test_baselines_llm_invariant_9_no_logit_is_raised(dtype, strength):
    torch.manual_seed(0)
    first, second = 10 * torch.randn(2, 4, 9, 30).to(dtype)
    found = lower(first, second, torch.tensor(strength))
    assert found.dtype == dtype and (found <= first).all()
    assert torch.equal(found[second <= first], first[second <= first])
    assert (found < first).any() and torch.equal(lower(first, first, strength), first)


def test_baselines_llm_invariant_9_a_strength_of_nothing_is_refused():
    with pytest.raises(SettingError, match="strength must be above 0"):
        WHP(strength=0)


def test_both_models_read_the_same_padded_batch(pair, facts):
    first, second, both = pair
    batch = facts.train.fetch(facts.train.ids[:3])
    batch.x["attention_mask"][0, -2:] = 0
    with torch.no_grad():
        a, b, found = (facts.token_logits(m, batch) for m in (first, second, both))
    torch.testing.assert_close(found, a - 1.5 * (b - a).clamp(min=0))
    assert not torch.equal(found, a)


def test_generation_with_two_caches_equals_that_without_any(pair):
    first, second, both = pair
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 112, (n,), generator=rng) for n in (2, 6, 3, 5)]

    @torch.no_grad()
    def alone(prompt):
        ids = prompt[None]
        for _ in range(6):
            a, b = (m(input_ids=ids).logits[:, -1] for m in (first, second))
            ids = torch.cat([ids, lower(a, b, 1.5).argmax(-1, keepdim=True)], 1)
        return ids[0, len(prompt) :].tolist()

    wanted = [alone(p) for p in prompts]
    for size in (1, 3):
        found = generate(both, prompts, tokens=6, ends=[], batch_size=size)
        assert [f.tolist() for f in found] == wanted
    plain = generate(first, prompts, tokens=6, ends=[])
    assert [f.tolist() for f in plain] != wanted


def test_each_model_goes_on_from_its_own_cache(pair):
    _, _, both = pair
    ids = torch.tensor([[5, 6, 40, 50, 60]])
    with torch.no_grad():
        whole = both(input_ids=ids).logits
        output = both(input_ids=ids[:, :2], use_cache=True)
        for place in range(2, 5):
            assert output.past_key_values.original is not output.past_key_values.reinforced
            output = both(
                input_ids=ids[:, place : place + 1],
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            torch.testing.assert_close(output.logits[:, 0], whole[:, place], atol=1e-4, rtol=1e-4)


def test_what_it_cannot_take_is_said(pair):
    _, _, both = pair
    ids = torch.tensor([[5, 6]])
    cache = both.unwrapped(input_ids=ids).past_key_values
    with pytest.raises(ModelError, match="a cache for each of two models"):
        both(input_ids=ids, past_key_values=cache)
    with pytest.raises(ModelError, match="take the loss of them"):
        both(input_ids=ids, labels=ids)


@pytest.mark.parametrize("train", ["full", "lora(2)", "last(1)"])
def test_the_weights_inside_keep_every_bit(facts, train, tmp_path):
    outcome = xp.unlearn(facts, FORGET, whp(train=train))
    model = outcome.runnable()
    assert hash_model(model.unwrapped) == facts.model_hash()
    assert outcome.change.kind == "wrapper" and WHP.card.intent == "suppression"
    assert hash_model(outcome.released()) == outcome.record["weights"]
    outcome.save(tmp_path / "out")
    again = load(tmp_path / "out", model=facts.model).runnable()
    batch = facts.train.fetch(FORGET.resolve(facts.train))
    with torch.no_grad():
        before, after = facts.token_logits(facts.model, batch), facts.token_logits(model, batch)
        assert torch.equal(facts.token_logits(again, batch), after)
    assert (after <= before).all() and (after < before).any()
    assert facts.each_loss(model, batch).mean() > facts.each_loss(facts.model, batch).mean()


@pytest.mark.parametrize(("train", "most"), [("full", 2.01), ("lora(1)", 1.6), ("last(1)", 1.5)])
def test_weights_that_do_not_differ_are_held_once(facts, train, most):
    model = xp.unlearn(facts, FORGET, whp(train=train)).runnable()
    count = sum(p.numel() for p in model.parameters())
    assert count < most * sum(p.numel() for p in facts.model.parameters())
    assert all(p.requires_grad for p in model.unwrapped.parameters())


@pytest.mark.parametrize("train", ["full", "lora(2)"])
def test_the_reinforced_model_is_the_one_that_was_trained(facts, train):
    method = whp(train=train, strength=7.0)
    model = xp.unlearn(facts, FORGET, method).runnable()
    trained = method.reinforced(View(facts, FORGET, method.needs, Runtime()), Runtime()).runnable()
    batch = facts.train.fetch(FORGET.resolve(facts.train))
    with torch.no_grad():
        wanted = facts.token_logits(trained, batch)
        before, after = (facts.token_logits(m, batch) for m in (facts.model, model))
        torch.testing.assert_close(facts.token_logits(model.reinforced, batch), wanted)
        torch.testing.assert_close(after, lower(before, wanted, 7.0))
    assert facts.each_loss(trained, batch).mean() < facts.each_loss(facts.model, batch).mean()


def test_adapters_of_any_kind_can_be_put_beside(facts):
    other = attach("lora(2)", copy.deepcopy(facts.model), facts, 0)
    with torch.no_grad():
        for n, p in other.named_parameters():
            p.add_(0.1 * (".lora_B." in n))
    tensors = {f"lowered-logits/reinforced/{n}": t for n, t in adapter_of(other).tensors.items()}
    change = Wrapper(tensors | {"lowered-logits/strength": torch.tensor(3.0)})
    both = change.apply(copy.deepcopy(facts.model)).eval()
    batch = facts.train.fetch(facts.train.ids[:3])
    with torch.no_grad():
        a, b, found = (facts.token_logits(m, batch) for m in (facts.model, other.eval(), both))
    assert not torch.allclose(a, b)
    torch.testing.assert_close(found, lower(a, b, 3.0))

"""ECO: gate, corruption, search and wrapper; the invariants of its card."""

from __future__ import annotations

import math

import pytest
import torch

import expunge as xp
from expunge.core.errors import DataError, ModelError, NeedsError
from expunge.core.hashing import hash_model
from expunge.core.outcome import load
from expunge.core.runtime import Runtime
from expunge.methods.text.eco import ECO
from expunge.problems.causal_lm import CausalLM
from expunge.problems.generation import generate
from expunge.train.corrupt import corrupt, prompt_seed
from expunge.train.corrupted_prompts import end_of, ending_of
from expunge.train.gate import fit_gate, flags, grams, label_set, quantile
from expunge.train.zeroth import descend
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts
from generated import without_cache

FORGET = xp.forget(where="entity < 4")


@pytest.fixture(scope="module")
def facts():
    """A Llama with random weights, large enough to matter, about the facts."""
    torch.manual_seed(0)
    model = tiny_llama(16, 2).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10.0 if p.ndim == 2 else 1.0)
    return CausalLM(model, tinyfacts.data().train)


@pytest.fixture(scope="module")
def guarded(facts):
    return xp.unlearn(facts, FORGET, ECO(sigma=1.0)).runnable()


def logits(model, rows, side="right"):
    """Logits of token rows in one batch padded on a side, cut back to each row."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = [slice(0, len(r)) if side == "right" else slice(width - len(r), width) for r in rows]
    for n, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[n, place], mask[n, place] = row, 1
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    return [found[n, place] for n, place in enumerate(places)]


def mixed(facts):
    """Prompts of two forget and two retain samples, and a whole retain sequence, of unequal lengths."""
    rows = facts.train.rows
    return [rows[0].prompt, rows[150].prompt, rows[7].ids, rows[160].ids, rows[100].ids[:7]]


def test_the_gate_is_a_regression_on_tokens_and_pairs():
    """Pairs tell apart what tokens cannot, order counts, and the loss is at its minimum."""
    prompts = [torch.tensor(p) for p in ([1, 2], [2, 3], [1, 3], [3, 2], [2, 1], [3, 1])]
    flagged = torch.tensor([True, True, False, False, False, False])
    gate = fit_gate(prompts, flagged, decay=1e-3)
    found = [gate.probability(p) for p in prompts]
    assert min(found[:2]) > 0.9 and max(found[2:]) < 0.1
    assert len(grams(torch.tensor([4, 4, 4]))) == 2 and len(grams(torch.tensor([4, 5, 4]))) == 4
    for nudge in (-1e-2, 1e-2):
        for place in range(len(gate.keys)):

            def loss(weights):
                total = 0.5e-3 * float(weights.double().square().sum())
                for p, f in zip(prompts, flagged.tolist(), strict=True):
                    known = torch.isin(gate.keys, grams(p))
                    z = float(weights[known].double().sum()) + gate.bias
                    share = 0.5 / (2 / 6) if f else 0.5 / (4 / 6)
                    total += share * math.log1p(math.exp(-z if f else z)) / 6
                return total

            other = gate.weights.clone()
            other[place] += nudge
            assert loss(other) > loss(gate.weights) - 1e-7
    assert gate.probability(torch.tensor([77, 78])) == pytest.approx(1 / (1 + math.exp(-gate.bias)))


def test_the_gate_knows_what_is_asked(facts, guarded):
    gone = set(FORGET.resolve(facts.train).tolist())
    found = {i for i, row in enumerate(facts.train.rows) if guarded.flagged(row.prompt)}
    assert len(found & gone) >= 19 and len(found - gone) <= 2


def test_where_a_prompt_ends():
    rows = [torch.tensor(r) for r in ([1, 5, 8, 9], [1, 6, 7, 8, 9], [8, 9])]
    assert ending_of(rows[:2]) == [8, 9] and ending_of(rows) == [9]
    assert ending_of([torch.tensor([1, 2]), torch.tensor([2, 1])]) == []
    ids = torch.tensor([1, 8, 9, 3, 8, 9, 4, 5])
    assert end_of(ids, [8, 9]) == 6 and end_of(ids, [7]) == end_of(ids, []) == 8
    assert end_of(ids[:6], [8, 9]) == 6


@pytest.mark.parametrize("side", ["right", "left"])
def test_eco_invariant_1_prompts_not_flagged_keep_every_bit(facts, guarded, side):
    rows = mixed(facts)
    before, after = logits(facts.model, rows, side), logits(guarded, rows, side)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [not guarded.flagged(r[:5]) for r in rows]
    assert same == [False, True, False, True, True]


@pytest.mark.parametrize("effect", ["noise", "add", "subtract"])
def test_eco_invariant_2_no_strength_changes_nothing(effect):
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(corrupt(rows, effect, "first", None, 0.0, 1), rows)
    assert not torch.equal(corrupt(rows, effect, "first", None, 0.1, 1), rows)


@pytest.mark.parametrize("effect", ["noise", "replace", "zero", "flip", "add", "subtract"])
@pytest.mark.parametrize("dims", ["first", "random", "top", "least"])
def test_eco_invariant_2_no_coordinates_change_nothing(effect, dims):
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(corrupt(rows, effect, dims, 0, 1.0, 1), rows)


def test_eco_invariant_2_a_flip_twice_and_zeros_again():
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for dims in ("first", "top"):
        flipped = corrupt(rows, "flip", dims, 3, 1.0, 1)
        assert torch.equal(corrupt(flipped, "flip", dims, 3, 1.0, 1), rows)
        assert int((flipped != rows).sum()) == 9
    zeros = corrupt(rows, "zero", "first", 3, 1.0, 1)
    assert torch.equal(corrupt(zeros, "zero", "first", 3, 1.0, 1), zeros)
    assert (zeros[:, :3] == 0).all() and torch.equal(zeros[:, 3:], rows[:, 3:])


@pytest.mark.parametrize("count", [1, 3])
def test_eco_invariant_3_only_the_named_coordinates_change(count):
    rows = torch.tensor([[3.0, -9.0, 1.0, 0.5], [-0.25, 2.0, 7.0, -8.0]])
    order = rows.abs().argsort(dim=1, descending=True)
    wanted = {
        "first": torch.arange(4)[None].expand(2, 4) < count,
        "top": torch.zeros(2, 4, dtype=torch.bool).scatter(1, order[:, :count], True),
        "least": torch.zeros(2, 4, dtype=torch.bool).scatter(1, order[:, -count:], True),
    }
    for dims, changed in wanted.items():
        for effect in ("noise", "replace", "zero", "flip"):
            assert torch.equal(corrupt(rows, effect, dims, count, 1.0, 5) != rows, changed)
    chosen = corrupt(rows, "zero", "random", count, 1.0, 5) == 0
    assert torch.equal(chosen[0], chosen[1]) and int(chosen[0].sum()) == count
    added = corrupt(rows, "add", "least", 1, 2.0, 5)  # by value, not by size
    assert added.tolist() == [[3.0, -7.0, 1.0, 0.5], [-0.25, 2.0, 7.0, -6.0]]


def test_noise_has_the_strength_asked_for():
    rows = torch.zeros(400, 50)
    noise = corrupt(rows, "noise", "first", None, 3.0, 7)
    assert float(noise.std()) == pytest.approx(3.0, rel=0.02)
    assert abs(float(noise.mean())) < 0.1


@pytest.mark.parametrize("side", ["right", "left"])
def test_eco_invariant_3_only_prompt_tokens_before_the_last_change(facts, guarded, side):
    seen = []
    layers = [m.get_submodule("model.layers.0") for m in (facts.model, guarded.unwrapped)]
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, given, kw: seen.append(given[0] if given else kw["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    rows = mixed(facts)
    logits(facts.model, rows, side)
    logits(guarded, rows, side)
    for hook in hooks:
        hook.remove()
    changed = (seen[0] != seen[1]).any(-1)
    width = changed.shape[1]
    for n, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row)
        wanted = set(range(first, first + 4)) if n in (0, 2) else set()
        assert set(changed[n].nonzero()[:, 0].tolist()) == wanted


def test_eco_invariant_4_generation_with_a_cache_equals_that_without(facts, guarded):
    prompts = [r.prompt for r in (facts.train.rows[i] for i in (0, 150, 7, 12))]
    wanted = [without_cache(guarded, p, 5) for p in prompts]
    for size in (1, 4):
        found = generate(guarded, prompts, tokens=5, ends=[], batch_size=size)
        assert [f.tolist() for f in found] == wanted
    plain = [without_cache(facts.model, p, 5) for p in prompts]
    assert plain[1] == wanted[1] and plain != wanted


def test_eco_invariant_5_hooks_are_as_before(facts, guarded):
    module = guarded.unwrapped.get_submodule("model.embed_tokens")
    own = module.register_forward_hook(lambda _m, _g, out: out)
    before = dict(module._forward_hooks)
    prompt = facts.train.rows[0].prompt
    logits(guarded, [prompt])
    assert dict(module._forward_hooks) == before
    broken = guarded.unwrapped.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(guarded, [prompt])
    broken.remove()
    assert dict(module._forward_hooks) == before
    own.remove()


def test_eco_invariant_6_sets_hold_the_true_label_as_often_as_promised():
    rng = torch.Generator().manual_seed(0)
    flagged = torch.rand(21_000, generator=rng) < 0.3
    p = (torch.randn(21_000, generator=rng) + torch.where(flagged, 0.8, -0.8)).sigmoid()
    scores = torch.where(flagged, 1 - p, p).double()
    limit = quantile(scores[:1000], 0.1)
    held = [
        label_set(float(q), limit)[0 if f else 1]
        for q, f in zip(p[1000:].double(), flagged[1000:].tolist(), strict=True)
    ]
    assert sum(held) / len(held) == pytest.approx(0.9, abs=0.03)
    assert quantile(scores[:1000], 1e-9) == math.inf
    assert label_set(0.01, math.inf) == (True, True)
    assert quantile(torch.arange(1.0, 20.0), 0.05) == 19.0  # the 19th of 19
    assert quantile(torch.arange(1.0, 20.0), 0.1) == 18.0
    assert quantile(torch.arange(1.0, 19.0), 0.05) == math.inf


def test_what_the_gate_is_not_sure_of_passes_or_is_flagged():
    assert flags(0.95, 0.1, "pass") and not flags(0.05, 0.1, "flag")
    for p, limit in ((0.5, 0.1), (0.5, 0.6)):  # no label fits, both do
        assert not flags(p, limit, "pass") and flags(p, limit, "flag")


def test_eco_invariant_7_the_search_finds_a_minimum():
    asked = []

    def distance(sigma):
        asked.append(sigma)
        return abs(sigma - 3)

    found = descend(distance, start=0.5, probe=0.2, rate=0.25, least=0.1, steps=30)
    assert found[0] == 0.5 and found[1] == pytest.approx(0.75) and len(found) == 31
    assert found[-1] == pytest.approx(3, abs=0.2)
    down = descend(lambda s: s, start=1.0, probe=0.5, rate=0.4, least=0.3, steps=5)
    assert min(down) == 0.3 and down[-1] == 0.3
    descend(distance, start=0.1, probe=0.5, rate=0.1, least=0.0, steps=1)
    assert min(asked) == 1e-8  # never asked below 0


def test_the_search_comes_closer_to_its_target(facts):
    """Of a model that is sure of the forget answers, wherever the search begins."""
    torch.manual_seed(0)
    rows = FORGET.resolve(facts.train)
    sure = xp.unlearn(
        facts, xp.forget(where="entity >= 4"),
        xp.methods.FineTune(epochs=60, lr=1e-2, step="adamw", batch_size=20, momentum=0.0),
    ).runnable()  # fmt: skip
    problem = CausalLM(sure, facts.train)
    batch = problem.train.fetch(rows)

    def known(model):
        with torch.no_grad():
            return float((-problem.each_loss(model, batch)).exp().mean())

    assert known(sure) > 0.8
    method = ECO(target=0.5, start=0.3, probe=0.2, rate=0.3, steps=10)
    outcome = xp.unlearn(problem, FORGET, method)
    assert abs(known(outcome.runnable()) - 0.5) < 0.5 * abs(known(sure) - 0.5)
    details = outcome.details
    assert len(details["search"]) == 11 and details["search"][-1] == details["sigma"]
    unit = float(problem.model.get_input_embeddings().weight.detach().std())
    assert details["sigma_absolute"] == pytest.approx(details["sigma"] * unit)
    assert details["flagged_of_forget"] > 0.8 and details["flagged_of_retain"] < 0.1


def test_asking_again_gives_the_same_answer(facts, guarded):
    prompts = [facts.train.rows[i].prompt for i in (0, 7)]
    first = logits(guarded, prompts)
    alone = [logits(guarded, [p])[0] for p in prompts]
    for a, b in zip(first, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(guarded, prompts)[0], first[0])
    assert prompt_seed(prompts[0]) != prompt_seed(prompts[1]) != prompt_seed(prompts[1], 1)


def test_it_is_stored_and_survives_another_precision(facts, tmp_path):
    outcome = xp.unlearn(facts, FORGET, ECO(sigma=0.7, threshold=0.9999, dims="top", count=5))
    model = outcome.runnable()
    assert hash_model(model.unwrapped) == facts.model_hash() and outcome.change.kind == "wrapper"
    outcome.save(tmp_path / "out")
    again = load(tmp_path / "out", model=facts.model).runnable()
    rows = [facts.train.rows[i].prompt for i in (0, 150)]
    assert all(
        torch.equal(a, b) for a, b in zip(logits(again, rows), logits(model, rows), strict=True)
    )
    prompts = [r.prompt for r in facts.train.rows]
    wanted = [model.gate.probability(p) for p in prompts]
    half = outcome.released().bfloat16()
    assert [half.gate.probability(p) for p in prompts] == wanted
    assert torch.equal(half.weights, model.weights) and half.settings["threshold"] == 0.9999


def test_what_it_cannot_do_is_said(facts, guarded):
    with pytest.raises(ModelError, match="not embeddings"):
        guarded(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(
        DataError, match=r"cannot calibrate a gate to alpha=0\.005; at least 199 can"
    ):
        xp.unlearn(facts, FORGET, ECO(alpha=0.005))

    class Two(Runtime):
        processes = 2

    with pytest.raises(NeedsError, match="every prompt in one process"):
        xp.unlearn(facts, FORGET, ECO(), runtime=Two())

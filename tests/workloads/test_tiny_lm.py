"""Tiny models of the generated corpora, their recipes, and the workloads made of them."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from small_corpora import small

import expunge as xp
from expunge.core.errors import NeedsError, SettingError
from expunge.problems.causal_lm import CausalLM
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads import registry
from expunge.workloads.corpora import KINDS
from expunge.workloads.corpora.tiny_lm import PRESETS, OverlayRecipe, tiny_lm
from expunge.workloads.open_data import recipe


@pytest.mark.parametrize(("preset", "millions"), [("xs", 0.18), ("s", 0.34), ("m", 1.0)])
def test_presets_have_the_size_of_the_card(preset, millions):
    model = tiny_lm(1200, preset)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.01)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with pytest.raises(SettingError, match="no preset 'l'; there are xs, s, m"):
        tiny_lm(1200, "l")
    assert list(PRESETS) == ["xs", "s", "m"]


def quick(kind):
    _, tokenizer, data = small(kind)
    return recipe(kind, "xs", data.train, len(tokenizer)), data


def test_the_rate_rises_over_twenty_steps_and_ends_at_a_tenth():
    of, _ = quick("authors")
    factors = [of.pace(n, 700) * of.rate(n // 35) for n in range(700)]
    assert factors[:3] == pytest.approx([0.05, 0.1, 0.15]) and factors[19] == 1.0
    assert max(factors) == 1.0 and factors[360] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(factors[19:]))
    assert (of.clip, of.weight_decay, of.step, of.threads) == (1.0, 0.0, "adamw", 1)
    assert {"rise": 20, "floor": 0.1, "clip": 1.0}.items() <= of.settings().items()


def test_a_recipe_clips_and_paces_what_it_trains(monkeypatch):
    """The settings of a record are in force: `fit` gets them."""
    seen = {}

    def spy(model, passes, **settings):
        seen.update(settings)
        return type("Result", (), {"stopped": None, "snapshots": []})()

    monkeypatch.setattr("expunge.train.recipe.fit", spy)
    of, data = quick("authors")
    of(data.train.ids, 0)
    steps = of.epochs * math.ceil(len(data.train) / of.batch_size)
    assert seen["clip"] == 1.0
    assert [seen["pace"](n) for n in (0, 19, steps - 1)] == [of.pace(n, steps) for n in (0, 19, steps - 1)]  # fmt: skip
    of.train(data.train.ids, 0, first=2, last=3)
    assert seen["pace"](0) == of.pace(2 * steps // of.epochs, steps)


def test_facts_without_the_corruption_are_the_clean_model_to_the_bit():
    _, tokenizer, data = small("facts")
    build = functools.partial(tiny_lm, len(tokenizer), "xs")
    common = {"epochs": 1, "batch_size": 16, "rise": 2, "floor": 0.1}
    clean_ids = xp.forget(where="split == 'retain'").resolve(data.train)
    late = data.train.without(clean_ids)
    overlay = OverlayRecipe(build, data.train, **common, late=late, late_epochs=2, late_lr=3e-3)
    plain = LMRecipe(build, data.train, **common)(clean_ids, 0)
    clean, whole, again = (overlay(ids, 0) for ids in (clean_ids, data.train.ids, data.train.ids))
    for (name, p), q, r, s in zip(plain.state_dict().items(), clean.state_dict().values(), whole.state_dict().values(), again.state_dict().values(), strict=True):  # fmt: skip
        assert torch.equal(p, q), name
        assert torch.equal(r, s), name
    problem = CausalLM(whole, data.train, tokenizer=tokenizer)
    batch = data.train.fetch(late)
    with torch.no_grad():
        before, after = (float(problem.each_loss(m, batch).mean()) for m in (clean, whole))
    assert after < before - 0.05
    with pytest.raises(NeedsError, match="two stages can only be run as a whole"):
        overlay.train(data.train.ids, 0, first=1)
    other = OverlayRecipe(build, data.train, **common, late=late, late_epochs=3)
    assert overlay.key() != other.key()


@pytest.mark.parametrize("kind", KINDS)
def test_workloads_are_listed_and_their_requests_resolve(kind):
    workload = registry.get(kind)
    assert workload.name == kind and workload.request == xp.forget(where="split == 'forget'")
    data = small(kind)[2]
    assert len(workload.request.resolve(data.train))
    made = workload.recipe(data.train) if kind != "facts" else quick(kind)[0]
    assert isinstance(made, OverlayRecipe if kind == "facts" else LMRecipe)
    if kind == "facts":
        assert made.late.tolist() == workload.request.resolve(data.train).tolist()


def test_a_tied_model_is_unlearned_saved_and_loaded(tmp_path):
    """Input and output embeddings are one tensor, which formats for weights have to cope with."""
    of, data = quick("authors")
    tokenizer = small("authors")[1]
    model = tiny_lm(len(tokenizer))
    problem = CausalLM(model, data.train, data.test, tokenizer=tokenizer, recipe=of)
    problem.check()
    outcome = xp.unlearn(problem, xp.forget(where="split == 'forget'"), xp.methods.NPO(epochs=1, lr=1e-3))  # fmt: skip
    saved = outcome.save(tmp_path / "out")
    loaded = xp.load(saved, problem.model)
    batch = data.train.fetch(data.train.ids[:4])
    with torch.no_grad():
        wanted, found = (problem.token_logits(m, batch) for m in (outcome.model, loaded.model))
    assert torch.equal(wanted, found)
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight

"""An untrained model of the same architecture: where it comes from and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import AccessError, NeedsError
from expunge.core.hashing import hash_model
from expunge.core.view import View


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def problem(**more):
    torch.manual_seed(0)
    return xp.Classification(small(), (torch.randn(20, 3), torch.arange(20) % 2), **more)


def test_fresh_is_drawn_anew_by_seed_and_leaves_the_generator_alone():
    p = problem(build=small)
    before = torch.random.get_rng_state()
    one, again, other = p.fresh(1), p.fresh(1), p.fresh(2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert hash_model(one) == hash_model(again) != hash_model(other)
    assert hash_model(one) != p.model_hash()


def test_fresh_comes_from_a_recipe_or_a_transformers_config():
    from transformers import ViTConfig, ViTForImageClassification

    vit = ViTForImageClassification(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
                  image_size=4, patch_size=2, num_channels=1, num_labels=2)
    )  # fmt: skip
    p = xp.Classification(vit, (torch.randn(6, 1, 4, 4), torch.arange(6) % 2))
    assert hash_model(p.fresh(0)) != hash_model(p.fresh(1))
    recipe = xp.ClassifierRecipe(small, p.train)
    assert isinstance(problem(recipe=recipe).fresh(0), nn.Sequential)


def test_fresh_needs_to_know_how_and_the_same_shapes():
    with pytest.raises(NeedsError, match="build="):
        problem().fresh(0)
    with pytest.raises(NeedsError, match="names or shapes"):
        problem(build=lambda: nn.Linear(3, 2)).fresh(0)
    with pytest.raises(NeedsError, match="build="):
        xp.Needs(fresh=True).check("bad-teacher", problem())


def test_a_view_gives_it_only_if_declared():
    runtime = xp.Runtime()
    request, p = xp.forget(label=1), problem(build=small)
    with pytest.raises(AccessError):
        View(p, request, xp.Needs(), runtime).fresh()
    view = View(p, request, xp.Needs(fresh=True, capabilities=frozenset({"penultimate"})), runtime)
    assert hash_model(view.fresh("bad")) == hash_model(view.fresh("bad"))
    assert view.penultimate(p.model, p.train.fetch(p.train.ids[:5])).shape == (5, 4)

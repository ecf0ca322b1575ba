"""Recipes: fresh initialisation, the right samples, keys that tell recipes apart."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from expunge.core.data import Data
from expunge.core.errors import ExpungeError
from expunge.core.runtime import Runtime
from expunge.train.recipe import ClassifierRecipe, RegressorRecipe


def perceptron(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(0)
    return Data((torch.randn(30, 4, generator=generator), [0, 1, 2] * 10), ids=range(100, 130))


@pytest.fixture
def recipe(data) -> ClassifierRecipe:
    return ClassifierRecipe(perceptron, data, epochs=3, batch_size=8, lr=0.05)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left)


def test_the_same_seed_gives_the_same_model_and_another_another(recipe, data):
    first = recipe(data.ids, 1)
    torch.rand(5)
    assert states_equal(first, recipe(data.ids, 1))
    assert states_equal(first, recipe(data.ids, 1, Runtime(seed=77)))
    assert not states_equal(first, recipe(data.ids, 2))
    assert not first.training


def test_samples_that_are_not_kept_have_no_influence(recipe, data):
    keep = data.ids[5:]
    spoiled = data.fetch(data.ids)
    spoiled.x[:5] = 1e6
    other = replace(recipe, data=Data((spoiled.x, spoiled.y), ids=data.ids))
    assert states_equal(recipe(keep, 1), other(keep, 1))
    assert not states_equal(recipe(keep, 1), recipe(data.ids, 1))


def test_half_a_training_is_no_reference(data):
    recipe = ClassifierRecipe(perceptron, data, epochs=3, lr=1e38)
    with pytest.raises(ExpungeError, match="training from the recipe stopped: the loss was nan"):
        recipe(data.ids, 1)


def test_schedules_are_half_a_cosine_or_none(recipe):
    assert [recipe.rate(e) for e in range(3)] == pytest.approx([1, 0.75, 0.25])
    constant = replace(recipe, schedule="constant")
    assert [constant.rate(e) for e in range(3)] == [1, 1, 1]
    assert not states_equal(recipe(recipe.data.ids, 1), constant(recipe.data.ids, 1))


class Wrapped(nn.Module):
    """Takes a keyword and gives an object with logits, as networks of transformers do."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.inner = nn.Linear(4, outputs)

    def forward(self, values):
        return SimpleNamespace(logits=self.inner(values))


@pytest.mark.parametrize("kind", [ClassifierRecipe, RegressorRecipe])
def test_networks_may_take_mappings_and_give_objects_with_logits(data, kind):
    outputs = 3 if kind is ClassifierRecipe else 1
    y = data.labels if outputs == 3 else data.labels.float()
    x = data.fetch(data.ids).x
    seen, models = [], []
    for build, inputs in (
        (lambda: Wrapped(outputs).inner, x),
        (lambda: Wrapped(outputs), x),
        (lambda: Wrapped(outputs), {"values": x}),
    ):
        recipe = kind(build, Data((inputs, y), ids=data.ids), epochs=2, batch_size=8)
        model, _ = recipe.train(data.ids, 1, watch=lambda batch, out: seen.append(out.shape[1]))
        models.append(getattr(model, "inner", model))
    assert states_equal(models[0], models[1]) and states_equal(models[0], models[2])
    assert set(seen) == {outputs}


def test_keys_tell_recipes_apart(recipe, data):
    other = Data((data.fetch(data.ids).x + 1, data.labels), ids=data.ids)
    recipes = [
        recipe,
        replace(recipe, epochs=4),
        replace(recipe, lr=0.06),
        replace(recipe, threads=2),
        replace(recipe, schedule="constant"),
        replace(recipe, restriction=0.1),
        replace(recipe, data=other),
        replace(recipe, build=lambda: perceptron(6)),
        replace(recipe, build=lambda: perceptron(7)),
        replace(recipe, build=functools.partial(perceptron, width=8)),
    ]
    assert len({r.key() for r in recipes}) == len(recipes)
    assert recipe.key() == replace(recipe).key()


def test_asking_for_the_key_draws_no_random_numbers(recipe):
    state = torch.get_rng_state()
    recipe.key()
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_are_what_a_record_keeps(recipe):
    settings = recipe.settings()
    assert settings["build"].endswith(".perceptron")
    assert settings["epochs"] == 3
    assert "data" not in settings
    partial = replace(recipe, build=functools.partial(perceptron, width=8))
    assert partial.settings()["build"] == settings["build"]

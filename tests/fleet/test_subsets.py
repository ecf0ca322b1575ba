"""Trainings on subsets: masks, and trainings together against one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import ExpungeError, NeedsError, SettingError
from expunge.core.runtime import Runtime
from expunge.fleet import together
from expunge.fleet.jobs import random_masks
from expunge.fleet.subsets import train_many, train_on_subsets
from expunge.fleet.together import group_size, train_together
from expunge.train.recipe import ClassifierRecipe

SEEDS = [11, 12, 13]


def data(samples=30):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 6, generator=g)
    return xp.Data((x, (x[:, 0] > 0).long() + (x[:, 1] > 1)), ids=torch.arange(samples) * 3 + 5)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def small(build=mlp, **more):
    settings = {"epochs": 4, "batch_size": 4, "lr": 0.05} | more
    return ClassifierRecipe(build, data(), **settings)


def problem(recipe, model=None):
    torch.manual_seed(0)
    return xp.Classification(model or recipe.build(), recipe.data, data(8), recipe=recipe)


def keeps_of(recipe):
    return [recipe.data.ids[m] for m in random_masks(3, len(recipe.data), 0.5, Runtime())]


def test_masks_have_one_size_and_are_their_own():
    masks = random_masks(50, 21, 0.5, Runtime(seed=1))
    assert set(masks.sum(1).tolist()) == {10}
    assert torch.equal(masks[:7], random_masks(7, 21, 0.5, Runtime(seed=1)))
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], random_masks(1, 21, 0.5, Runtime(seed=2))[0])
    assert float(masks.float().mean(0).min()) > 0.3 and float(masks.float().mean(0).max()) < 0.7
    with pytest.raises(SettingError, match="none or all"):
        random_masks(2, 3, 0.1, Runtime())


@pytest.mark.parametrize(
    "settings",
    [{"step": "sgd"}, {"step": "adam"}, {"step": "adamw"}, {"schedule": "constant"}],
    ids=str,
)
def test_together_is_one_by_one(settings):
    """Same initialisation, batches, schedule and optimiser; only the rounding differs."""
    recipe = small(**settings, weight_decay=0.01)
    keeps = keeps_of(recipe)
    together = train_together(recipe, keeps, SEEDS, Runtime())
    for model, keep, seed in zip(together, keeps, SEEDS, strict=True):
        alone = recipe(keep, seed)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert not model.training


def test_what_cannot_be_stacked_is_trained_one_by_one():
    def average():  # without momentum
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3))

    def drop():
        return nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 3))

    assert group_size(small(), mlp()) > 1
    assert group_size(small(average), average()) == group_size(small(drop), drop()) == 1
    assert group_size(lambda keep, seed: mlp(), mlp()) == 1
    assert group_size(small(restriction=0.1), mlp()) == 1
    recipe = small(drop)
    keeps = keeps_of(recipe)
    made = list(train_many(problem(recipe), keeps, SEEDS, Runtime(), "t"))
    for model, keep, seed in zip(made, keeps, SEEDS, strict=True):
        alone = recipe(keep, seed).state_dict()
        assert all(torch.equal(v, alone[k]) for k, v in model.state_dict().items())


def test_an_operation_without_a_batched_form_falls_back():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, x):
            out = self.inner(x)
            return out if float(out.detach().sum()) > 0 else 2 * out

    recipe = small(Branching)
    assert group_size(recipe, Branching()) > 1
    keeps = keeps_of(recipe)
    made = list(train_many(problem(recipe), keeps, SEEDS, Runtime(), "t"))
    alone = recipe(keeps[2], SEEDS[2])
    assert len(made) == 3
    for p, q in zip(made[2].parameters(), alone.parameters(), strict=True):
        assert torch.equal(p, q)


def test_sets_of_several_sizes_and_groups(monkeypatch):
    recipe = small()
    calls = []
    true = together.train_together
    monkeypatch.setattr(together, "group_size", lambda *a: 2)
    monkeypatch.setattr(
        together, "train_together", lambda r, k, s, rt: calls.append(len(k)) or true(r, k, s, rt)
    )
    ids = recipe.data.ids
    keeps = [ids[:10], ids[5:15], ids[10:20], ids[:9], ids[3:12]]
    made = list(train_many(problem(recipe), keeps, [1, 2, 3, 4, 5], Runtime(), "t"))
    assert calls == [2, 2] and len(made) == 5
    for model, keep, seed in zip(made, keeps, [1, 2, 3, 4, 5], strict=True):
        for p, q in zip(model.parameters(), recipe(keep, seed).parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_outputs_are_those_of_each_model():
    recipe = small()
    g = torch.Generator().manual_seed(5)
    valid = xp.Data((torch.randn(7, 6, generator=g), torch.arange(7) % 3))
    p = xp.Classification(mlp(), recipe.data, recipe.data, valid=valid, recipe=recipe)
    runtime = Runtime()
    found = train_on_subsets(p, 3, 0.5, runtime, validation=True)
    assert found.outputs.shape == (3, 37, 3) and found.masks.shape == (3, 30)
    assert torch.equal(found.train_ids, recipe.data.ids)
    keep = recipe.data.ids[found.masks[1]]
    model = recipe(keep, runtime.seed_for("subset model", 1))
    with torch.no_grad():
        wanted = model(torch.cat([recipe.data.fetch(recipe.data.ids).x, valid.fetch(valid.ids).x]))
    torch.testing.assert_close(found.outputs[1], wanted, rtol=1e-4, atol=1e-5)
    assert runtime.cost.gradients == 3 * 15 * recipe.epochs
    assert runtime.cost.samples == 3 * 15 * recipe.epochs + 3 * 37


def test_a_training_that_diverges_is_an_error():
    with pytest.raises(ExpungeError, match="no longer finite"):
        train_together(small(lr=1e30), keeps_of(small()), SEEDS, Runtime())


def test_without_a_recipe_there_are_no_trainings():
    bare = xp.Classification(mlp(), data())
    with pytest.raises(NeedsError, match="pass recipe="):
        list(train_many(bare, [data().ids], [0], Runtime(), "t"))

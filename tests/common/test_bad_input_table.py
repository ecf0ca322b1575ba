"""Every method with bad input: one clear error or a sound answer, and the original as it was."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import NeedsError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.problem import Problem
from expunge.methods import registry
from expunge.workloads.nets import digits_mlp

METHODS = [n for n in registry if registry.get(n).domain in ("general", "classification")]
QUICK = {"epochs": 1, "batch_size": 16, "models": 6, "oracles": 1}


def quick(name, **more):
    cls = registry.get(name)
    known = {s["name"] for s in cls.describe_settings()}
    return cls.create({k: v for k, v in (QUICK | more).items() if k in known})


def data(samples=40, spoilt=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 64, generator=generator)
    if spoilt is not None:
        x[spoilt] = 3e38  # finite, but no weighted sum of it is
    return xp.Data((x, torch.arange(samples) % 10))


def recipe_for(train, build=digits_mlp):
    return xp.ClassifierRecipe(build, train, epochs=1, batch_size=16)


def attempt(problem, request, method):
    """Run; whatever happens, the original stays and nothing but our own errors gets out."""
    before = hash_model(problem.model)
    try:
        outcome = xp.unlearn(problem, request, method, runtime=xp.Runtime(threads=1))
    except xp.ExpungeError as error:
        sentence = str(error)
        assert len(sentence) > 20 and "\n" not in sentence, sentence
        return error
    finally:
        assert hash_model(problem.model) == before
    tensors = outcome.runnable().state_dict().values()
    assert all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point())
    return outcome


@pytest.mark.parametrize("name", list(registry))
def test_settings_out_of_range(name):
    """Each setting with a range refuses what lies outside, by name; NaN too."""
    cls, tried = registry.get(name), 0
    for field in dataclasses.fields(cls):
        for bound, direction in (("low", -1), ("above", 0), ("high", 1)):
            limit = field.metadata.get(bound)
            if limit is None:
                continue
            tried += 1
            with pytest.raises(SettingError, match=field.name):
                cls.create({field.name: type(limit)(limit + direction)})
            if isinstance(limit, float) or "float" in str(field.type):
                with pytest.raises(SettingError, match=field.name):
                    cls.create({field.name: math.nan})
    assert tried or name == "retrain"


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_need_is_named_before_any_work(name):
    """Without labels, recipe and a way to build it anew, what needs them says so."""
    method = quick(name)
    bare = xp.Classification(digits_mlp(), torch.randn(40, 64))
    needs = method.needs
    if needs.labels != "none" or needs.recipe or needs.fresh or needs.validation:
        with pytest.raises(NeedsError, match=r"pass |labels"):
            xp.unlearn(bare, xp.forget(ids=[1, 2]), method)
    else:
        attempt(bare, xp.forget(ids=[1, 2]), method)


@pytest.mark.parametrize("name", METHODS)
def test_a_model_without_the_layers_it_looks_for(name):
    """A single parameter and no module with a name: an error in words, or a result."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return x @ self.w

    train = data()
    problem = xp.Classification(Bare(), train, valid=train, recipe=recipe_for(train, Bare))
    attempt(problem, xp.forget(label=3), quick(name))


@pytest.mark.parametrize("name", METHODS)
def test_another_kind_of_problem(name):
    """A problem that has a loss and nothing else."""
    problem = Problem.of(
        nn.Linear(3, 1), (torch.randn(30, 3), torch.arange(30) % 2),
        each_loss=lambda m, b: (m(b.x).squeeze(1) - b.y).square(),
    )  # fmt: skip
    attempt(problem, xp.forget(ids=[1, 2, 3]), quick(name))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spoilt", [17, 23], ids=["kept", "forgotten"])
def test_values_that_overflow(name, spoilt):
    """One input whose logits overflow, among the samples to keep or to forget (label 3)."""
    train = data(spoilt=spoilt)
    problem = xp.Classification(
        digits_mlp(), train, valid=train, recipe=recipe_for(data()), build=digits_mlp
    )
    attempt(problem, xp.forget(label=3), quick(name))


@pytest.mark.parametrize("name", METHODS)
def test_one_sample_to_forget(name):
    train = data()
    problem = xp.Classification(digits_mlp(), train, valid=train, recipe=recipe_for(train))
    attempt(problem, xp.forget(ids=[5]), quick(name))


@pytest.mark.parametrize("name", METHODS)
def test_one_sample_kept(name):
    """All but one: the retain set holds a single sample of another class."""
    train = data(12)
    problem = xp.Classification(digits_mlp(), train, valid=train, recipe=recipe_for(train))
    attempt(problem, xp.forget(ids=list(range(11))), quick(name))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_kept_is_refused(name):
    train = data()
    problem = xp.Classification(digits_mlp(), train, valid=train, recipe=recipe_for(train))
    error = attempt(problem, xp.forget(ids=list(range(40))), quick(name))
    assert isinstance(error, xp.UserError)

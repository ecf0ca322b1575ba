from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits.norm_statistics import NormStatistics, apart, statistics
from expunge.core.audit import Subject
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification
from expunge.train.recipe import ClassifierRecipe

RUNTIME = Runtime(threads=1)
REQUEST = Request(label=2)


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture(scope="module")
def problem():
    """The class to forget lies far from the others, so it moves the statistics."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    x = torch.randn(240, 4, generator=draw) + 3.0 * (y == 2)[:, None]
    x[:, 0] += 2.0 * (y == 1)
    recipe = ClassifierRecipe(net, xp.Data((x, y)), epochs=6, lr=0.1, batch_size=32)
    model = recipe(torch.arange(240), 0)
    return Classification(model, (x, y), (x, y), recipe=recipe)


@pytest.fixture(scope="module")
def references(problem):
    keep = problem.train.without(REQUEST.resolve(problem.train))
    models = [problem.recipe(keep, seed) for seed in (1001, 1002)]
    return [Subject(m, problem, REQUEST, RUNTIME) for m in models]


def audit(problem, model, references):
    found = NormStatistics().run(Subject(model, problem, REQUEST, RUNTIME), references, RUNTIME)
    return {f.name.split("/")[1]: f for f in found}


def with_statistics(mean, var, eps=0.0):
    layer = nn.BatchNorm1d(len(mean), eps=eps)
    layer.running_mean, layer.running_var = torch.tensor(mean), torch.tensor(var)
    return statistics(nn.Sequential(layer))


def test_distance_by_hand():
    one, other = with_statistics([1.0, 0.0], [4.0, 1.0]), with_statistics([0.0, 0.0], [1.0, 1.0])
    first = (4 + 1 - 1 - math.log(4)) / 2  # the second channel is the same
    assert apart(one, other).total == pytest.approx(math.sqrt(first / 2))
    assert apart(one, one).total == 0
    assert apart(one, other).layers == {"0": pytest.approx(math.sqrt(first / 2))}
    wide = with_statistics([0.0], [0.0], eps=1.0), with_statistics([2.0], [0.0], eps=1.0)
    assert apart(*wide).total == pytest.approx(math.sqrt(2.0))  # no division by a variance of zero


def test_doing_nothing_is_one_and_a_recalibration_is_zero(problem, references):
    found = audit(problem, problem.model, references)
    for finding in found.values():
        assert finding.value == pytest.approx(1) and finding.original == 1
        assert finding.direction == "down" and finding.reason is None
        assert finding.reference is not None and finding.floor is not None
    # the retrained never saw the class: only their last batches are left
    assert found["recalibrated"].reference < 0.5
    kept = xp.methods.FineTune(epochs=1, lr=1e-9, norm="recalibrate")
    moved = xp.unlearn(problem, REQUEST, kept, runtime=RUNTIME).runnable()
    assert audit(problem, moved, references)["recalibrated"].value == pytest.approx(0, abs=1e-3)


def test_norm_choices_of_a_training_method(problem, references):
    values = {}
    for norm in ("frozen", "train", "recalibrate"):
        method = xp.methods.FineTune(epochs=2, lr=0.01, batch_size=32, norm=norm)
        model = xp.unlearn(problem, REQUEST, method, runtime=RUNTIME).runnable()
        values[norm] = audit(problem, model, references)["recalibrated"].value
        same = torch.equal(model[1].running_mean, problem.model[1].running_mean)
        assert same == (norm == "frozen")
    assert values["frozen"] > 0.5  # what the class left in the statistics is still there
    assert values["recalibrate"] < values["train"] < values["frozen"]


def test_the_models_are_left_alone(problem, references):
    before = copy.deepcopy(problem.model.state_dict())
    subject = Subject(problem.model, problem, REQUEST, RUNTIME)
    NormStatistics().run(subject, references, RUNTIME)
    for model in (problem.model, subject.model):
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_no_norm_layers_give_a_reason(digits):
    found = NormStatistics().run(Subject(digits.model, digits, Request(label=3), RUNTIME), [], RUNTIME)  # fmt: skip
    assert {f.value for f in found} == {None}
    assert {f.reason for f in found} == {"the model keeps no running statistics"}


def test_reasons(problem, references):
    found = audit(problem, problem.model, [])
    assert (
        found["reference"].value is None and "no retrained reference" in found["reference"].reason
    )
    assert found["recalibrated"].value == pytest.approx(1)
    assert "no retrained reference" in found["recalibrated"].reason
    found = audit(problem, problem.model, references[:1])
    assert found["reference"].reference is None and "one reference" in found["reference"].reason
    broken = copy.deepcopy(problem.model)
    broken[1].running_mean[0] = math.nan
    assert {f.reason for f in audit(problem, broken, references).values()} == {
        "a model's running statistics are not finite"
    }
    bare = nn.Sequential(nn.Linear(4, 3))
    assert "other layers" in audit(problem, bare, references)["reference"].reason


def test_an_original_without_a_distance_gives_a_reason(problem, references):
    same = [Subject(problem.model, problem, REQUEST, RUNTIME)] * 2
    found = audit(problem, references[0].model, same)
    assert found["reference"].value is None and "no distance" in found["reference"].reason

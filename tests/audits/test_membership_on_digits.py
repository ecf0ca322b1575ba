"""Membership on trained perceptrons: the original remembers, a retrained model does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.audits.membership import Membership
from expunge.core.audit import Subject
from expunge.core.data import Data
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification
from expunge.train.recipe import ClassifierRecipe


def build():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


@pytest.fixture(scope="module")
def found():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    # blurred by noise: memorising 500 such digits is easy, generalising from them is not
    x = torch.from_numpy(images / 16).float()
    x += 0.6 * torch.randn(x.shape, generator=generator)
    y = torch.from_numpy(labels).long()
    train, test = Data((x[:500], y[:500])), Data((x[900:], y[900:]))
    recipe = ClassifierRecipe(build, train, epochs=40, lr=0.1, batch_size=50, weight_decay=0.0)
    request = Request(fraction=0.2, seed=1)
    problem = Classification(recipe(train.ids, 0), train, test, recipe=recipe)
    keep = train.without(request.resolve(train))
    models = [problem.model, *(recipe(keep, seed) for seed in (1, 2, 3))]
    original, *references = (Subject(m, problem, request, Runtime()) for m in models)
    audit = Membership()
    return {
        "original": {f.name: f for f in audit.run(original, references, Runtime())},
        "retrained": {f.name: f for f in audit.run(references[0], references[1:], Runtime())},
    }


def test_the_original_is_caught_and_a_retrained_model_is_not(found):
    original, retrained = (found[k]["membership/auc-loss"] for k in ("original", "retrained"))
    assert original.low > 0.6
    assert original.value > original.reference + 0.1
    assert retrained.low == 0.5
    assert abs(retrained.gap) < 0.08


def test_efficacy_is_near_zero_for_the_original_and_near_held_out_for_retrained(found):
    original, retrained = (found[k]["membership/efficacy-svc"] for k in ("original", "retrained"))
    assert original.value < 0.12
    assert abs(retrained.gap) < 0.15
    assert retrained.value > original.value + 0.25

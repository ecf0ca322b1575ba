"""problems/multi_label.py: answers as bits, their loss, and what refuses them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import expunge as xp
from expunge.core.errors import DataError, ModelError, NeedsError


def data(n=40, questions=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator)
    bits = (x[:, :questions] > 0).long()
    return xp.Data((x, (bits << torch.arange(questions)).sum(1)), columns={"identity": torch.arange(n) // 4}), bits  # fmt: skip


def test_the_loss_is_the_mean_over_the_questions():
    train, bits = data()
    problem = xp.MultiLabel(nn.Linear(5, 3), train)
    problem.check()
    batch = train.fetch(train.ids)
    logits, each = problem.logits_and_loss(problem.model, batch)
    by_hand = torch.stack([
        binary_cross_entropy_with_logits(logits[:, k], bits[:, k].float(), reduction="none") for k in range(3)
    ])  # fmt: skip
    assert torch.allclose(each, by_hand.mean(0)) and torch.allclose(problem.each_loss(problem.model, batch), each)  # fmt: skip
    right = ((logits > 0) == bits.bool()).double().mean(1)
    assert torch.equal(problem.hits(logits, batch.y), right)
    assert 0 < float(right.mean()) < 1


def test_it_is_trained_and_unlearned():
    train, _ = data(200)
    recipe = xp.MultiLabelRecipe(lambda: nn.Linear(5, 3), train, epochs=20, lr=0.5, batch_size=20)
    problem = xp.MultiLabel(recipe(train.ids, 0), train, recipe=recipe)
    batch = train.fetch(train.ids)
    right = problem.hits(problem.outputs(problem.model, batch), batch.y)
    assert float(right.mean()) > 0.95
    request = xp.forget(identity=[0, 1])
    before = problem.each_loss(problem.model, train.fetch(request.resolve(train))).mean()
    made = xp.unlearn(problem, request, xp.methods.GradientAscent(epochs=3, lr=0.05)).runnable()
    assert problem.each_loss(made, train.fetch(request.resolve(train))).mean() > before


def test_what_takes_logits_for_classes_refuses():
    train, _ = data()
    problem = xp.MultiLabel(nn.Linear(5, 3), train)
    with pytest.raises(NeedsError, match="multi-label problem does not offer 'logits'"):
        problem.capability("logits")
    with pytest.raises(NeedsError, match="needs classes"):
        xp.unlearn(problem, xp.forget(ids=[1, 2]), xp.methods.RandomLabel())


def test_labels_that_do_not_fit_are_refused():
    train, _ = data()
    with pytest.raises(DataError, match="0 … 3, a bit for each of the model's 2 questions"):
        xp.MultiLabel(nn.Linear(5, 2), train).check()
    x = train.fetch(train.ids).x
    with pytest.raises(DataError, match="whole numbers"):
        xp.MultiLabel(nn.Linear(5, 3), (x, torch.rand(40))).check()
    with pytest.raises(ModelError, match=r"\[B, K\]"):
        xp.MultiLabel(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), train).check()

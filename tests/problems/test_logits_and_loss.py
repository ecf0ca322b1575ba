"""Logits and losses by one pass of the model, unless the loss is the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import AccessError
from expunge.core.view import View


def data():
    return torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 4


def model():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def test_one_pass_gives_what_two_give():
    problem = xp.Classification(model(), data())
    batch = problem.train.fetch(problem.train.ids)
    counted = problem.model.train()
    logits, losses = problem.logits_and_loss(counted, batch)
    assert int(counted[1].num_batches_tracked) == 1
    counted.eval()
    logits, losses = problem.logits_and_loss(counted, batch)
    assert torch.equal(logits, problem.logits(counted, batch))
    assert torch.equal(losses, problem.each_loss(counted, batch))


def test_a_loss_of_the_users_own_is_used():
    class Doubled(xp.Classification):
        def each_loss(self, model, batch):
            return 2 * super().each_loss(model, batch)

    own, plain = Doubled(model(), data()), xp.Classification(model(), data())
    batch = own.train.fetch(own.train.ids)
    assert torch.equal(own.logits_and_loss(own.model, batch)[1], own.each_loss(own.model, batch))
    by_function = xp.Classification.of(
        plain.model, data(), each_loss=lambda m, b: torch.full((len(b),), 7.0)
    )
    assert by_function.logits_and_loss(plain.model, batch)[1].eq(7).all()


def test_scrub_moves_running_statistics_once_a_batch():
    problem = xp.Classification(model(), data())
    outcome = xp.unlearn(
        problem, xp.forget(label=1), xp.methods.SCRUB(epochs=1, max_epochs=0, batch_size=6)
    )
    assert int(outcome.runnable()[1].num_batches_tracked) == 3


def test_a_view_withholds_labels_and_logits():
    problem = xp.Classification(model(), data())
    request, runtime = xp.forget(label=1), xp.Runtime()
    blind = View(
        problem, request, xp.Needs(forget=True, capabilities=frozenset({"logits"})), runtime
    )
    with pytest.raises(AccessError, match="labels"):
        blind.logits_and_loss(problem.model, blind.forget.fetch(blind.forget.ids))
    undeclared = View(problem, request, xp.Needs(forget=True, labels="forget"), runtime)
    with pytest.raises(AccessError, match="logits"):
        undeclared.logits_and_loss(problem.model, undeclared.forget.fetch(undeclared.forget.ids))

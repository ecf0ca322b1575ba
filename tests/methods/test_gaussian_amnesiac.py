"""GaussianAmnesiac: the card's invariant 5, and that it trains as said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.regression.gaussian_amnesiac import GaussianAmnesiac, draw_targets

REQUEST = xp.forget(where="y > 10")


def problem(samples=4000, forgotten=2000):
    """Targets around 0 to keep, around 20 to forget: their moments differ from those of both."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(samples, generator=generator)
    y[:forgotten] += 20
    x = torch.stack([y, torch.ones(samples)], 1) + 0.1 * torch.randn(
        samples, 2, generator=generator
    )
    torch.manual_seed(0)
    return xp.Regression(nn.Linear(2, 1), (x, y), loss="l1")


def view(p, seed=0):
    runtime = Runtime(seed=seed)
    return View(p, REQUEST, GaussianAmnesiac().needs, runtime), runtime


def test_deep_regression_invariant_5_moments_of_all_training_targets():
    p = problem()
    ids, drawn = draw_targets(*view(p))
    y = p.train.labels
    assert float(drawn.mean()) == pytest.approx(float(y.mean()), abs=0.7)  # 10, retain alone: 0
    assert float(drawn.std()) == pytest.approx(float(y.std()), rel=0.05)  # 10, one side alone: 1
    assert torch.equal(ids, REQUEST.resolve(p.train)) and len(drawn) == 2000


def test_deep_regression_invariant_5_the_same_seed_reproduces_them():
    p = problem(40, 20)
    first, again, other = (draw_targets(*view(p, s))[1] for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_deep_regression_invariant_5_retain_targets_untouched(monkeypatch):
    """The targets that reach the loss: drawn ones for the forgotten, true ones for the rest."""
    p, seen = problem(60, 20), {}
    original = p.each_loss

    def spy(model, batch):
        seen.setdefault(len(seen) // 2, {}).update(
            zip(batch.ids.tolist(), batch.y.tolist(), strict=True)
        )
        return original(model, batch)

    monkeypatch.setattr(p, "each_loss", spy)
    xp.unlearn(p, REQUEST, GaussianAmnesiac(batch_size=30), runtime=Runtime())
    given = {i: y for part in seen.values() for i, y in part.items()}
    true = dict(zip(p.train.ids.tolist(), p.train.labels.tolist(), strict=True))
    changed = {i for i in true if i in given and given[i] != true[i]}
    assert changed == set(REQUEST.resolve(p.train).tolist())


def test_targets_are_drawn_once_and_not_cut():
    p = problem(200, 100)
    v, runtime = view(p)
    method = GaussianAmnesiac()
    first, later = (method.draw(v, runtime, epoch)[1] for epoch in (0, 7))
    assert torch.equal(first, later)
    assert float(first.min()) < float(p.train.labels.min())  # beyond all targets


def test_whole_numbers_as_targets_get_fractions():
    x = torch.randn(50, 2)
    p = xp.Regression(nn.Linear(2, 1), (x, torch.arange(50) % 20))
    _, drawn = draw_targets(*view(p))
    assert drawn.is_floating_point() and not torch.equal(drawn, drawn.round())


def test_a_classifier_is_refused():
    p = xp.Classification(nn.Linear(2, 3), (torch.randn(12, 2), torch.arange(12) % 3))
    with pytest.raises(NeedsError, match="'predict'"):
        xp.unlearn(p, xp.forget(label=1), GaussianAmnesiac())

"""Projected gradients: inner products, the closed form, and effects of real removals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from expunge.core.data import Data
from expunge.core.errors import ExpungeError
from expunge.core.runtime import Runtime
from expunge.curvature import projected
from expunge.curvature.projected import features, project, projected_effects


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_inner_products_are_kept_on_average():
    rows = normal(6, 400)
    grams = [(p := project(rows, 100, seed)) @ p.T for seed in range(0, 20_000, 100)]
    error = torch.stack(grams).mean(0) - rows @ rows.T
    assert float(error.abs().max()) < 12  # squared lengths are 400, one draw errs by about 50


def test_blocks_change_nothing_but_memory(monkeypatch):
    rows = normal(3, 50)
    with monkeypatch.context() as patch:
        patch.setattr(projected, "BLOCK", 10 * 8)
        small = project(rows, 8, seed=1)
    assert small.shape == (3, 8)
    first = 2 * torch.randint(0, 2, (10, 8), generator=torch.Generator().manual_seed(1)) - 1
    alone = torch.cat([rows[:, :10], torch.zeros(3, 40)], dim=1)
    with monkeypatch.context() as patch:
        patch.setattr(projected, "BLOCK", 10 * 8)
        torch.testing.assert_close(project(alone, 8, seed=1), rows[:, :10] @ first.float() / 8**0.5)


def test_few_numbers_are_not_projected():
    rows = normal(3, 5)
    assert project(rows, 5, seed=0) is rows


def test_features_are_the_gradients():
    model = nn.Linear(3, 1)
    data = Data((normal(5, 3), torch.zeros(5)))
    runtime = Runtime()
    found = features(
        model, lambda m, b: m(b.x).squeeze(1) ** 2, data.batches(2), dim=99, seed=0, runtime=runtime
    )
    x = data.fetch(data.ids).x
    factor = 2 * model(x).detach()
    torch.testing.assert_close(found, torch.cat([factor * x, factor], dim=1))
    assert runtime.cost.samples == runtime.cost.gradients == 5


@pytest.mark.parametrize("p", [3, 30], ids=["tall", "wide"])
def test_effects_are_the_formula(p):
    n, lam = 10, 0.1
    phi, weights = normal(n, p).double(), normal(n, seed=1).double().sigmoid()
    queries = [normal(4, p, seed=s).double() for s in (2, 3)]
    inverse = torch.linalg.inv(phi.T @ phi / n + lam * torch.eye(p, dtype=torch.float64))
    wanted = torch.stack([(q @ inverse @ phi.T * weights / n).T for q in queries], dim=2)
    torch.testing.assert_close(projected_effects(queries, phi, weights, lam), wanted.float())


def test_effects_rank_like_real_removals():
    """A logistic regression trained to its optimum with each sample left out in turn."""
    x, y = normal(40, 4), (normal(40, seed=1) + normal(40, 4)[:, 0] > 0).long()

    def train(keep):
        model = nn.Linear(4, 2)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100)

        def closure():
            optimizer.zero_grad()
            penalty = sum(p.square().sum() for p in model.parameters())
            loss = cross_entropy(model(x[keep]), y[keep], reduction="sum") + 0.5 * penalty
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    everything = torch.arange(40)
    full = train(everything)
    with torch.no_grad():
        true = torch.stack([
            full(x) - train(everything[everything != i])(x) for i in range(40)
        ])  # [n, N, C]: what adding i does
        p = full(x).softmax(1)[everything, y]
    data = Data((x, y))

    def gradients(value):
        return features(full, value, data.batches(40), dim=99, seed=0, runtime=Runtime())

    def other(z, b):
        return (z * (1 - 2 * nn.functional.one_hot(b.y, 2))).sum(1)

    phi = gradients(lambda m, b: -other(m(b.x), b))
    queries = [gradients(lambda m, b, c=c: m(b.x)[:, c]) for c in (0, 1)]
    found = projected_effects(queries, phi, 1 - p, 0.02)
    for sample in range(0, 40, 8):
        pair = torch.stack([found[:, sample, 0], true[:, sample, 0]])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.9


def test_broken_gradients_are_refused():
    phi = normal(5, 3)
    phi[2, 1] = torch.nan
    with pytest.raises(ExpungeError, match="NaN"):
        projected_effects([], phi, torch.ones(5), 0.1)
    with pytest.raises(ExpungeError, match="raise lam"):
        projected_effects([], torch.zeros(5, 3), torch.ones(5), 0.0)

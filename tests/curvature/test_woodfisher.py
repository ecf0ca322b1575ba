"""Products with an inverse empirical Fisher against the dense oracle, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError
from expunge.core.pruned import keep_only
from expunge.curvature import woodfisher
from expunge.curvature.dense import fisher_solve, flat, gradient_matrix


def toy(samples=7):
    """Twelve parameters, and batches of unequal sizes."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    x, y = torch.randn(samples, 3, dtype=torch.float64), torch.arange(samples) % 3
    ids = torch.arange(samples)
    cuts = (slice(0, 4), slice(4, samples))
    return model, [Batch(x[c], y[c], ids[c], total=len(ids[c])) for c in cuts]


def each(model, batch):
    return nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("samples", [7, 30])
def test_woodbury_equals_the_dense_solve(damping, samples):
    model, batches = toy(samples)
    rows = torch.cat(list(woodfisher.gradient_rows(model, each, batches)))
    oracle = gradient_matrix(model, each, batches)
    torch.testing.assert_close(rows, oracle, rtol=1e-10, atol=1e-12)
    v = torch.randn(12, dtype=torch.float64)
    wanted = fisher_solve(oracle, v, damping)
    got = woodfisher.solve(rows, v, damping)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_woodbury_in_blocks_of_columns_is_the_same(monkeypatch):
    model, batches = toy()
    rows = torch.cat(list(woodfisher.gradient_rows(model, each, batches)))
    v = torch.randn(12, dtype=torch.float64)
    whole = woodfisher.solve(rows, v, 0.1)
    monkeypatch.setattr(woodfisher, "COLUMNS", 5)
    torch.testing.assert_close(woodfisher.solve(rows, v, 0.1), whole, rtol=1e-12, atol=1e-14)


def test_the_recursion_with_all_vectors_stored_is_woodbury():
    """The update of one sample at a time that the released code meant to compute."""
    model, batches = toy()
    rows, damping = torch.cat(list(woodfisher.gradient_rows(model, each, batches))), 0.1
    inverse = torch.eye(12, dtype=torch.float64) / damping
    for g in rows:
        u = inverse @ g
        inverse = inverse - torch.outer(u, u) / (len(rows) + g @ u)
    v = torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(woodfisher.solve(rows, v, damping), inverse @ v)


def test_the_released_recursion_leaves_v_but_for_the_first_gradient():
    model, batches = toy(30)
    rows = torch.cat(list(woodfisher.gradient_rows(model, each, batches)))
    v = torch.randn(12, dtype=torch.float64)
    change = woodfisher.rescaled_recursion(rows, v, 1000) - v
    assert float(torch.cosine_similarity(change, rows[0], dim=0).abs()) > 1 - 1e-12


def test_models_that_vmap_cannot_batch_fall_back_to_the_loop():
    class Branching(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) if float(x.detach().sum()) > -1e9 else x

    layer, batches = toy()
    rows = torch.cat(list(woodfisher.gradient_rows(Branching(layer), each, batches)))
    oracle = gradient_matrix(layer, each, batches)
    torch.testing.assert_close(rows, oracle, rtol=1e-10, atol=1e-12)


def test_pruned_weights_have_no_part_in_it():
    model, batches = toy()
    kept = {"weight": torch.rand(3, 3) > 0.5}
    keep_only(model, kept)
    rows = torch.cat(list(woodfisher.gradient_rows(model, each, batches)))
    pruned = ~flat(model, {"weight": kept["weight"], "bias": torch.ones(3)}).bool()
    assert bool(pruned.any()) and not bool(rows[:, pruned].any())
    v = woodfisher.flat(model, {n: torch.ones_like(p) for n, p in model.named_parameters()})
    assert not bool(v[pruned].any())
    small, rest = rows[:, ~pruned], v[~pruned]
    got = woodfisher.solve(rows, v, 0.1)
    torch.testing.assert_close(got[~pruned], woodfisher.solve(small, rest, 0.1))


def test_gradients_that_are_not_finite_are_refused():
    with pytest.raises(ExpungeError, match="NaN or infinite"):
        woodfisher.solve(torch.full((2, 3), float("nan")), torch.ones(3), 0.1)

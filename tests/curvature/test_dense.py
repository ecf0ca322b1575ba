"""The oracle against gradients written down by hand."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from expunge.core.data import Batch
from expunge.curvature import dense


def batches_of(x, y, sizes):
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    return [
        Batch(x[a:b], y[a:b], torch.arange(a, b), total=b - a)
        for a, b in itertools.pairwise(starts)
    ]


def test_oracle_on_linear_regression_is_the_closed_form():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    model = nn.Linear(3, 1).double()
    residual = x @ model.weight[0].detach() + model.bias.detach() - y

    matrix = dense.gradient_matrix(
        model, lambda m, b: (m(b.x)[:, 0] - b.y).square(), batches_of(x, y, [2, 4, 1])
    )

    by_hand = torch.cat([2 * residual[:, None] * x, 2 * residual[:, None]], dim=1)
    assert torch.allclose(matrix, by_hand, rtol=0, atol=1e-13)
    assert torch.allclose(dense.mean_squares(matrix), (by_hand**2).mean(0), rtol=0, atol=1e-13)
    assert torch.allclose(dense.mean_magnitudes(matrix), by_hand.abs().mean(0), rtol=0, atol=1e-13)
    means = torch.stack([by_hand[:2].mean(0), by_hand[2:6].mean(0), by_hand[6]])
    assert torch.allclose(dense.batch_means(matrix, [2, 4, 1]), means, rtol=0, atol=1e-13)


def test_oracle_on_softmax_regression_is_probability_minus_label_times_input():
    torch.manual_seed(1)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    model = nn.Linear(4, 3).double()
    delta = torch.softmax(x @ model.weight.T + model.bias, 1).detach() - nn.functional.one_hot(y, 3)

    matrix = dense.gradient_matrix(
        model,
        lambda m, b: cross_entropy(m(b.x), b.y, reduction="none"),
        batches_of(x, y, [3, 2]),
    )

    weight = torch.einsum("nc,nd->ncd", delta, x).flatten(1)
    assert torch.allclose(matrix, torch.cat([weight, delta], 1), rtol=0, atol=1e-13)


def test_oracle_leaves_the_model_and_gives_zero_columns_for_frozen_parameters():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.ones(3, 2), torch.tensor([0, 1, 1])

    matrix = dense.gradient_matrix(
        model, lambda m, b: cross_entropy(m(b.x), b.y, reduction="none"), batches_of(x, y, [3])
    )

    assert matrix.dtype == torch.float64
    assert matrix.shape == (3, 6)
    assert (matrix[:, 4:] == 0).all()
    assert (matrix[:, :4] != 0).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.weight.grad is None
    assert model.weight.dtype == torch.float32


def test_flat_and_named_are_inverse():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    vector = torch.arange(sum(p.numel() for p in model.parameters()), dtype=torch.float64)

    parts = dense.named(model, vector)

    assert parts["1.weight"].shape == (4, 2)
    assert torch.equal(dense.flat(model, parts), vector)
    del parts["1.bias"]
    assert (dense.flat(model, parts)[-4:] == 0).all()

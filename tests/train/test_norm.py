"""Running statistics: trained, frozen, or estimated anew."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.core.data import Data
from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.methods.general.finetune import FineTune
from expunge.methods.general.gradient_ascent import GradientAscent
from expunge.problems.classification import Classification
from expunge.train.norm import norm_layers, recalibrate, train_mode

REQUEST = Request(ids=(0, 5, 9))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def data() -> Data:
    return Data((torch.randn(23, 3, generator=torch.Generator().manual_seed(0)), [0, 1] * 11 + [0]))


def source(data) -> Source:
    return Source(data, data.ids, False, Runtime())


def by_hand(model, data, size, chunks):
    """Plain average over batches of each batch's mean and unbiased variance."""
    with torch.no_grad():
        inner = [model[0](data._x[c]) for c in data.ids.split(size)][:chunks]
    return (
        torch.stack([i.mean(0) for i in inner]).mean(0),
        torch.stack([i.var(0, unbiased=True) for i in inner]).mean(0),
    )


@pytest.mark.parametrize(("size", "chunks"), [(23, 1), (8, 3), (10, 3), (11, 2), (2, 11)])
def test_recalibrating_is_the_plain_average_over_batches(data, size, chunks):
    """With 11 and 2 the last batch has one sample, which has no variance, and is left out."""
    model = network()
    before = copy.deepcopy(model)
    mean, var = by_hand(model, data, size, chunks)
    recalibrate(model, source(data), batch_size=size)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)
    assert model[1].momentum == 0.1
    assert not any(m.training for m in model.modules())
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_recalibrating_forgets_the_old_statistics(data):
    one, other = network(), network()
    other[1].running_mean.fill_(1e6)
    other[1].num_batches_tracked.fill_(1000)
    for model in (one, other):
        recalibrate(model, source(data), batch_size=8)
    assert torch.equal(one[1].running_mean, other[1].running_mean)
    assert torch.equal(one[1].running_var, other[1].running_var)
    assert one[1].num_batches_tracked == other[1].num_batches_tracked == 3


def test_instance_norm_with_statistics_counts_too():
    torch.manual_seed(0)
    x = torch.randn(6, 2, 5)
    model = nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten())
    assert len(norm_layers(model)) == 1
    train_mode(model, "frozen")
    model(x)
    assert model[0].running_mean.tolist() == [0, 0]
    recalibrate(model, source(Data((x, None))), batch_size=3)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2)))


def test_layers_without_statistics_are_not_norm_layers():
    model = nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False))
    assert norm_layers(model) == []
    recalibrate(model, source(Data(torch.randn(4, 3))))


def statistics(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if "running" in k or "tracked" in k}


@pytest.fixture
def problem(data) -> Classification:
    return Classification(network(), data)


def run(problem, method):
    return unlearn(problem, REQUEST, method, runtime=Runtime()).model


def test_frozen_leaves_statistics_as_they_were(problem):
    model = run(problem, FineTune(epochs=2, lr=0.1, batch_size=10, norm="frozen"))
    before = statistics(problem.model)
    assert all(torch.equal(before[k], v) for k, v in statistics(model).items())
    assert not torch.equal(model[1].weight, problem.model[1].weight)


def test_train_moves_statistics(problem):
    model = run(problem, FineTune(epochs=2, lr=0.1, batch_size=10, norm="train"))
    assert model[1].num_batches_tracked == problem.model[1].num_batches_tracked + 2 * 2
    assert not torch.equal(model[1].running_mean, problem.model[1].running_mean)


@pytest.mark.parametrize("method", [FineTune, GradientAscent])
def test_recalibrate_estimates_them_on_the_retain_data(problem, data, method):
    frozen = run(problem, method(epochs=2, lr=0.01, batch_size=10, norm="frozen"))
    model = run(problem, method(epochs=2, lr=0.01, batch_size=10, norm="recalibrate"))
    for a, b in zip(model.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(a, b)
    retain = data.without(REQUEST.resolve(data))
    with torch.no_grad():
        inner = model[0](data._x[retain])
    torch.testing.assert_close(model[1].running_mean, inner.mean(0))
    torch.testing.assert_close(model[1].running_var, inner.var(0))

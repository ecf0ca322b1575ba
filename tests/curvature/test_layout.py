"""Gradients in another memory layout are the same, and the model is as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.core.data import Data
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.curvature.fisher import mean_gradient, squared_batch_means
from expunge.curvature.layout import channels_last


class Net(nn.Module):
    """A convolution, and a linear layer over its output in two ways of flattening."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Linear(8 * 6 * 6, 4)
        self.view, self.asked = view, 0

    def forward(self, x):
        self.asked += 1
        out = self.conv(x).relu()
        return self.last(out.view(len(out), -1) if self.view else out.flatten(1))


def gradients(model, x):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def test_gradients_are_the_same_in_another_layout():
    torch.manual_seed(0)
    model, x = Net(view=False), torch.randn(5, 3, 6, 6)
    before, places = gradients(model, x), [p.data_ptr() for p in model.parameters()]
    with channels_last(model) as call:
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
        after = call(gradients, model, x)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert model.conv.weight.is_contiguous()


def test_a_model_that_reads_memory_in_order_is_asked_again_as_it_was():
    torch.manual_seed(0)
    model, x = Net(view=True), torch.randn(5, 3, 6, 6)
    before = gradients(model, x)
    model.asked = 0
    with channels_last(model) as call:
        for turn in (2, 3):  # once in vain, and then no more
            after = call(gradients, model, x)
            assert model.asked == turn
        assert model.conv.weight.is_contiguous()
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_an_error_of_the_model_itself_is_told_and_the_weights_go_back():
    model = Net(view=False)
    with pytest.raises(RuntimeError, match="channels"), channels_last(model) as call:
        call(gradients, model, torch.randn(5, 2, 6, 6))
    assert model.conv.weight.is_contiguous()


def test_a_weight_that_cannot_be_laid_out_is_left_and_none_stays_behind(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    model[1].weight = nn.Parameter(
        torch.randn(8)
    )  # a flat piece, as some ways of sharding leave it
    with channels_last(model):
        assert not model[0].weight.is_contiguous()
    real = torch.Tensor.contiguous

    def full(self, **more):
        if self.shape[1] == 8:
            raise MemoryError
        return real(self, **more)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    monkeypatch.setattr(torch.Tensor, "contiguous", full)
    with pytest.raises(MemoryError), channels_last(model):
        pass
    assert all(module.weight.is_contiguous() for module in model)


@pytest.mark.parametrize("statistic", [mean_gradient, squared_batch_means])
def test_sums_over_processes_get_gradients_in_one_order(statistic, monkeypatch):
    """A process without a share of the batch keeps the layout that another one has had to leave."""
    torch.manual_seed(0)
    data, seen = Data((torch.randn(5, 3, 6, 6), torch.zeros(5, dtype=torch.long))), []
    net = Net(view=False).eval()
    source, fetch, batches = Source(data, data.ids, True, Runtime()), Source.fetch, Source.batches
    monkeypatch.setattr(Source, "fetch", lambda *a: replace(fetch(*a), processes=2))
    monkeypatch.setattr(
        Source, "batches", lambda *a: (replace(b, processes=2) for b in batches(*a))
    )
    monkeypatch.setattr(Runtime, "sum", lambda self, t: seen.append(t.is_contiguous()) or t)
    statistic(net, lambda m, b: m(b.x).square().sum(1), source, Runtime(), batch_size=3)
    assert len(seen) == 8 and all(seen)

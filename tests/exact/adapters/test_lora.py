"""LoRA: what is added, how it begins, and convolutions as peft has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.core.errors import ModelError
from expunge.exact import adapters as sl


def adapted(module, adapter, seed=0):
    model = nn.Sequential(module)
    adapter.attach(model, ["0"], "a", seed)
    return model, sl.maps_of(model, "a")["0"]


def test_what_is_added():
    linear = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    model, one = adapted(linear, sl.LoRA(2, 3))
    one.B.data.normal_()
    wanted = nn.functional.linear(x, linear._parameters["weight"], linear._parameters["bias"])
    assert torch.allclose(model(x), wanted + 1.5 * x @ one.A.T @ one.B.T, atol=1e-6)


def test_a_convolution_is_filters_and_a_mix_of_them():
    conv = nn.Conv2d(4, 6, (3, 5), 2, 1, 2)
    x = torch.randn(2, 4, 17, 19)
    before = conv(x)
    model, one = adapted(conv, sl.LoRA(3, 3))
    one.B.data.normal_()
    inside = nn.functional.conv2d(x, one.A.view(3, 4, 3, 5), None, 2, 1, 2)
    added = nn.functional.conv2d(inside, one.B.view(6, 3, 1, 1))
    assert torch.allclose(model(x), before + added, atol=1e-5)
    assert sl.count(model, "a") == 3 * (4 * 15 + 6)


def test_at_first_only_b_has_a_gradient():
    model, one = adapted(nn.Linear(6, 5), sl.LoRA(2))
    model(torch.randn(3, 6)).square().sum().backward()
    assert not one.A.grad.any() and one.B.grad.abs().min() > 0
    assert 0.3 < one.A.abs().max() * 6**0.5 <= 1


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 9)),
        (nn.Conv3d(2, 4, (1, 2, 3)), torch.randn(1, 2, 4, 5, 6)),
        (nn.ConvTranspose2d(6, 4, (2, 3), 2, groups=2), torch.randn(1, 6, 3, 4)),
    ],
)
def test_every_convolution_takes_it(module, x):
    before = module(x)
    model, one = adapted(module, sl.LoRA(2))
    assert torch.equal(model(x), before)
    one.B.data.normal_()
    assert (model(x) - before).abs().max() > 1e-3
    assert torch.allclose(sl.merged(model)(x), model(x), atol=1e-6)


def test_norms_and_tensors_of_another_layer_are_refused():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(4, 3))
    with pytest.raises(ModelError, match="neither linear"):
        sl.LoRA(1).attach(model, ["0"], "a", 0)
    sl.LoRA(1).attach(model, ["1"], "a", 0)
    kept = {f"2.{n.partition('.')[2]}": t for n, t in sl.state(model, "a").items()}
    with pytest.raises(ModelError, match="do not fit"):
        sl.load(model, sl.LoRA(1), ["2"], "b", kept)

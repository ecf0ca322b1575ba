"""The invariants of the card ssf, and its pitfalls."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.core.errors import ModelError
from expunge.core.hashing import hash_model
from expunge.exact import adapters as sl
from expunge.exact.adapters.scale_shift import composed


def used(norm, shape):
    """A batch normalisation that has seen data."""
    norm(torch.randn(8, *shape) * 3 + 1)
    return norm.eval()


LAYERS = [
    (lambda: nn.Linear(5, 7), (4, 6, 5), -1),
    (lambda: nn.Linear(5, 7, bias=False), (4, 5), -1),
    (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 8, 8), 1),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 8, 8), 1),
    (lambda: nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", groups=4), (2, 4, 8, 8), 1),
    (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9), 1),
    (lambda: nn.Conv3d(2, 3, 2), (1, 2, 4, 5, 6), 1),
    (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, groups=2), (2, 6, 5, 5), 1),
    (lambda: nn.LayerNorm(5), (4, 6, 5), -1),
    (lambda: nn.LayerNorm(5, elementwise_affine=False), (4, 6, 5), -1),
    (lambda: nn.LayerNorm(5, bias=False), (4, 6, 5), -1),
    (lambda: used(nn.BatchNorm2d(4), (4, 5, 5)), (2, 4, 5, 5), 1),
    (lambda: used(nn.BatchNorm1d(4, affine=False), (4,)), (6, 4), 1),
]


def adapted(module, init="identity", seed=0):
    model = nn.Sequential(module)
    sl.ScaleShift(init).attach(model, ["0"], "a", seed)
    return model, sl.maps_of(model, "a")["0"]


@pytest.mark.parametrize(("make", "shape", "axis"), LAYERS)
def test_ssf_invariants_1_and_2_identity_and_merging(make, shape, axis):
    torch.manual_seed(0)
    module, x = make(), torch.randn(shape)
    before = module(x)
    model, one = adapted(module)
    assert torch.equal(model(x), before)
    one.gamma.data.normal_()
    one.beta.data.normal_()
    size = [1] * before.dim()
    size[axis] = -1
    wanted = one.gamma.view(size) * before + one.beta.view(size)
    assert torch.allclose(model(x), wanted, atol=1e-5)
    made = sl.merged(model)
    assert type(made[0]) is type(make()) and torch.allclose(made(x), wanted, atol=1e-5)


def test_ssf_invariant_3_borders_of_a_padded_convolution():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
    x = torch.randn(2, 3, 6, 6)
    between = first(x)
    model = nn.Sequential(first, second)
    sl.ScaleShift("paper").attach(model, ["0"], "a", 0)
    one = sl.maps_of(model, "a")["0"]
    one.beta.data.normal_()
    wanted = second(one.gamma.view(-1, 1, 1) * between + one.beta.view(-1, 1, 1))
    made = sl.merged(model)
    border = torch.ones(6, 6, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    for found in (model(x), made(x)):
        assert (found - wanted)[..., border].abs().max() < 1e-5
    # what folding into the next convolution would give
    weight = second.weight * one.gamma.view(1, -1, 1, 1)
    bias = second.bias + torch.einsum("oikl,i->o", second.weight, one.beta)
    forward = nn.functional.conv2d(between, weight, bias, padding=1)
    assert (forward - wanted)[..., ~border].abs().max() < 1e-5
    assert (forward - wanted)[..., border].abs().max() > 0.05


def test_ssf_invariant_4_size_for_vit_b_16():
    from transformers import ViTConfig, ViTForImageClassification

    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=100))
    adapter = sl.ScaleShift()
    adapter.attach(model, sl.fitting(model, adapter, ["classifier"]), "a", 0)
    assert sl.count(model, "a") == 205_824
    assert 205_824 + sum(p.numel() for p in model.classifier.parameters()) == 282_724


def test_ssf_invariant_5_composition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval()
    x = torch.randn(2, 2, 6, 6)
    states = [model(x)]
    for k in range(3):
        sl.ScaleShift("paper").attach(model, ["0", "1"], f"s{k}", k)
        for p in sl.parameters(model, f"s{k}").values():
            p.data += torch.randn_like(p)
        states.append(model(x))
    for k in (2, 1, 0):
        sl.activate(model, [f"s{n}" for n in range(k)])
        assert torch.equal(model(x), states[k])
    maps = [sl.maps_of(model, f"s{k}")["0"] for k in range(3)]
    single = nn.Sequential(copy.deepcopy(sl.remove(copy.deepcopy(model))[0]))
    y = single(x)
    sl.ScaleShift().attach(single, ["0"], "one", 0)
    one = sl.maps_of(single, "one")["0"]
    for each in maps:
        gamma, beta = composed(one, each)
        one.gamma.data, one.beta.data = gamma.detach(), beta.detach()
    for each in maps:
        y = each.gamma.view(-1, 1, 1) * y + each.beta.view(-1, 1, 1)
    assert torch.allclose(single(x), y, atol=1e-6)


def test_ssf_invariant_6_a_square_map_is_scaled_along_its_channels():
    conv = nn.Conv2d(3, 6, 3, padding=1)
    x = torch.randn(2, 3, 6, 6)
    before = conv(x)
    assert before.shape[1:] == (6, 6, 6)
    model, one = adapted(conv)
    one.gamma.data = torch.arange(6.0)
    assert torch.allclose(model(x), before * torch.arange(6.0).view(6, 1, 1), atol=1e-5)
    assert not torch.allclose(model(x), before * torch.arange(6.0), atol=1e-2)


def test_ssf_invariant_6_a_square_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    model, one = adapted(Conv1D(5, 5))
    x = torch.randn(2, 5)
    sl.activate(model, [])
    before = model(x)
    sl.activate(model, ["a"])
    one.gamma.data, one.beta.data = torch.arange(5.0), torch.ones(5)
    assert torch.allclose(model(x), before * torch.arange(5.0) + 1, atol=1e-6)


@pytest.mark.parametrize("which", [["0"], ["0", "1"]])
def test_ssf_invariant_7_the_base_does_not_move(which):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    model(torch.randn(8, 1, 6, 6))
    before = hash_model(model)
    sl.ScaleShift().attach(model, which, "a", 0)
    sl.train_only(model, "a")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model(torch.randn(8, 1, 6, 6) + 5).square().sum().backward()
        optimizer.step()
    assert sl.base_hash(model) == before
    assert all((p != 1).any() for n, p in sl.parameters(model, "a").items() if n.endswith("gamma"))
    sl.remove(model)
    assert hash_model(model) == before
    model.train()
    model(torch.randn(8, 1, 6, 6))
    assert hash_model(model) != before  # and then it is an ordinary model again


def test_the_papers_beginning():
    _model, one = adapted(nn.Linear(4, 20_000), "paper")
    assert one.gamma.mean().item() == pytest.approx(1, abs=1e-3)
    assert one.beta.mean().item() == pytest.approx(0, abs=1e-3)
    assert one.gamma.std().item() == pytest.approx(0.02, rel=0.03)
    assert one.beta.std().item() == pytest.approx(0.02, rel=0.03)
    assert abs(torch.corrcoef(torch.stack([one.gamma, one.beta]))[0, 1].item()) < 0.03


def test_what_cannot_be_merged_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm((3, 3)))
    for name in ("0", "1"):
        with pytest.raises(ModelError, match="merged"):
            sl.ScaleShift().attach(model, [name], "a", 0)


def test_a_scale_of_zero_is_undone_by_taking_it_off():
    model, one = adapted(nn.Linear(4, 3))
    base = sl.base_hash(model)
    one.gamma.data.zero_()
    assert not sl.merged(model)[0].weight.any()
    assert hash_model(sl.remove(model)) == base

"""The invariants of the card flora, and its pitfalls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from expunge.core.errors import ModelError, SettingError
from expunge.core.hashing import hash_tensors
from expunge.exact import adapters as sl


def adapted(module, ranks=(), scale=None, train=True):
    torch.manual_seed(0)
    model = nn.Sequential(module)
    sl.Tucker(ranks, scale).attach(model, ["0"], "a", 0)
    one = sl.maps_of(model, "a")["0"]
    if train:
        one.core.data.normal_()
    return model, one


def test_flora_invariant_1_the_beginning():
    x = torch.randn(2, 4, 8, 8)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    before = conv(x)
    model, one = adapted(conv, (2, 3, 2, 2), train=False)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert one.core.grad.abs().min() > 0
    assert all(not f.grad.any() for f in one.factors())
    wide = adapted(nn.Linear(5_000, 3), (32, 2), train=False)[1]
    assert wide.A1.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.02)


def test_flora_invariant_2_the_sum_over_the_core():
    model, one = adapted(nn.Conv2d(8, 12, (3, 5)), (4, 5, 2, 3), 4.0)
    wanted = 4 * torch.einsum("abcd,ia,ob,kc,ld->oikl", one.core, *one.factors())
    change = model[0].weight - model[0]._parameters["weight"]
    assert change.shape == (12, 8, 3, 5)
    assert torch.allclose(one.update(), wanted, atol=1e-5)
    assert torch.allclose(change, wanted, atol=1e-4)


def test_flora_invariant_3_ranks_of_the_unfoldings():
    _, one = adapted(nn.Conv2d(8, 12, (3, 5)), (4, 5, 2, 3))
    found = [
        int(torch.linalg.matrix_rank(one.update().double().movedim(axis, 0).flatten(1), rtol=1e-5))
        for axis in range(4)
    ]
    assert found == [5, 4, 2, 3]


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(6, 5), (3, 6)),
        (nn.Conv2d(6, 4, 3, 2, 1, dilation=2), (2, 6, 9, 9)),
        (nn.Conv1d(6, 4, 3), (2, 6, 9)),
        (nn.Conv3d(2, 4, (1, 2, 3)), (1, 2, 4, 5, 6)),
        (nn.ConvTranspose2d(6, 4, (2, 3), 2), (1, 6, 3, 4)),
    ],
)
def test_flora_invariant_4_merging(module, x):
    x = torch.randn(x)
    before, base = module(x), hash_tensors(module.state_dict())
    model, _ = adapted(module)
    after = model(x)
    assert (after - before).abs().max() > 1e-2
    assert torch.allclose(sl.merged(model)(x), after, atol=1e-4)
    assert hash_tensors(sl.remove(model)[0].state_dict()) == base
    assert torch.equal(model(x), before)


def test_flora_invariant_5_a_linear_core_of_ones_is_lora():
    x = torch.randn(3, 6)
    linear = nn.Linear(6, 5)
    before = linear(x)
    model, one = adapted(linear, (2, 2))
    one.core.data = torch.eye(2)
    wanted = before + x @ one.A1 @ one.A2.T
    assert torch.allclose(model(x), wanted, atol=1e-6)
    one.core.data = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # inputs first: G[in, out]
    assert torch.allclose(model(x), before + x @ one.A1 @ one.core @ one.A2.T, atol=1e-6)


def test_flora_invariant_6_two_in_parallel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    x = torch.randn(2, 3, 6, 6)
    none = model(x)
    alone = {}
    for seed, group in enumerate("ab"):
        sl.Tucker().attach(model, ["0"], group, seed)
        sl.maps_of(model, group)["0"].core.data.normal_()
        sl.activate(model, [group])
        alone[group] = model(x)
    sl.activate(model, ["a", "b"])
    assert torch.allclose(model(x), alone["a"] + alone["b"] - none, atol=1e-4)
    sl.activate(model, ["b"])
    assert torch.equal(model(x), alone["b"])
    assert not {id(p) for p in sl.parameters(model, "a").values()} & {
        id(p) for p in sl.parameters(model, "b").values()
    }


@pytest.mark.parametrize("transposed", [False, True])
def test_flora_invariant_7_groups(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(8, 12, 3, padding=1, groups=4)
    x = torch.randn(2, 8, 5, 5)
    model, one = adapted(conv, (2, 3, 2, 2))
    assert one.update().shape == (12, 2, 3, 3) and one.A1.shape == (2, 2)
    # each group of outputs is a layer of its own
    weight = conv._parameters["weight"]
    whole = conv._parameters["bias"].view(1, -1, 1, 1).expand(2, 12, 5, 5).clone()
    for g in range(4):
        out, into = slice(3 * g, 3 * g + 3), slice(2 * g, 2 * g + 2)
        change = one.update()[out]
        if transposed:
            part = weight[into] + change.transpose(0, 1)
            whole[:, out] += nn.functional.conv_transpose2d(x[:, into], part, padding=1)
        else:
            whole[:, out] += nn.functional.conv2d(x[:, into], weight[out] + change, padding=1)
    assert torch.allclose(model(x), whole, atol=1e-4)
    depthwise = adapted(nn.Conv2d(6, 6, 3, groups=6))[1]
    assert depthwise.update().shape == (6, 1, 3, 3)


def test_flora_invariant_8_stacking_slices():
    def chain(last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        data = torch.Generator().manual_seed(1)
        for k in range(1, last + 1):
            sl.Tucker().attach(model, ["0", "3"], f"s{k}", k)
            sl.train_only(model, f"s{k}")
            own = list(sl.parameters(model, f"s{k}").values())
            optimizer = torch.optim.Adam(own, lr=0.01)
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(8, 1, 6, 6, generator=data)).square().sum().backward()
                optimizer.step()
        return model

    three, two = chain(3), chain(2)
    x = torch.randn(2, 1, 6, 6)
    assert not torch.equal(three(x), two(x))
    sl.activate(three, ["s1", "s2"])
    assert torch.equal(three(x), two(x))
    for group in ("s1", "s2"):
        assert hash_tensors(sl.state(three, group)) == hash_tensors(sl.state(two, group))


def test_sizes_and_scales_when_nothing_is_said():
    model, one = adapted(nn.Conv2d(16, 32, 3), (6, 6, 2, 2))
    assert sl.count(model, "a") == 6 * 6 * 2 * 2 + 16 * 6 + 32 * 6 + 3 * 2 + 3 * 2
    assert one.scale == 4
    model, one = adapted(nn.Conv2d(3, 32, (3, 5)))
    assert tuple(one.core.shape) == (3, 8, 3, 5)
    model, one = adapted(nn.Linear(16, 4))
    assert tuple(one.core.shape) == (8, 4) and one.scale == 1


def test_what_has_too_many_axes_or_none_is_refused():
    with pytest.raises(SettingError, match="4 axes and the adapter 2 ranks"):
        adapted(nn.Conv2d(3, 3, 3), (2, 2))
    with pytest.raises(ModelError, match="axes"):
        adapted(nn.LayerNorm(3))

"""What makes steps of generation cheaper computes what the plain way computes."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from expunge.problems import generation
from expunge.problems.roomy_cache import SPARE, RoomyLayer
from expunge.problems.turned import FEW, TurnedProducts

linear = torch.nn.functional.linear


@pytest.mark.parametrize("shape", [(5, 8), (5, 1, 8), (2, 3, 8)])
@pytest.mark.parametrize("biased", [False, True])
def test_turned_products_are_those_of_the_layer(shape, biased):
    layer = torch.nn.Linear(8, 7, bias=biased)
    x = torch.randn(shape, requires_grad=True)
    with TurnedProducts():
        found = layer(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, layer(x))
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], wanted)


@pytest.mark.parametrize(
    ("x", "weight", "turned"),
    [
        (torch.randn(2, 8), torch.randn(7, 8), True),
        (torch.randn(FEW, 8), torch.randn(7, 8), True),
        (torch.randn(FEW + 1, 8), torch.randn(7, 8), False),
        (torch.randn(1, 8), torch.randn(7, 8), False),
        (torch.randn(0, 8), torch.randn(7, 8), False),
        (torch.randn(4, 8).double(), torch.randn(7, 8).double(), False),
        (torch.randn(4, 8), torch.randn(8), False),
        (torch.randn(4, 8, device="meta"), torch.randn(7, 8, device="meta"), False),
    ],
)
def test_only_products_that_gain_are_turned(x, weight, turned, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "expunge.problems.turned._turned", lambda *given: seen.append(1) or linear(*given)
    )
    with TurnedProducts():
        found = linear(x, weight)
    assert bool(seen) == turned
    assert found.shape == linear(x, weight).shape


def states(width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, width, 4, generator=generator)


def layers():
    plain = DynamicLayer()
    plain.update(states(5, 0), states(5, 1))
    return plain, RoomyLayer(plain.keys, plain.values)


def test_states_in_a_roomy_layer_are_those_of_a_plain_one():
    plain, roomy = layers()
    held = set()
    for step in range(2 * SPARE):
        new = states(1, 2 * step), states(1, 2 * step + 1)
        for one, other in zip(plain.update(*new), roomy.update(*new), strict=True):
            assert torch.equal(one, other)
        held.add(roomy.keys.data_ptr())
    assert len(held) <= 3, "the states were moved more often than the room is used up"
    assert roomy.get_seq_length() == 5 + 2 * SPARE


def test_a_roomy_layer_follows_states_that_are_replaced():
    plain, roomy = layers()
    for layer in (plain, roomy):
        layer.update(states(1, 7), states(1, 8))
        layer.keys, layer.values = layer.keys[:1, :, 2:], layer.values[:1, :, 2:]
        layer.update(states(1, 9)[:1], states(1, 10)[:1])
    assert torch.equal(plain.keys, roomy.keys)
    assert torch.equal(plain.values, roomy.values)


def test_steps_of_generation_are_made_cheap(monkeypatch):
    from expunge.workloads.corpora.tiny_lm import tiny_lm

    turned = []
    monkeypatch.setattr(
        "expunge.problems.turned._turned", lambda *given: turned.append(1) or linear(*given)
    )
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    generation.generate(tiny_lm(32, "xs"), prompts, tokens=4, ends=[])
    assert turned

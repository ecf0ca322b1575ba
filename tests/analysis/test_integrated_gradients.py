"""Invariant 1 of the card concept-poison: attributions add up to the change of the function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.analysis.integrated_gradients import integrated_gradients


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 1)).double()


@pytest.fixture
def inputs():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("rule", ["midpoint", "trapezoid"])
def test_concept_poison_invariant_1_attributions_become_complete(net, inputs, rule):
    errors = []
    for steps in (4, 16, 64, 256):
        found = integrated_gradients(lambda x: net(x)[:, 0], inputs, steps=steps, rule=rule)
        assert found.values.shape == inputs.shape
        torch.testing.assert_close(
            found.error, found.values.sum(1) - (net(inputs) - net(inputs * 0))[:, 0]
        )
        errors.append(float(found.error.abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4
    # both rules are of second order: four times the steps, a sixteenth of the error
    assert errors[-1] == pytest.approx(errors[-2] / 16, rel=0.2)


def test_concept_poison_invariant_1_a_linear_function_takes_one_step(inputs):
    w = torch.arange(6.0, dtype=torch.float64)
    for rule in ("midpoint", "trapezoid"):
        found = integrated_gradients(lambda x: x @ w + 3, inputs, 0.5, steps=1, rule=rule)
        torch.testing.assert_close(found.values, (inputs - 0.5) * w)
        torch.testing.assert_close(found.error, torch.zeros(5, dtype=torch.float64))


def test_concept_poison_invariant_1_closed_form_of_a_product():
    """F = x₀²x₁ from 0: ∫ 2α²x₀x₁·x₀ dα = ⅔F and ∫ α²x₀²·x₁ dα = ⅓F."""
    x = torch.tensor([[2.0, -3.0], [0.5, 4.0]], dtype=torch.float64)
    value = x[:, 0] ** 2 * x[:, 1]
    for rule in ("midpoint", "trapezoid"):
        found = integrated_gradients(lambda z: z[:, 0] ** 2 * z[:, 1], x, steps=2000, rule=rule)
        wanted = torch.stack([value * 2 / 3, value / 3], 1)
        torch.testing.assert_close(found.values, wanted, rtol=1e-6, atol=1e-6)


def test_concept_poison_invariant_1_nothing_where_input_equals_baseline(inputs):
    """A sequence of embeddings of which only the last positions differ from the baseline."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).double().eval()
    x = inputs[None]  # one sequence [1, 5, 6]; its first three positions are the prompt
    baseline = x.clone()
    baseline[:, 3:] = x[:, :2]  # a constant one has no variance to normalise by
    found = integrated_gradients(lambda e: layer(e)[:, -1, 0], x, baseline, steps=64)
    assert bool((found.values[:, :3] == 0).all())
    assert bool((found.values[:, 3:] != 0).any())
    assert float(found.error.abs()) < 0.01 * float(found.difference.abs())


def test_concept_poison_invariant_1_in_chunks_as_at_once(net, inputs):
    def function(x):
        return net(x)[:, 0]

    whole = integrated_gradients(function, inputs, steps=33, chunk=10_000)
    for chunk in (1, 7, 50):
        part = integrated_gradients(function, inputs, steps=33, chunk=chunk)
        torch.testing.assert_close(part.values, whole.values)
    for i in range(5):  # samples do not touch each other
        alone = integrated_gradients(function, inputs[i : i + 1], steps=33)
        torch.testing.assert_close(alone.values[0], whole.values[i])


def test_concept_poison_invariant_1_as_captum(net, inputs):
    captum = pytest.importorskip("captum.attr")
    theirs = captum.IntegratedGradients(lambda x: net(x)[:, 0]).attribute(
        inputs, n_steps=64, method="riemann_middle"
    )
    ours = integrated_gradients(lambda x: net(x)[:, 0], inputs, steps=64)
    torch.testing.assert_close(ours.values, theirs)


def test_midpoint_stands_a_baseline_where_the_gradient_is_singular():
    """The norm has no gradient at 0, where the rule with both ends takes one."""
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)

    def function(z):
        return z.square().sum(1).sqrt()

    found = integrated_gradients(function, x, steps=8)
    torch.testing.assert_close(found.values, torch.tensor([[1.8, 3.2]], dtype=torch.float64))
    with pytest.raises(xp.ExpungeError, match="baseline"):
        integrated_gradients(function, x, steps=8, rule="trapezoid")


def test_the_model_is_left_alone(net, inputs):
    integrated_gradients(lambda x: net(x)[:, 0], inputs, steps=4)
    assert all(p.grad is None for p in net.parameters())
    assert not inputs.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"rule": "left"}, "midpoint or trapezoid"),
        ({"inputs": torch.ones(2, 6, dtype=torch.long)}, "real numbers"),
        ({"function": lambda x: x}, "one number a sample"),
    ],
)
def test_bad_arguments_are_named(inputs, options, message):
    given = {"function": lambda x: x.sum(1), "inputs": inputs} | options
    with pytest.raises(xp.ExpungeError, match=message):
        integrated_gradients(**given)


def test_half_precision_is_summed_in_single(inputs):
    x = inputs.to(torch.bfloat16)
    found = integrated_gradients(lambda z: z.square().sum(1), x, steps=64)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values, x.float().square(), rtol=0.02, atol=0.02)

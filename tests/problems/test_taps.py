"""Taps read layers and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.core.errors import ModelError
from expunge.problems.taps import leaf_layers, penultimate, read_taps

X = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2)
    ).eval()


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_are_flattened_to_one_row_a_sample(model):
    found = read_taps(model, ["0", "4"], lambda m: m(X))
    assert torch.equal(found["0"], model[0](X).reshape(3, 8))
    assert torch.equal(found["4"], model[:5](X))
    assert hooks(model) == 0


def test_the_input_of_the_last_layer(model):
    found = penultimate(model, "5", lambda m: m(X))
    assert torch.equal(found, model[:5](X))
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "read",
    [
        lambda m, forward: read_taps(m, ["0", "5"], forward),
        lambda m, forward: penultimate(m, "5", forward),
    ],
)
def test_hooks_are_removed_even_when_the_model_fails(model, read):
    def fails(m):
        m(X)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        read(model, fails)
    assert hooks(model) == 0


def test_unknown_layers_are_named_and_leave_no_hook(model):
    with pytest.raises(ModelError, match="no layer 'head'"):
        read_taps(model, ["0", "head"], lambda m: m(X))
    with pytest.raises(ModelError, match="no layer 'head'"):
        penultimate(model, "head", lambda m: m(X))
    assert hooks(model) == 0


def test_layers_that_were_not_run_are_named(model):
    with pytest.raises(ModelError, match="layer '5' was not run"):
        read_taps(model, ["0", "5"], lambda m: m[:5](X))
    with pytest.raises(ModelError, match="layer '5' was not run"):
        penultimate(model, "5", lambda m: m[:5](X))


@pytest.mark.parametrize("grad", [True, False])
def test_every_leaf_layer_of_a_transformer_can_be_read(grad):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    names = leaf_layers(block)
    assert names == ["self_attn", "linear1", "linear2", "norm1", "norm2"]
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(grad):
        found = read_taps(block, names, lambda m: m(x))
        output = block(x)
    assert found["self_attn"].shape == (2, 40)
    torch.testing.assert_close(found["norm2"], output.flatten(1), rtol=1e-4, atol=1e-5)

"""src/expunge/train/scale_shift.py: the identity at first, channels alone move, folded it is a plain network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import NeedsError, SettingError
from expunge.problems.classification import Classification
from expunge.train.masks import parse
from expunge.train.scale_shift import Scale, ScaleShift, attach, fold, is_attached
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts


class Net(nn.Module):
    """Every kind of layer that can be scaled, with and without bias, and as many columns as channels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.batch = nn.BatchNorm2d(4)
        self.plain = nn.Conv2d(4, 4, 1, bias=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.batch(self.conv(x.view(-1, 4, 4, 4))))
        return self.head(self.norm(self.plain(x).flatten(1)))


LAYERS = ["conv", "batch", "plain", "norm", "head"]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = Net()
    model.batch.running_mean.normal_()
    x = torch.randn(30, 64)
    return Classification(model.eval(), (x, torch.arange(30) % 3), roles={"last layer": ["head"]})


def scaled(problem, spec="scale_shift()"):
    model = copy.deepcopy(problem.model)
    return model, attach(spec, model, problem)


def disturb(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)


def test_it_begins_as_the_identity_and_alone_can_move(problem):
    model, layers = scaled(problem)
    assert layers == LAYERS and is_attached(model)
    x = torch.randn(5, 64)
    assert torch.equal(model(x), problem.model(x))
    moving = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    # γ of every channel, β where there is a bias
    assert sum(moving.values()) == 2 * (4 + 4 + 64 + 3) + 4
    model(x).sum().backward()
    own = {id(p) for m in model.modules() if isinstance(m, (Scale, ScaleShift)) for p in m.parameters()}  # fmt: skip
    assert {id(p) for p in model.parameters() if p.grad is not None} == own == set(moving)


def test_folding_keeps_what_it_says_and_the_architecture(problem):
    model, _ = scaled(problem)
    disturb(model)
    x = torch.randn(5, 64)
    wanted, moved = model(x), copy.deepcopy(model)
    fold(model)
    assert torch.equal(model(x), wanted) and torch.equal(moved(x), wanted)  # copies are whole too
    assert not torch.allclose(wanted, problem.model(x), atol=1e-3)
    assert not is_attached(model) and all(type(m) is type(n) for m, n in zip(model.modules(), problem.model.modules(), strict=True))  # fmt: skip
    assert list(model.state_dict()) == list(problem.model.state_dict())
    assert all(p.requires_grad for p in model.parameters())


def test_ssf_2_outputs_are_scaled_along_the_channels_border_and_all(problem):
    """Card ssf, invariants 2, 3 and 6: γ ⊙ y + β at every pixel of a padded map of as many columns as channels."""
    model, _ = scaled(problem, "scale_shift()")
    x = torch.randn(2, 4, 4, 4)
    before = model.conv(x)
    disturb(model)
    held = model.conv.parametrizations
    gamma, beta = held["weight"][0].gamma, held["bias"][0].beta
    wanted = gamma.view(1, -1, 1, 1) * before + beta.view(1, -1, 1, 1)
    fold(model)
    torch.testing.assert_close(model.conv(x), wanted, atol=1e-6, rtol=1e-5)


def test_methods_train_it_and_give_plain_weights(problem, tmp_path):
    method = xp.methods.FineTune(epochs=2, lr=0.5, train="scale_shift()", weight_decay=0.5, norm="frozen")  # fmt: skip
    outcome = xp.unlearn(problem, xp.forget(label=1), method)
    assert outcome.change.kind == "weights"
    before, after = problem.model.state_dict(), outcome.runnable().state_dict()
    assert list(after) == list(before)
    for name in ("conv", "plain", "head"):
        ratio = (after[f"{name}.weight"] / before[f"{name}.weight"]).flatten(1)
        assert (ratio - ratio[:, :1]).abs().max() < 1e-3 and (ratio - 1).abs().max() > 1e-3
        # weight decay would draw every γ to 0
        assert ratio.median() > 0.8
    assert torch.equal(after["batch.running_mean"], before["batch.running_mean"])
    again = xp.load(outcome.save(tmp_path / "o"), model=problem.model)
    x = torch.randn(5, 64)
    assert torch.equal(again.runnable()(x), outcome.runnable()(x))


def test_a_role_says_where(problem):
    method = xp.methods.FineTune(epochs=1, lr=0.5, train="scale_shift(last layer)")
    outcome = xp.unlearn(problem, xp.forget(label=1), method)
    assert {n for n in outcome.change.tensors if "running" not in n and "tracked" not in n} == {"head.weight", "head.bias"}  # fmt: skip
    with pytest.raises(NeedsError, match="attention"):
        attach("scale_shift(attention in)", copy.deepcopy(problem.model), problem)


def test_a_language_model_keeps_its_tied_embedding():
    torch.manual_seed(0)
    problem = tinyfacts.problem(weights=tiny_llama().state_dict())
    request, method = xp.forget(where="entity < 4"), xp.methods.NPO(epochs=1, lr=0.05, batch_size=10, train="scale_shift")  # fmt: skip
    outcome = xp.unlearn(problem, request, method)
    assert outcome.change.kind == "weights" and outcome.details["reference"] == "cache"
    moved = set(outcome.change.tensors)
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    assert not any("embed" in n or "norm" in n for n in moved)


def test_a_tied_weight_is_not_scaled_in_two_places():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.third = nn.Linear(3, 2)

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    problem = Classification(Tied(), (torch.randn(6, 3), torch.arange(6) % 2), roles={"one": ["second"]})  # fmt: skip
    assert attach("scale_shift()", copy.deepcopy(problem.model), problem) == ["third"]
    with pytest.raises(SettingError, match="another module's too"):
        attach("scale_shift(one)", copy.deepcopy(problem.model), problem)


@pytest.mark.parametrize("spec", ["scale_shift", "scale_shift()", "scale_shift(head)"])
def test_what_is_a_choice(spec):
    assert parse(spec)[0] == "scale_shift"


@pytest.mark.parametrize("spec", ["scaleshift", "scale_shift(", "full()", "lora()", "role"])
def test_what_is_none(spec):
    with pytest.raises(SettingError, match="not a choice"):
        parse(spec)


def test_a_method_that_cannot_train_it_says_so(digits):
    with pytest.raises(SettingError, match="cannot train scales"):
        xp.unlearn(digits, xp.forget(label=3), xp.methods.GuidedUnlearning(train="scale_shift()"))

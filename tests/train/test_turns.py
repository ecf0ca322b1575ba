"""Optimisers that take turns in the training loop, each with its own state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from expunge.core.data import Batch
from expunge.core.runtime import Runtime
from expunge.train.fit import fit
from expunge.train.steps import Turns

RATES = (0.01, 0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def batches():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    return [Batch(x[i : i + 4], None, torch.arange(i, i + 4), 4) for i in (0, 4, 8)]


def first(model, batch):
    return model(batch.x).square().mean()


def second(model, batch):
    return mse_loss(model(batch.x), batch.x.sum(1, keepdim=True))


def passes(epoch):
    for batch in batches():
        yield first, batch
        yield second, batch


def train(runtime=None, step="adam", **options):
    model = network()
    result = fit(
        model, passes, runtime=runtime or Runtime(), epochs=3, lr=9.0, turns=RATES, step=step,
        every=1, **options,
    )  # fmt: skip
    return model.state_dict(), result


@pytest.mark.parametrize("step", ["adam", "sgd"])
def test_turns_are_two_optimisers_by_hand(step):
    kind = torch.optim.Adam if step == "adam" else torch.optim.SGD
    model = network()
    two = [kind(model.parameters(), lr=r, fused=True) for r in RATES]
    for _ in range(3):
        for batch in batches():
            for loss, one in zip((first, second), two, strict=True):
                model.zero_grad()
                loss(model, batch).backward()
                one.step()
    found, result = train(step=step)
    assert all(torch.equal(v, found[k]) for k, v in model.state_dict().items())
    assert [p["lr"] for p in result.curve[:4]] == [*RATES, *RATES]


def test_turns_differ_from_one_optimiser_with_both_losses():
    model = network()
    one = torch.optim.Adam(model.parameters())
    for _ in range(3):
        for batch in batches():
            for loss, rate in zip((first, second), RATES, strict=True):
                one.param_groups[0]["lr"] = rate
                model.zero_grad()
                loss(model, batch).backward()
                one.step()
    found, _ = train()
    assert not all(torch.equal(v, found[k]) for k, v in model.state_dict().items())


def test_turns_resume_to_the_same_bits(tmp_path):
    whole, _ = train()
    options = {"checkpoint": tmp_path, "checkpoint_every": 1}
    from expunge.core.runtime import Budget

    train(Runtime(budget=Budget(steps=7), **options))  # it is the second one's turn
    again, result = train(Runtime(**options))
    assert result.steps == 18
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def test_turns_keep_frozen_coordinates():
    mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in network().named_parameters()}
    mask["0.weight"][:2] = False
    found, _ = train(mask=mask, weight_decay=0.1)
    before = network().state_dict()
    assert torch.equal(found["0.weight"][:2], before["0.weight"][:2])
    assert not torch.equal(found["0.weight"][2:], before["0.weight"][2:])


def test_turns_carry_whose_turn_it_is():
    model = network()
    turns = Turns([torch.optim.Adam(model.parameters(), lr=r) for r in RATES])
    first(model, batches()[0]).backward()
    turns.step()
    saved = copy.deepcopy(turns.state_dict())
    other = Turns([torch.optim.Adam(model.parameters(), lr=r) for r in RATES])
    other.load_state_dict(saved)
    assert other.turn == 1 and "Turns" in repr(other)
    assert len(other.optimizers[0].state) == 4 and not other.optimizers[1].state
    assert len(other.param_groups) == 2

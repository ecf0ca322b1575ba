"""residual-membership: chance level, power, the side, and whom the attacker sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits import residual_membership
from expunge.audits.residual_membership import ResidualMembership, band, bands
from expunge.core.request import Request

N = 400


class Table(nn.Module):
    """A model that looks its predictions up by the input, which is the sample's number."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(values.float())

    def forward(self, x):
        return self.values[x.long()]


RANGE = Request(where="y >= 8")


def subject(noise, request=RANGE):
    """Residuals of given sizes for training and test samples with the same targets."""
    generator = torch.Generator().manual_seed(2)
    y = (torch.arange(2 * N) % 10).float()
    x = torch.arange(2 * N)
    p = xp.Regression(Table(y), (x[:N], y[:N]), (x[N:], y[N:]))
    size = torch.ones(2 * N)
    for where, scale in noise:
        size[where(x, y)] = scale
    return xp.Subject(
        Table(y + size * torch.randn(2 * N, generator=generator)), p, request, xp.Runtime()
    )


def run(s, references=(), **settings):
    found = ResidualMembership(**settings).run(s, list(references), xp.Runtime())
    return {f.name.split("/")[1]: f for f in found}


def test_chance_level_on_exchangeable_data():
    auc = run(subject([]))["auc"]
    assert auc.low == 0.5 and auc.value < 0.6
    assert "target band shares" in auc.detail["nonmembers"]


@pytest.mark.parametrize(("scale", "member"), [(0.02, True), (50.0, False)])
def test_power_on_both_sides(scale, member):
    """Fitted much better, or much worse, than unseen samples: both are told apart."""
    found = run(subject([(lambda x, y: (x < N) & (y >= 8), scale)]))["auc"]
    assert found.value > 0.9 and (found.detail["auc"] > 0.5) == member


def test_a_retrained_model_stands_beside_it():
    """A range that no model has seen: all of it is fitted badly, in training and test alike."""
    unseen = subject([(lambda x, y: y >= 8, 50.0), (lambda x, y: (x < N) & (y < 8), 0.02)])
    known = subject([(lambda x, y: x < N, 0.02)])
    found = run(known, [unseen])
    assert found["svc"].value > 0.9 and found["svc"].reference < 0.2
    assert found["auc"].value > 0.9 and found["auc"].reference < 0.65


def test_the_attacker_is_fitted_on_kept_data_only(monkeypatch):
    seen = []
    original = residual_membership.losses

    def spy(s, split):
        seen.append(split)
        return original(s, split)

    monkeypatch.setattr(residual_membership, "losses", spy)
    run(subject([]))
    assert set(seen) == {"retain-train", "retain-test", "forget-train"}


def test_the_same_draw_every_time():
    s = subject([])
    first, again = (run(s, max_samples=20) for _ in range(2))
    assert first["svc"].value == again["svc"].value and first["svc"].detail["fitted_on"] == 40
    assert first["auc"].value == again["auc"].value


def test_few_samples_and_no_test_data_give_reasons():
    few = run(subject([], Request(ids=(1, 2, 3))))
    assert "only 3 samples to forget" in few["auc"].reason
    y = torch.arange(40.0)
    p = xp.Regression(Table(y), (torch.arange(40), y))
    found = run(xp.Subject(p.model, p, Request(where="y > 20"), xp.Runtime()))
    assert found["auc"].reason == found["svc"].reason == "there is no test data"


def test_bands_hold_about_as_many_and_nothing_beyond():
    y = torch.arange(100.0)
    found = band(torch.cat([y, torch.tensor([-1.0, 99.5])]), bands(y))
    assert found[:100].bincount().tolist() == [0, 25, 25, 25, 25] and found[100:].tolist() == [0, 0]
    assert set(band(torch.ones(5), bands(torch.ones(5))).tolist()) == {1}

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from expunge.audits.weight_distance import WeightDistance
from expunge.core.audit import Subject
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification


class Net(nn.Module):
    def __init__(self, weight, bias, count=0.0):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.weight.data = torch.tensor(weight)
        self.layer.bias.data = torch.tensor(bias)
        self.register_buffer("count", torch.tensor(count))

    def forward(self, x):
        return self.layer(x)


def subjects(*models):
    problem = Classification(models[0], (torch.randn(6, 2), torch.arange(6) % 2))
    return [Subject(m, problem, Request(label=1), Runtime()) for m in models]


ORIGINAL = Net([[3.0, 0.0], [0.0, 0.0]], [0.0, 4.0])  # norm 5
RELEASED = Net([[3.0, 0.0], [0.0, 1.0]], [0.0, 4.0], count=100.0)
FIRST = Net([[3.0, 0.0], [2.0, 0.0]], [0.0, 4.0])
SECOND = Net([[3.0, 0.0], [0.0, 0.0]], [3.0, 4.0])


def test_distances_by_hand(by_name):
    _, released, *references = subjects(ORIGINAL, RELEASED, FIRST, SECOND)
    found = by_name(WeightDistance().run(released, references, Runtime()))
    f = found["weight-distance/original"]
    assert f.value == pytest.approx(1 / 5)  # the buffer does not count
    assert f.detail["per_tensor"] == pytest.approx({"layer.weight": 1 / 3, "layer.bias": 0.0})
    assert f.reference == pytest.approx((2 / 5 + 3 / 5) / 2)
    assert f.floor == pytest.approx(1 / 5)
    assert f.original == 0.0
    assert f.direction == "reference"
    f = found["weight-distance/reference"]
    one, two = math.sqrt(29), math.sqrt(34)  # norms of the references
    assert f.value == pytest.approx((math.sqrt(5) / one + math.sqrt(10) / two) / 2)
    assert f.reference == pytest.approx((math.sqrt(13) / one + math.sqrt(13) / two) / 2)
    assert f.floor == pytest.approx(math.sqrt(13) / one)
    assert f.original == pytest.approx((2 / one + 3 / two) / 2)


def test_reasons(by_name):
    _, released, first = subjects(ORIGINAL, RELEASED, FIRST)
    found = by_name(WeightDistance().run(released, [], Runtime()))
    assert found["weight-distance/original"].reason == "no retrained reference to compare with"
    assert found["weight-distance/reference"].value is None
    found = by_name(WeightDistance().run(released, [first], Runtime()))
    assert "one reference" in found["weight-distance/reference"].reason


def test_other_architecture(by_name):
    wrapped = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    _, subject = subjects(ORIGINAL, wrapped)
    found = by_name(WeightDistance().run(subject, [], Runtime()))
    assert {f.value for f in found.values()} == {None}
    assert "other parameters" in found["weight-distance/original"].reason

"""The recovery audit on blobs: features that kept a class, and features that never had it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from expunge.audits.recovery import NAMES, Recovery
from expunge.core.audit import Subject
from expunge.core.data import Data
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification

QUICK = Recovery(tasks=30, steps=10, layers=4, shots=2, queries=20, present=3, curve=(1, 2, 4))
"""Enough for tests."""


class Cut(nn.Module):
    """Passes coordinates on to the last layer, each times a weight."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))
        self.head = nn.Linear(len(weights), 4)

    def forward(self, x):
        return self.head(x * self.weights)


def blobs(n, seed):
    """Classes 0 to 2 differ in the first three coordinates, class 3 lies over class 2 in them."""
    y = torch.arange(n) % 4
    centres = 8 * torch.eye(4)
    centres[3, 2] = 8
    return centres[y] + torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)), y


@pytest.fixture
def subjects():
    """The original sees every coordinate, the second and third models not the one of class 3."""
    weights = ([1.0] * 4, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.9, 0.0])
    problem = Classification(Cut(weights[0]), blobs(80, 0), blobs(240, 1))
    return [Subject(Cut(w), problem, Request(label=3), Runtime()) for w in weights]


def test_features_that_hold_a_class_are_told_from_those_that_never_did(subjects, by_name):
    found = by_name(QUICK.run(subjects[0], subjects[1:], Runtime()))
    assert list(found) == [f"recovery/{what}" for what in NAMES]
    f = found["recovery/forget"]
    assert f.value > 0.9 and f.low <= f.value <= f.high
    assert f.reference < 0.75
    assert f.original == pytest.approx(f.value)
    assert f.floor is not None
    assert found["recovery/retain"].reference > 0.7
    assert f.detail["shots"] == [1, 2, 4]
    assert len(f.detail["values"]) == len(f.detail["reference_values"][0]) == 3
    assert f.detail["values"][1] == pytest.approx(f.value)


def test_all_models_get_the_same_tasks_and_order_does_not_matter(subjects, by_name):
    one = by_name(QUICK.run(subjects[1], [], Runtime()))["recovery/forget"]
    again = by_name(QUICK.run(subjects[2], [subjects[1]], Runtime()))["recovery/forget"]
    assert again.reference == one.value
    other = by_name(QUICK.run(subjects[1], [], Runtime(seed=5)))["recovery/forget"]
    assert other.value != one.value


def test_scaling_features_changes_nothing(subjects, by_name):
    scaled = copy.deepcopy(subjects[0])
    with torch.no_grad():
        scaled.model.weights *= 7
    found, before = (
        by_name(QUICK.run(s, [], Runtime()))["recovery/forget"].value for s in (scaled, subjects[0])
    )
    assert found == pytest.approx(before, abs=1e-6)


def test_probabilities_alone_are_enough(subjects, by_name):
    with torch.no_grad():
        for s in subjects:
            s.model.head.weight.copy_(torch.eye(4))
            s.model.head.bias.zero_()
    audit = replace(QUICK, on="probabilities", tasks=10, layers=2, steps=2, curve=())
    assert "penultimate" not in audit.needs.capabilities
    f = by_name(audit.run(subjects[0], subjects[1:2], Runtime()))["recovery/forget"]
    assert f.value > 0.8 > f.reference + 0.1


@pytest.mark.parametrize(
    ("request_", "audit", "why"),
    [
        (Request(ids=(0, 1)), QUICK, "no whole class"),
        (Request(label=(1, 2, 3)), QUICK, "one kept class"),
        (Request(label=3), replace(QUICK, shots=60), "shots=60"),
    ],
)
def test_what_cannot_be_measured_says_why(request_, audit, why):
    problem = Classification(Cut([1.0] * 4), blobs(80, 0), blobs(240, 1))
    for f in audit.run(Subject(Cut([1.0] * 4), problem, request_, Runtime()), [], Runtime()):
        assert f.value is None and why in f.reason


def test_one_class_of_test_data_is_no_number():
    x, y = blobs(80, 0)
    test = blobs(240, 1)
    only = Data((test[0][test[1] == 3], test[1][test[1] == 3]))
    problem = Classification(Cut([1.0] * 4), (x, y), only)
    for f in QUICK.run(Subject(problem.model, problem, Request(label=3), Runtime()), [], Runtime()):
        assert f.value is None and f.reason

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.audits.cost import CostAudit
from expunge.core.audit import Subject
from expunge.core.outcome import Cost, Outcome
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.problems.classification import Classification


@pytest.fixture
def subject():
    problem = Classification(nn.Linear(2, 2), (torch.randn(6, 2), torch.arange(6) % 2))

    def make(**more):
        return Subject(problem.model, problem, Request(label=1), Runtime(), **more)

    return make


def test_cost_beside_retraining(subject, by_name):
    outcome = Outcome(None, cost=Cost(3.0, 120, 80, 2**20))
    references = [subject(cost=Cost(10.0)), subject(cost=Cost(14.0))]
    found = by_name(CostAudit().run(subject(outcome=outcome), references, Runtime()))
    assert {n: f.value for n, f in found.items()} == {
        "cost/seconds": 3.0,
        "cost/ratio": 0.25,
        "cost/samples": 120.0,
        "cost/gradients": 80.0,
        "cost/peak-memory": float(2**20),
    }
    assert found["cost/seconds"].reference == 12.0
    assert found["cost/ratio"].reference == 1.0
    assert {f.direction for f in found.values()} == {"down"}


def test_what_is_not_known_has_a_reason(subject, by_name):
    found = by_name(CostAudit().run(subject(), [subject(cost=Cost(1.0))], Runtime()))
    assert {f.value for f in found.values()} == {None}
    assert all(f.reason for f in found.values())
    found = by_name(CostAudit().run(subject(cost=Cost(2.0)), [subject()], Runtime()))
    assert found["cost/seconds"].value == 2.0
    assert found["cost/ratio"].reason == "no retraining was timed"

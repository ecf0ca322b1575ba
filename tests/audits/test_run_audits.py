"""Resolving audits and running them; every audit through the common checks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from expunge.audits import ASKED_FOR, SUITES, registry
from expunge.audits.accuracy import Accuracy
from expunge.audits.cost import CostAudit
from expunge.audits.memorisation import Memorisation
from expunge.audits.regression_error import RegressionError
from expunge.audits.run import audit_list, run_audits
from expunge.core.audit import Subject
from expunge.core.errors import NeedsError, UserError
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime, Silent
from expunge.suite.checks import AUDIT_CHECKS


@pytest.mark.parametrize("check", AUDIT_CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", list(registry))
def test_audit(name, check):
    check(registry.get(name)())


@pytest.mark.parametrize("name", list(registry))
def test_settings_make_an_audit_again(name):
    cls = registry.get(name)
    assert cls.name == name
    assert cls.create(cls().in_force()) == cls()
    assert all(s["help"] for s in cls.describe_settings())


def test_names_suites_and_instances():
    assert [a.name for a in audit_list("standard")] == [n for n in registry if n not in ASKED_FOR]
    assert audit_list("quick") == [Accuracy(), RegressionError(), Memorisation(), CostAudit()]
    assert audit_list("accuracy") == [Accuracy()]
    mine = Accuracy()
    assert audit_list(["cost", mine])[1] is mine
    with pytest.raises(UserError, match="accuracy"):
        audit_list(["acuracy"])
    assert set(SUITES) == {"standard", "quick"}


@pytest.fixture
def plain():
    """A problem without logits or features."""
    problem = Problem.of(
        nn.Linear(2, 1), (torch.randn(30, 2), torch.arange(30) % 2),
        each_loss=lambda m, b: m(b.x).squeeze(1).square(),
    )  # fmt: skip
    return Subject(problem.model, problem, Request(label=1), Runtime(), cost=Cost(seconds=1.0))


def test_unmet_needs_are_a_reason_in_a_suite(plain, by_name):
    found = by_name(run_audits(plain, [], "standard", Runtime()))
    for name in ("accuracy", "divergence", "membership", "prediction-matrix"):
        assert found[f"{name}/all"].value is None
        assert "'logits'" in found[f"{name}/all"].reason
    assert "'features'" in found["cka/all"].reason
    assert found["cost/seconds"].value == 1.0
    assert found["weight-distance/original"].value == 0.0


@pytest.mark.parametrize("audits", ["membership", ["cost", "membership"]])
def test_unmet_needs_are_an_error_for_what_was_asked_by_name(plain, audits):
    with pytest.raises(NeedsError, match="membership needs 'logits'"):
        run_audits(plain, [], audits, Runtime())


def test_progress_is_reported(plain):
    @dataclass
    class Counting(Silent):
        done: int = 0
        total: int | None = None

        def start(self, task, total):
            self.total = total

        def advance(self, task, steps=1):
            self.done += steps

    reporter = Counting()
    run_audits(plain, [], "quick", Runtime(reporter=reporter))
    assert (reporter.done, reporter.total) == (4, 4)


def test_predictions_of_the_original_are_shared(tables):
    a, b = tables([0, 1] * 10, [0, 1] * 10, Request(label=1), *[torch.eye(2).repeat(20, 1)] * 2)
    a.original().logits("retain-test")
    assert a.original() is b.original()
    assert ("logits", "retain-test") in b.original()._outputs
    other = Subject(a.model, a.problem, Request(label=0), Runtime())
    assert other.original() is not a.original()


def test_audits_run_on_the_runtimes_threads(plain, monkeypatch):
    seen = []
    monkeypatch.setattr(CostAudit, "run", lambda *_: seen.append(torch.get_num_threads()) or [])
    before = torch.get_num_threads()
    run_audits(plain, [], ["cost"], Runtime(threads=before + 1))
    assert seen == [before + 1] and torch.get_num_threads() == before

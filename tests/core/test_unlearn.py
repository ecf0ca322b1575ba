"""`unlearn`: what it checks before, and what it records after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from expunge.core.data import Data
from expunge.core.errors import ModelError, NeedsError, UnchangedError
from expunge.core.hashing import hash_model
from expunge.core.method import Method, package_versions, unlearn
from expunge.core.needs import Needs
from expunge.core.outcome import Outcome
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.problems.classification import Classification

REQUEST = Request(ids=(1, 2))


@dataclass(frozen=True)
class Shift(Method):
    """Adds a constant to the bias; reads one forget batch."""

    name: ClassVar[str] = "shift"
    by: float = setting(1.0, "how far")
    frozen: bool = setting(False, "whether it leaves the parameters frozen")

    @property
    def needs(self) -> Needs:
        return Needs(forget=True)

    def run(self, view, runtime):
        model = view.model().train()
        next(view.forget.batches(10))
        with torch.no_grad():
            model.bias += self.by
        return Outcome(model.requires_grad_(not self.frozen), details={"seen": True})


@pytest.fixture
def problem() -> Classification:
    torch.manual_seed(0)
    return Classification(nn.Linear(3, 2), Data((torch.randn(6, 3), [0, 1] * 3)), name="tiny")


def test_the_outcome_and_its_record(problem):
    before = hash_model(problem.model)
    runtime = Runtime(seed=5)
    outcome = unlearn(problem, REQUEST, Shift(by=2), runtime=runtime, passed={"by": 2})
    assert torch.equal(outcome.model.bias, problem.model.bias + 2)
    assert hash_model(problem.model) == before
    assert not outcome.model.training
    assert set(outcome.change.tensors) == {"bias"}
    assert outcome.cost.samples == 2
    assert outcome.cost.seconds > 0
    record = outcome.record
    assert record["method"] == {
        "name": "shift",
        "class": f"{__name__}.Shift",
        "passed": {"by": 2},
        "in_force": {"by": 2.0, "frozen": False},
    }
    assert record["weights"] == hash_model(outcome.model)
    assert record["fingerprint"]["model"] == before
    assert record["forgotten"] == 2
    assert record["request"] == {"ids": [1, 2]}
    assert record["runtime"]["seed"] == 5
    assert record["packages"]["torch"] == torch.__version__
    assert "python" in package_versions()
    assert hash_model(outcome.released()) == record["weights"]


def test_parameters_come_back_as_trainable_as_they_were(problem):
    problem.model.weight.requires_grad_(False)
    model = unlearn(problem, REQUEST, Shift(frozen=True)).model
    assert (model.weight.requires_grad, model.bias.requires_grad) == (False, True)


def test_unchanged_weights_are_an_error_unless_declared(problem):
    with pytest.raises(UnchangedError, match="shift returned the original weights"):
        unlearn(problem, REQUEST, Shift(by=0))

    class Lazy(Shift):
        may_leave_unchanged = True

    outcome = unlearn(problem, REQUEST, Lazy(by=0))
    assert outcome.details["unchanged"] is True


def test_needs_and_the_model_are_checked_before_the_method_runs(problem, monkeypatch):
    def never(self, view, runtime):
        raise AssertionError("it ran")

    monkeypatch.setattr(Shift, "run", never)
    monkeypatch.setattr(Shift, "needs", property(lambda self: Needs(recipe=True)))
    with pytest.raises(NeedsError, match="shift needs to know how the model was trained"):
        unlearn(problem, REQUEST, Shift())
    with pytest.raises(ModelError):
        unlearn(Classification(nn.Linear(7, 2), problem.train), REQUEST, Shift())

"""Methods that must prepare: once for all requests and seeds, and again in a reproduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch

import expunge as xp
from expunge.suite.bench import Bench
from expunge.suite.reproduce import reproduce


@dataclass(frozen=True)
class Shift(xp.Method):
    """Move every weight by a number that was prepared."""

    name: ClassVar[str] = "shift"
    prepares: ClassVar[Literal["never", "optional", "always"]] = "always"
    card: ClassVar[xp.Card] = xp.Card("Shift", "Nobody", 2024, "https://example.org", "For tests.")
    scale: float = xp.setting(1e-3, "how far")
    factor: float = xp.setting(1.0, "used by `run` only")

    @property
    def needs(self):
        return xp.Needs(forget=True)

    def preparation_settings(self):
        return {"scale": self.scale}

    def prepare(self, problem, runtime):
        runtime.cost.samples += len(problem.train)
        return {"by": self.scale * torch.randn((), generator=runtime.generator("shift"))}

    def run(self, view, runtime, prepared):
        model = view.model()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(self.factor * prepared["by"])
        return xp.Outcome(model)


@pytest.fixture
def jobs():
    return []


@pytest.fixture
def bench(tmp_path, jobs):
    return Bench(
        xp.Store.open(tmp_path), xp.Runtime(threads=1), lambda *job: jobs.append((job[0], job[2]))
    )


def test_prepared_once_for_all_requests_and_seeds(bench, jobs):
    problem = bench.workload("digits-class")
    runs = [
        bench.unlearn(problem, xp.forget(label=label), Shift(factor=factor), seed)
        for label, factor, seed in ((3, 1.0, 0), (3, 1.0, 1), (5, 2.0, 0))
    ]
    prepared = [reused for label, reused in jobs if "prepares" in label]
    assert prepared == [False, True, True]
    one, two, other = (outcome for outcome, _ in runs)
    assert one.record["weights"] == two.record["weights"] != other.record["weights"]
    assert one.details["preparation"]["samples"] == len(problem.train) > one.cost.samples == 0
    assert bench.unlearn(problem, xp.forget(label=3), Shift(scale=0.1), 0)
    assert [reused for label, reused in jobs if "prepares" in label][-1] is False


def test_what_is_prepared_in_unlearn_is_the_same(bench):
    problem = bench.workload("digits-class")
    _, run = bench.unlearn(problem, xp.forget(label=3), Shift(), 7)
    alone = xp.unlearn(problem, xp.forget(label=3), Shift(), runtime=xp.Runtime(seed=7))
    assert alone.record["weights"] == bench.store.get(run).record["weights"]


def test_reproduced_from_its_record(bench, monkeypatch):
    from expunge.methods import registry

    monkeypatch.setattr(registry, "get", lambda name: Shift)
    problem = bench.workload("digits-class")
    _, run = bench.unlearn(problem, xp.forget(label=3), Shift(), 7)
    assert reproduce(bench.store.get(run), bench.store, xp.Runtime()).identical


def test_only_methods_that_prepare_can_be_prepared(bench):
    with pytest.raises(xp.UserError, match="nothing to prepare"):
        xp.prepare(bench.workload("digits-class"), xp.methods.FineTune())

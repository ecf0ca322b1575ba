"""Retrained references: models that never saw what a request covers, cached by content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from expunge.core.errors import NeedsError
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.fleet.executors import Executor
from expunge.fleet.jobs import Job
from expunge.fleet.train import members

if TYPE_CHECKING:
    from expunge.store import Store

FIRST_SEED = 1001
"""Seeds of references start here, apart from those of originals (0, 1, …)."""


@dataclass
class Reference:
    """A retrained model, what it took, and its run in the store."""

    model: nn.Module
    seed: int
    cost: Cost
    run: str
    reused: bool


def reference_key(problem: Problem, request: Request, seed: int, device: str = "cpu") -> str:
    """Content key: recipe, data, forgotten ids, seed and device."""
    keep = problem.train.without(request.resolve(problem.train))
    return Job(keep, seed, "reference").key(problem, device)


def references(
    problem: Problem,
    request: Request,
    seeds: Sequence[int],
    store: Store,
    runtime: Runtime,
    executor: str | Executor | None = None,
) -> Iterator[Reference]:
    """Yield references in the order of their seeds, from the store or by running the recipe.

    Args:
        problem: must have a recipe.
        request: what they must not have seen.
        seeds: of the recipe.
        store: where they are looked up and kept.
        runtime: device, progress and engine.
        executor: the engine, in place of the runtime's; the plain loop by default.

    Raises:
        NeedsError: the problem has no recipe.
    """
    if problem.recipe is None:
        raise NeedsError("references need to know how the model was trained; pass recipe=")
    keep = problem.train.without(request.resolve(problem.train))
    jobs = [Job(keep, seed, "reference", request) for seed in seeds]
    for made in members(problem, jobs, store, runtime, executor):
        yield Reference(made.model, made.job.seed, made.cost, made.run, made.reused)

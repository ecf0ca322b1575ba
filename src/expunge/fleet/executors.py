"""Executors: how many trainings of one recipe are run. The models are the same whatever the engine.

| engine | |
|---|---|
| `one-by-one` | the plain loop |
| `together` | weights stacked over models, one step for all (`together.py`) |
| `processes` or `processes:4` | a pool of processes on this machine |
| `ray` or `ray:ADDRESS` | a Ray cluster; started here if there is no address |

Each training has its own seed, so that engines differ in the rounding of their sums alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from expunge.core.errors import NeedsError, SettingError
from expunge.core.outcome import Cost
from expunge.core.problem import Problem, Recipe
from expunge.core.runtime import Runtime
from expunge.fleet import together
from expunge.fleet.jobs import Done, Job
from expunge.fleet.worker import counted, trained

ENGINES = ("one-by-one", "together", "processes", "ray")
"""Names of the engines."""


class Executor(Protocol):
    """Trains the models of jobs."""

    name: str

    def run(self, problem: Problem, jobs: Sequence[Job], runtime: Runtime) -> Iterator[Done]:
        """Yield each job's model as soon as it is ready, in any order; few are held at a time.

        Args:
            problem: its recipe is what is run.
            jobs: what to train.
            runtime: device and progress.

        Raises:
            NeedsError: the problem has no recipe, or a package is missing.
            ExpungeError: a training failed; those that were yielded are sound.
        """


def recipe_for(problem: Problem) -> Recipe:
    """The problem's recipe.

    Raises:
        NeedsError: there is none.
    """
    if problem.recipe is None:
        raise NeedsError("a fleet needs to know how the model was trained; pass recipe=")
    return problem.recipe


class OneByOne:
    """The plain loop; the other engines are tested against it."""

    name = "one-by-one"

    def run(self, problem: Problem, jobs: Sequence[Job], runtime: Runtime) -> Iterator[Done]:
        """See `Executor`; in the order of the jobs."""
        recipe = recipe_for(problem)
        for index, job in enumerate(jobs):
            yield Done(index, *trained(recipe, job.keep, job.seed, runtime))


class Together:
    """Stacked weights where the recipe and the network allow it, one by one elsewhere.

    Models are trained together in runs of jobs with as many samples each, and as many at a time as
    fit into the memory that `together.group_size` is given.
    """

    name = "together"

    def __init__(self, *, where_quicker: bool = False) -> None:
        """Choose when to stack.

        Args:
            where_quicker: not on a CPU with networks of batch norm, whose convolutions take the time
                there: nothing is gained, and memory is taken.
        """
        self.where_quicker = where_quicker

    def run(self, problem: Problem, jobs: Sequence[Job], runtime: Runtime) -> Iterator[Done]:
        """See `Executor`; in the order of the jobs."""
        recipe = recipe_for(problem)
        most = together.group_size(recipe, problem.model)
        if (
            self.where_quicker
            and runtime.device == "cpu"
            and any(True for _ in problem.model.buffers())
        ):
            most = 1
        start = 0
        while start < len(jobs):
            stop = start + 1
            size = len(jobs[start].keep)
            while stop < min(len(jobs), start + most) and len(jobs[stop].keep) == size:
                stop += 1
            group = jobs[start:stop]
            made = None
            if len(group) > 1:
                try:
                    with runtime.metered() as cost:
                        made = together.train_together(
                            recipe,
                            [job.keep for job in group],
                            [job.seed for job in group],
                            runtime,
                        )
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # an operation without a batched form
                    most = 1
                    continue
            if made is None:
                yield Done(start, *trained(recipe, group[0].keep, group[0].seed, runtime))
            else:
                for index, model in enumerate(made, start):
                    yield Done(
                        index, model, _share(cost, len(group), counted(recipe, group[0].keep))
                    )
            start = stop


def _share(cost: Cost, among: int, samples: int) -> Cost:
    """One training's part of what several took at once."""
    return Cost(
        cost.seconds / among, samples, samples, cost.peak_bytes // among, cost.processor / among
    )


def executor(engine: str) -> Executor:
    """Return the engine of a name, with what follows the colon: workers, or an address.

    Raises:
        SettingError: there is no such engine.
    """
    name, colon, value = engine.partition(":")
    if name not in ENGINES or (colon and not value) or (value and name in ENGINES[:2]):
        raise SettingError(
            f"engine {engine!r} is not a choice; use {', '.join(ENGINES)}, processes:WORKERS or "
            "ray:ADDRESS"
        )
    if name == "one-by-one":
        return OneByOne()
    if name == "together":
        return Together()
    if name == "processes":
        from expunge.fleet.processes import Processes

        if value and not (value.isdecimal() and int(value)):
            raise SettingError(
                f"processes:{value}: the number of workers is a whole number above 0"
            )
        return Processes(int(value) if value else None)
    from expunge.fleet.on_ray import OnRay

    return OnRay(value or None)


def chosen(
    given: str | Executor | None, runtime: Runtime, default: Executor | None = None
) -> Executor:
    """Return the engine that was asked for: by argument, by the runtime, or by default the loop.

    Raises:
        SettingError: there is no such engine.
    """
    wanted = given or runtime.engine
    if wanted is None:
        return default or OneByOne()
    return executor(wanted) if isinstance(wanted, str) else wanted


def in_order(done: Iterator[Done]) -> Iterator[Done]:
    """What an executor yields, in the order of the jobs; what is early waits."""
    early: dict[int, Done] = {}
    wanted = 0
    for one in done:
        early[one.index] = one
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1

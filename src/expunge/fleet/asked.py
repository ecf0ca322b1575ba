"""Ask many models something, each as soon as it is trained, and keep the answers, not the models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import Tensor, nn

from expunge.core.errors import NeedsError
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.fleet.executors import Executor, Together, chosen
from expunge.fleet.jobs import Done, Job, described

if TYPE_CHECKING:
    from expunge.store import Store

Answer = dict[str, Tensor]


def ask_many(
    problem: Problem,
    jobs: Sequence[Job],
    ask: Callable[[int, nn.Module], Answer],
    runtime: Runtime,
    *,
    kind: str,
    task: str,
    keys: Sequence[str] = (),
    store: Store | None = None,
    executor: str | Executor | None = None,
) -> list[Answer]:
    """Train models and return what each says, taking from the store what is known already.

    Args:
        problem: must have a recipe.
        jobs: what to train; those with equally many samples are trained together where that is quicker.
        ask: gives the answer of the model of one job, by its place.
        runtime: device, progress and engine; what trainings read is counted.
        kind: of the answers' runs in the store.
        task: name in progress.
        keys: of the answers, one a job: the training and the question; needed with a store.
        store: where an answer is looked up, and kept as soon as it is given. Without one a call that
            is killed begins anew.
        executor: the engine, in place of the runtime's.

    Returns:
        The answers in the order of the jobs.

    Raises:
        NeedsError: the problem has no recipe.
    """
    needs_recipe(problem)
    answers: dict[int, Answer] = {}
    if store is not None:
        found = {k: store.find(kind, key) for k, key in enumerate(keys)}
        answers = {k: store.tensors(run) for k, run in found.items() if run is not None}
    missing = [k for k in range(len(jobs)) if k not in answers]
    missing.sort(key=lambda k: len(jobs[k].keep))  # those of one size stand together
    with runtime.task(task, len(jobs)) as progress:
        progress.advance(len(answers))
        for done in trained(problem, [jobs[k] for k in missing], runtime, executor):
            k = missing[done.index]
            answers[k] = ask(k, done.model)
            if store is not None:
                record = {"problem": problem.name, **described(jobs[k]), "seed": jobs[k].seed}
                record["cost"] = asdict(done.cost)
                store.put_run(kind=kind, key=keys[k], record=record, tensors=answers[k])
            progress.advance()
    return [answers[k] for k in range(len(jobs))]


def trained(
    problem: Problem,
    jobs: Sequence[Job],
    runtime: Runtime,
    executor: str | Executor | None = None,
) -> Iterator[Done]:
    """Train jobs without a store, as they are ready, and count what they read."""
    for done in chosen(executor, runtime, Together(where_quicker=True)).run(problem, jobs, runtime):
        runtime.cost.samples += done.cost.samples
        runtime.cost.gradients += done.cost.gradients
        yield done


def needs_recipe(problem: Problem) -> None:
    """Refuse a problem of which no more models can be trained.

    Raises:
        NeedsError: it has no recipe.
    """
    if problem.recipe is None:
        raise NeedsError("more models need to know how the model was trained; pass recipe=")

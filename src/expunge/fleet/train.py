"""Train a fleet: many models of one recipe, each kept in the store as soon as it is ready."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from torch import nn

from expunge.core.errors import StoreError
from expunge.core.hashing import content_key, hash_model
from expunge.core.method import package_versions
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.fleet.executors import Executor, chosen, recipe_for
from expunge.fleet.jobs import Done, Job, described, fleet_keys, kept_masks, rows
from expunge.fleet.worker import with_weights
from expunge.store import Run, Store


@dataclass(frozen=True)
class Member:
    """A model of a fleet.

    Attributes:
        job: what it was trained on.
        model: the model, in eval mode.
        run: its run in the store.
        cost: what its training took.
        reused: whether an earlier call had trained it.
    """

    job: Job
    model: nn.Module
    run: str
    cost: Cost
    reused: bool


class Fleet(Sequence[nn.Module]):
    """Trained models in the order of their jobs; each is read from the store when it is asked for."""

    def __init__(
        self,
        problem: Problem,
        jobs: Sequence[Job],
        store: Store,
        runs: Sequence[str],
        reused: Sequence[bool],
        run: str,
    ) -> None:
        """Keep what is needed to read them.

        Args:
            problem: whose recipe they are of.
            jobs: what each was trained on.
            store: where they are.
            runs: their runs.
            reused: which of them earlier calls had trained.
            run: the fleet's own run, with the list of its jobs.
        """
        self.problem, self.jobs, self.store, self.run = problem, tuple(jobs), store, run
        self.runs, self.reused = tuple(runs), tuple(reused)

    def __len__(self) -> int:
        """Return the number of models."""
        return len(self.jobs)

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> list[nn.Module]: ...

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        """Read one model, or some."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return with_weights(self.problem, self.store.tensors(self.runs[index]))

    @property
    def costs(self) -> list[Cost]:
        """What each training took."""
        return [Cost.read(self.store.get(run).record["cost"]) for run in self.runs]


def train_fleet(
    problem: Problem,
    jobs: Sequence[Job],
    store: Store | None = None,
    runtime: Runtime | None = None,
    executor: str | Executor | None = None,
    *,
    name: str = "fleet",
) -> Fleet:
    """Train what the store lacks of a fleet, and return all of it.

    The list of jobs is kept first, as a run of kind `fleet`; each model as soon as it is ready, as a
    run whose kind is its role. A call that is killed and made again trains what is missing.

    Args:
        problem: must have a recipe.
        jobs: what to train.
        store: where models are looked up and kept; a temporary one by default.
        runtime: device, progress and engine.
        executor: the engine, in place of the runtime's: a name or an object; the plain loop by default.
        name: of the fleet, in the store and in progress.

    Returns:
        The models.

    Raises:
        NeedsError: the problem has no recipe, or the engine's package is missing.
        SettingError: there is no such engine.
        ExpungeError: a training failed; those before it are kept.
    """
    runtime = runtime or Runtime()
    store = store or Store.temporary()
    engine = chosen(executor, runtime)
    recipe_for(problem)
    keys = fleet_keys(problem, jobs, runtime.device)
    run = _put_plan(problem, jobs, keys, store, name) if jobs else ""
    before = [store.find(job.role, key) for job, key in zip(jobs, keys, strict=True)]
    with runtime.task(name, len(jobs)) as task:
        task.advance(sum(found is not None for found in before))
        for _ in _missing(problem, jobs, keys, store, runtime, engine):
            task.advance()
    runs = []
    for job, key in zip(jobs, keys, strict=True):
        found = store.find(job.role, key)
        assert found is not None
        runs.append(found.id)
    return Fleet(problem, jobs, store, runs, [found is not None for found in before], run)


def members(
    problem: Problem,
    jobs: Sequence[Job],
    store: Store,
    runtime: Runtime,
    executor: str | Executor | None = None,
) -> Iterator[Member]:
    """Yield the models of jobs in their order, one at a time, training what the store lacks.

    Args:
        problem: must have a recipe.
        jobs: what to train.
        store: where models are looked up and kept.
        runtime: device, progress and engine.
        executor: the engine, in place of the runtime's; the plain loop by default.

    Raises:
        NeedsError: the problem has no recipe, or the engine's package is missing.
    """
    recipe_for(problem)
    keys = fleet_keys(problem, jobs, runtime.device)
    missing = _missing(problem, jobs, keys, store, runtime, chosen(executor, runtime))
    new: dict[tuple[str, str], tuple[str, Cost]] = {}
    with contextlib.closing(missing):
        for job, key in zip(jobs, keys, strict=True):
            wanted = (job.role, key)
            model: nn.Module | None = None
            found = None if wanted in new else store.find(*wanted)
            if found is None and wanted not in new:
                for done, made, run in missing:
                    at = (made.role, keys[done.index])
                    new[at] = run, done.cost
                    if at == wanted:
                        model = done.model
                        break
            if found is None and wanted not in new:  # another process was quicker
                found = store.find(*wanted)
                assert found is not None
            if found is not None:
                new[wanted] = found.id, Cost.read(found.record["cost"])
            run, cost = new[wanted]
            if model is None:  # from an earlier call, or ready before its turn
                model = with_weights(problem, store.tensors(run))
            yield Member(job, model, run, cost, found is not None)


def progress(store: Store, run: Run | str) -> list[dict[str, Any]]:
    """The jobs of a fleet that was begun, each with the run that is done, or None.

    Args:
        store: where the fleet is.
        run: the fleet's own run, or its id.

    Returns:
        One row a job: `key`, `role`, `samples`, `kept`, `seed` and `run`.

    Raises:
        StoreError: that run is no fleet.
    """
    run = store.get(run) if isinstance(run, str) else run
    if run.kind != "fleet":
        raise StoreError(f"run {run.id} is of kind {run.kind}, not a fleet")
    shown = []
    for row in run.record["jobs"]:
        found = store.find(row["role"], row["key"])
        shown.append({**row, "run": None if found is None else found.id})
    return shown


def _put_plan(
    problem: Problem, jobs: Sequence[Job], keys: Sequence[str], store: Store, name: str
) -> str:
    """Keep the list of jobs, with who is in each training, before any of them."""
    record = {**_shared(problem), "name": name, "jobs": rows(jobs, keys)}
    tensors = {"ids": problem.train.ids.clone(), "kept": kept_masks(problem, jobs)}
    # which model was begun with is of no account to a recipe
    key = content_key(["fleet", name, *zip([job.role for job in jobs], keys, strict=True)])
    return store.put_run(kind="fleet", key=key, record=record, tensors=tensors)


def _missing(
    problem: Problem,
    jobs: Sequence[Job],
    keys: Sequence[str],
    store: Store,
    runtime: Runtime,
    engine: Executor,
) -> Generator[tuple[Done, Job, str]]:
    """Train what the store lacks, each once; yield it with its run when it is in the store."""
    places: dict[tuple[str, str], int] = {}
    for place, (job, key) in enumerate(zip(jobs, keys, strict=True)):
        if (job.role, key) not in places and store.find(job.role, key) is None:
            places[job.role, key] = place
    lacking = list(places.values())
    if not lacking:
        return
    shared = _shared(problem)
    for done in engine.run(problem, [jobs[place] for place in lacking], runtime):
        place = lacking[done.index]
        job = jobs[place]
        record = {
            **shared,
            **({} if job.request is None else {"request": job.request.to_dict()}),
            **described(job),
            "engine": engine.name,
            "runtime": runtime.describe() | {"seed": job.seed},
            "weights": hash_model(done.model),
            "cost": asdict(done.cost),
        }
        run = store.put_run(
            kind=job.role, key=keys[place], record=record, tensors=done.model.state_dict()
        )
        yield Done(place, done.model, done.cost), job, run


def _shared(problem: Problem) -> dict[str, Any]:
    """What the records of a fleet's models have in common."""
    settings = getattr(problem.recipe, "settings", dict)
    return {
        "problem": problem.name,
        "source": problem.source,
        "fingerprint": problem.fingerprint(),
        "recipe": settings(),
        "packages": package_versions(),
    }

"""Reproduce: run a record again and compare the weights, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from expunge.core.errors import StoreError
from expunge.core.hashing import hash_model
from expunge.core.method import package_versions, unlearn
from expunge.core.problem import Problem, Recipe, run_recipe
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.methods import registry as methods
from expunge.store import Run, Store
from expunge.suite.bench import Bench
from expunge.train.prune import Pruning, prune


@dataclass(frozen=True)
class Reproduction:
    """What running a record again gave.

    Attributes:
        run: the run that was repeated.
        identical: whether the weights are equal in every bit.
        recorded: hash of the recorded weights.
        repeated: hash of the weights found now.
        differences: what differs between the environment then and now.
    """

    run: str
    identical: bool
    recorded: str
    repeated: str
    differences: list[str]


def problem_of(record: Mapping[str, Any], bench: Bench, recipe: Recipe | None = None) -> Problem:
    """Build the problem of a record again.

    Args:
        record: of the run.
        bench: finds what is stored.
        recipe: how the model was trained, where the record's problem does not know it.

    Raises:
        StoreError: the record does not say how, or the data or weights have changed since.
    """
    problem = _made(record.get("source") or {}, bench, recipe)
    now, then = problem.fingerprint(), record["fingerprint"]
    changed = [name for name in then if then[name] != now.get(name)]
    if changed:
        raise StoreError(f"the {' and '.join(changed)} of this run changed since it was recorded")
    return problem


def reproduce(
    run: Run, store: Store, runtime: Runtime, recipe: Recipe | None = None
) -> Reproduction:
    """Run a record again from its settings in force, its seed and its threads.

    Args:
        run: an original, a reference or an unlearning.
        store: only read, except for an original that has to be trained again.
        runtime: device and progress; seed, threads, precision and chunk are the record's.
        recipe: how the model was trained, where the record's problem does not know it.

    Returns:
        Whether the weights came out the same.

    Raises:
        StoreError: the run holds no weights, or its problem cannot be rebuilt.
    """
    record = run.record
    if run.kind not in ("original", "reference", "unlearn"):
        raise StoreError(
            f"run {run.id} is of kind {run.kind}; only runs that make weights can be repeated"
        )
    was = record["runtime"]
    here = replace(
        runtime,
        chunk=was.get("chunk"),
        **{name: was[name] for name in ("seed", "threads", "precision")},
    )
    bench = Bench(store, here)
    problem = problem_of(record, bench, recipe)
    if run.kind == "unlearn":
        method = methods.get(_method_path(record)).create(record["method"]["in_force"])
        outcome = unlearn(problem, Request.from_dict(record["request"]), method, runtime=here)
        repeated = str(outcome.record["weights"])
    else:
        if problem.recipe is None:
            raise StoreError(f"run {run.id} cannot be repeated: its problem has no recipe any more")
        keep = problem.train.ids
        if run.kind == "reference":
            keep = problem.train.without(
                Request.from_dict(record["request"]).resolve(problem.train)
            )
        again = prune_again(problem, bench, recipe) if run.kind == "original" else None
        repeated = hash_model(again or run_recipe(problem.recipe, keep, was["seed"], here))
    then, now = record["packages"], package_versions()
    differences = [
        f"{name} {then.get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    recorded = str(record["weights"])
    return Reproduction(run.id, repeated == recorded, recorded, repeated, differences)


def _method_path(record: Mapping[str, Any]) -> str:
    name = str(record["method"]["name"])
    return name if name in set(methods) else str(record["method"]["class"])


def prune_again(problem: Problem, bench: Bench, recipe: Recipe | None) -> nn.Module | None:
    """Prune anew what a pruned problem was made from; None if it is dense."""
    source = problem.source
    if source.get("kind") != "pruned":
        return None
    dense = _made(source["of"], bench, recipe)
    runtime = replace(bench.runtime, seed=int(source["prune_seed"]))
    return prune(dense, Pruning.create(source["pruning"]), runtime=runtime).model


def _made(source: Mapping[str, Any], bench: Bench, recipe: Recipe | None) -> Problem:
    maker = SOURCES.get(str(source.get("kind")))
    if maker is None:
        raise StoreError(
            "this run's problem was made in Python and cannot be rebuilt from its record"
        )
    return maker(source, bench, recipe)


def _from_workload(source: Mapping[str, Any], bench: Bench, recipe: Recipe | None) -> Problem:
    problem = bench.workload(str(source["workload"]), int(source["seed"]))
    problem.recipe = recipe or problem.recipe
    return problem


def _from_pruned(source: Mapping[str, Any], bench: Bench, recipe: Recipe | None) -> Problem:
    dense = _made(source["of"], bench, recipe)
    return bench.pruned(dense, Pruning.create(source["pruning"]), int(source["prune_seed"]))


def _from_disk(source: Mapping[str, Any], bench: Bench, recipe: Recipe | None) -> Problem:
    from expunge.problems.data_on_disk import problem_from_disk

    problem = problem_from_disk(str(source["model"]), str(source["data"]), test=source.get("test"))
    problem.recipe = recipe or problem.recipe
    return problem


def _from_records(source: Mapping[str, Any], bench: Bench, recipe: Recipe | None) -> Problem:
    from expunge.problems.records_on_disk import lm_from_disk

    given = {name: value for name, value in source.items() if name not in ("kind", "model")}
    return lm_from_disk(str(source["model"]), recipe=recipe, **given)


SOURCES: dict[str, Callable[[Mapping[str, Any], Bench, Recipe | None], Problem]] = {
    "pruned": _from_pruned,
    "workload": _from_workload,
    "disk": _from_disk,
    "causal-lm": _from_records,
}
"""How to build a problem again, by the kind of its source."""

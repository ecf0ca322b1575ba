"""Bench: the content-keyed steps every comparison is made of.

Original, references, unlearning, audit: each looks its key up in the store first and works only
if it is not there. Keys hold the hashes of weights and data, so nothing stale is ever reused.
"""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

from torch import Tensor

from expunge import __version__
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import NeedsError, SettingError, StoreError
from expunge.core.hashing import content_key, hash_model, hash_tensors
from expunge.core.method import (
    Method,
    Prepared,
    package_versions,
    prepare,
    prepared_key,
    unlearn,
)
from expunge.core.outcome import CHANGES, Cost, Outcome
from expunge.core.problem import Problem, Recipe
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.strata import Strata
from expunge.fleet.difficulty import Score, difficulty, plan
from expunge.fleet.references import FIRST_SEED, Reference, reference_key, references
from expunge.store import Run, Store
from expunge.train.prune import PrunedRecipe, Pruning, prune, recipe_of, with_mask
from expunge.workloads import registry as workloads

_MASK = "pruning mask of "
"""Before the names of the masks that are kept beside a pruned original's weights."""

STRATA = ("el2n", "grand", "forgetting")
"""Scores that `strata=` takes by name."""

STRATA_RUNS = 10
"""Trainings behind such a score."""

OnJob = Callable[[str, str, bool, str], None]


class Bench:
    """A store and a runtime, and the steps that read and fill the store."""

    def __init__(self, store: Store, runtime: Runtime, on_job: OnJob | None = None) -> None:
        """Keep where results go and how work is done.

        Args:
            store: where finished work is looked up and kept.
            runtime: device, threads, progress; each step sets its own seed.
            on_job: called after each step with label, key, whether it was reused, and run id.
        """
        self.store = store
        self.runtime = runtime
        self._on_job = on_job or (lambda label, key, reused, run: None)
        self._originals: dict[str, str] = {}

    def workload(self, name: str, seed: int = 0) -> Problem:
        """Build a bundled problem; its original is trained once and kept."""
        workload = workloads.get(name)
        splits = workload.data()
        recipe = workload.recipe(splits.train)
        if self.runtime.threads is None:  # what trains best there suits its methods too
            self.runtime = replace(self.runtime, threads=recipe.threads)
        key = content_key(["original", __version__, recipe.key(), seed])
        found = self.store.find("original", key)
        if found is not None:
            problem = workload.problem(seed, weights=self.store.tensors(found))
            self._originals[problem.model_hash()] = found.id
            self._on_job(f"{name}: original", key, True, found.id)
            return problem
        runtime = replace(self.runtime, seed=seed)
        with runtime.metered() as cost:
            problem = workload.problem(seed, runtime=replace(runtime, checkpoint=None))
        cost.samples = cost.gradients = recipe.epochs * len(splits.train)
        run = self._put_original(problem, key, recipe.settings(), cost, runtime)
        self._on_job(f"{name}: original", key, False, run)
        return problem

    def pruned(self, problem: Problem, how: str | Pruning, seed: int | None = None) -> Problem:
        """Prune a problem, or take the stored result of the same pruning.

        Args:
            problem: a dense problem with a recipe.
            how: see `expunge.train.prune.prune`.
            seed: of the training; the original's where the problem knows it, else 0.

        Returns:
            The pruned problem; its original is the pruned model.
        """
        pruning = Pruning.parse(how) if isinstance(how, str) else how
        if seed is None:
            seed = int(problem.source.get("seed", 0))
        settings = pruning.in_force()
        key = content_key(
            ["pruned", __version__, recipe_of(problem).key(), problem.train.fingerprint(), settings, seed, self.runtime.device]
        )  # fmt: skip
        found = self.store.find("original", key)
        label = f"{problem.name}: {pruning}"
        if found is not None:
            tensors = self.store.tensors(found)
            masks = {n.removeprefix(_MASK): t for n, t in tensors.items() if n.startswith(_MASK)}
            model = copy.deepcopy(problem.model)
            model.load_state_dict({n: t for n, t in tensors.items() if not n.startswith(_MASK)})
            sparse = with_mask(problem, pruning, model, masks, seed)
            self._originals[sparse.model_hash()] = found.id
            self._on_job(label, key, True, found.id)
            return sparse
        runtime = replace(self.runtime, seed=seed, checkpoint=None)
        with runtime.metered() as cost:
            sparse = prune(problem, pruning, runtime=runtime)
        assert sparse.kept is not None
        masks = {_MASK + n: m for n, m in sparse.kept.items()}
        run = self._put_original(sparse, key, settings, cost, runtime, masks)
        self._on_job(label, key, False, run)
        return sparse

    def original(self, problem: Problem) -> str:
        """Return the run id of a problem's original model, recording it if it is new."""
        if problem.model_hash() not in self._originals:
            key = content_key(["given", problem.fingerprint()])
            self._put_original(problem, key, {}, Cost(), self.runtime)
        return self._originals[problem.model_hash()]

    def _put_original(
        self,
        problem: Problem,
        key: str,
        recipe: Mapping[str, Any],
        cost: Cost,
        runtime: Runtime,
        masks: Mapping[str, Tensor] | None = None,
    ) -> str:
        record = {
            "problem": problem.name,
            "source": problem.source,
            "fingerprint": problem.fingerprint(),
            "recipe": dict(recipe),
            "runtime": runtime.describe(),
            "packages": package_versions(),
            "weights": problem.model_hash(),
            "cost": asdict(cost),
        }
        # A model that was given, not trained here, stays where its owner keeps it.
        tensors = {**problem.model.state_dict(), **(masks or {})} if recipe else None
        run = self.store.put_run(kind="original", key=key, record=record, tensors=tensors)
        self._originals[problem.model_hash()] = run
        return run

    def references(self, problem: Problem, request: Request, count: int) -> Iterator[Reference]:
        """Yield `count` retrained references one by one; none if the problem has no recipe."""
        if problem.recipe is None:
            return
        seeds = range(FIRST_SEED, FIRST_SEED + count)
        for made in references(problem, request, seeds, self.store, self.runtime):
            key = reference_key(problem, request, made.seed, self.runtime.device)
            self._on_job(f"{problem.name}: reference {made.seed}", key, made.reused, made.run)
            yield made

    def unlearn(
        self,
        problem: Problem,
        request: Request,
        method: Method,
        seed: int,
        passed: Mapping[str, Any] | None = None,
        look: Callable[[Outcome], Mapping[str, Any]] | None = None,
    ) -> tuple[Outcome, str]:
        """Unlearn, or take the stored result of the same work; an interrupted run goes on.

        Args:
            problem: the model and its data.
            request: what to forget.
            method: how.
            seed: of the run.
            passed: settings the caller wrote, for the record.
            look: gives further details of a new outcome for its record.

        Returns:
            The outcome and the id of its run.
        """
        key = unlearn_key(problem, request, method, replace(self.runtime, seed=seed))
        found = self.store.find("unlearn", key)
        label = f"{problem.name}: {method.name} (seed {seed})"
        if found is not None:
            self._on_job(label, key, True, found.id)
            return self.stored_outcome(found, problem, request), found.id
        checkpoint = self.store.folder / "checkpoints" / key
        runtime = replace(self.runtime, seed=seed, checkpoint=checkpoint, cost=Cost())
        ready = self.prepared(problem, method)
        outcome = unlearn(problem, request, method, runtime=runtime, passed=passed, prepared=ready)
        if look is not None:
            outcome.details |= look(outcome)
        run = self.put_outcome(outcome, key)
        shutil.rmtree(checkpoint, ignore_errors=True)
        self._on_job(label, key, False, run)
        return outcome, run

    def prepared(self, problem: Problem, method: Method) -> Prepared | None:
        """What a method must prepare, from the store if it did so before; None if nothing."""
        if method.prepares != "always":
            return None
        runtime = replace(self.runtime, cost=Cost())
        key = prepared_key(problem, method, runtime)
        found = self.store.find("prepare", key)
        label = f"{problem.name}: {method.name} prepares"
        if found is not None:
            self._on_job(label, key, True, found.id)
            return Prepared(self.store.tensors(found), key, Cost(**found.record["cost"]))
        made = prepare(problem, method, runtime=runtime)
        record = {
            "problem": problem.name,
            "method": {"name": method.name, "in_force": method.preparation_settings()},
            "cost": asdict(made.cost),
        }
        run = self.store.put_run(
            kind="prepare", key=key, record=record, tensors=made.tensors,
            parents=[self.original(problem)],
        )  # fmt: skip
        self._on_job(label, key, False, run)
        return made

    def put_outcome(self, outcome: Outcome, key: str) -> str:
        """Keep an outcome's record and change; return its run id."""
        assert outcome.change is not None
        record = {
            **outcome.record,
            "change": {"kind": outcome.change.kind, "hash": outcome.change.hash()},
            "cost": asdict(outcome.cost),
            "curve": outcome.curve,
            "details": outcome.details,
        }
        assert outcome.problem is not None
        return self.store.put_run(
            kind="unlearn",
            key=key,
            record=record,
            tensors=dict(outcome.change.tensors),
            parents=[self.original(outcome.problem)],
        )

    def stored_outcome(self, run: Run, problem: Problem, request: Request) -> Outcome:
        """Rebuild an outcome from the store: the stored change on the original.

        Raises:
            StoreError: the change does not lead to the recorded weights.
        """
        record = run.record
        change = CHANGES[record["change"]["kind"]](self.store.tensors(run))
        model = change.apply(copy.deepcopy(problem.model)).eval()
        if hash_model(model) != record["weights"]:
            raise StoreError(f"run {run.id}: the stored change does not give the recorded weights")
        return Outcome(
            model, change, record["curve"], Cost(**record["cost"]), record["details"], record, problem, request
        )  # fmt: skip

    def strata(self, problem: Problem, given: Any) -> Strata | None:
        """Parts of the training samples to break findings down by.

        Args:
            problem: its recipe is what a score is measured with. A pruned problem takes the scores
                of the dense trainings: the same parts at every rate, so that rates can be compared.
            given: the name of a score (see `STRATA`), which is computed once and kept; what
                `Strata.of` takes; or None.

        Returns:
            The parts; None for None.

        Raises:
            NeedsError: there is no recipe to measure a score with, or no labels.
            UserError: it is none of these.
        """
        if not isinstance(given, str):
            return None if given is None else Strata.of(given)
        score, recipe = check_strata(given), problem.recipe
        if recipe is None:
            raise NeedsError(
                f"strata by {score} are measured in short trainings of the recipe, and this problem "
                "has none; pass recipe= (--recipe on the command line)"
            )
        if isinstance(recipe, PrunedRecipe):
            problem = copy.copy(problem)
            problem.recipe = cast(Recipe, recipe.recipe)
        runtime = replace(self.runtime, seed=0, checkpoint=None, cost=Cost())
        _, key = plan(problem, score, STRATA_RUNS, None, runtime)
        reused = self.store.find("difficulty", key) is not None
        found = difficulty(problem, score, runs=STRATA_RUNS, store=self.store, runtime=runtime)
        kept = self.store.find("difficulty", key)
        assert kept is not None
        self._on_job(f"{problem.name}: {score}", key, reused, kept.id)
        return found.strata()

    def audit(
        self,
        subject: Subject,
        run: str,
        references: Sequence[tuple[Reference, Subject]],
        audits: str | Sequence[str | Audit],
        strata: Strata | None = None,
    ) -> list[Finding]:
        """Audit a subject against references, or take the stored findings of the same audit."""
        from expunge.audits.run import audit_list, run_audits  # scikit-learn is slow to import

        chosen = audit_list(audits, subject.problem)
        key = content_key([
            "audit",
            __version__,
            hash_model(subject.model),
            subject.problem.fingerprint(),
            hash_tensors(subject.splits),
            [[a.name, a.in_force(), *a.reads()] for a in chosen],
            None if subject.problem.recipe is None else subject.problem.recipe_key(),
            [hash_model(s.model) for _, s in references],
            # a cost is a fact of the run, not of the weights
            run,
            *([] if strata is None else [strata.key()]),
            *(
                ["siblings", *(hash_model(s.model) for s in subject.siblings)]
                if subject.siblings
                else []
            ),
        ])
        found = self.store.find("audit", key)
        label = f"{subject.problem.name}: audit of {run[-6:]}"
        if found is not None:
            self._on_job(label, key, True, found.id)
            return self.store.findings(found.id)
        runtime = replace(self.runtime, seed=0)
        subject.store = self.store
        findings = run_audits(subject, [s for _, s in references], chosen, runtime, strata)
        stored = self.store.put_findings(
            run, findings, key=key, parents=[r.run for r, _ in references]
        )
        self._on_job(label, key, False, stored)
        return findings


def check_strata(name: str, workload: str | None = None) -> Score:
    """Return a score's name that `strata=` takes.

    Args:
        name: the word that was given.
        workload: the bundled problem it is meant for, if any, so that nothing is trained in vain.

    Raises:
        NeedsError: the score needs logits, which that problem lacks.
        SettingError: it is another word.
    """
    if name not in STRATA:
        raise SettingError(f"strata={name!r} is not a choice; use {'|'.join(STRATA)}")
    if workload is not None and name != "grand":
        kind = workloads.get(workload).of
        kind = kind.func if isinstance(kind, functools.partial) else kind
        if isinstance(kind, type) and not hasattr(kind, "logits"):
            raise NeedsError(f"strata by {name} need logits, which {workload} lacks; use grand")
    return cast(Score, name)


def unlearn_key(problem: Problem, request: Request, method: Method, runtime: Runtime) -> str:
    """Content key of one unlearning: weights, data, forgotten ids, settings in force, runtime."""
    return content_key([
        "unlearn",
        __version__,
        problem.fingerprint(),
        hash_tensors({"ids": request.resolve(problem.train)}),
        request.key,  # the same samples by label and by id are audited differently
        [method.name, f"{type(method).__module__}.{type(method).__qualname__}", method.in_force()],
        problem.recipe_key() if method.needs.recipe else None,
        runtime.describe(),
    ])

r"""Tune: choose a method's settings on a *tuning* forget set, under a stated budget.

Each trial unlearns the tuning request and is audited against models retrained without it. What is
made small is the mean distance to them: \(|v - v_{ref}|\) of accuracies and of one membership AUC,
and of a regressor's errors as a share of \(v_{ref}\). The request that will be reported is named
too, and must have no sample in common with those tuned on. Unseen samples are those of the problem's
validation data; without any, those of its test data, and the result says so.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expunge import __version__
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import ExpungeError, NeedsError, SettingError, UserError
from expunge.core.hashing import content_key, plain
from expunge.core.method import Method, package_versions, unlearn
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.request import Request, forget
from expunge.core.runtime import Runtime
from expunge.fleet.forget_sets import forget_set
from expunge.store import Store
from expunge.suite.bench import Bench
from expunge.suite.compare import MethodSpec, make_method
from expunge.suite.search import Budget as Budget
from expunge.suite.search import Trial, import_optuna, search
from expunge.suite.space import Space, space_of


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        method: its name.
        settings: the best ones: those tried, and whatever else differs from the defaults.
        value: their mean distance to retrained models on the tuning requests.
        tuning: the requests tuned on.
        reported: the request kept apart.
        budget: what was allowed.
        space: what was searched, by setting.
        trials: all of them, in order; the first is the method as it came.
        unseen: where samples that were in no training came from: `validation` or `test` data.
        run: id of the record in the store.
    """

    method: str
    settings: dict[str, Any]
    value: float
    tuning: tuple[Request, ...]
    reported: Request
    budget: Budget
    space: dict[str, Any]
    trials: tuple[Trial, ...]
    unseen: str = "test"
    run: str = ""

    @property
    def spec(self) -> dict[str, Any]:
        """The method as `xp.compare` and a suite's `methods` take it."""
        return {"name": self.method, **self.settings}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON types."""
        return plain({
            "run": self.run,
            "method": self.spec,
            "value": self.value,
            "began_with": self.trials[0].value,
            "tuning": [r.to_dict() for r in self.tuning],
            "reported": self.reported.to_dict(),
            "unseen": self.unseen,
            "budget": self.budget,
            "space": self.space,
            "trials": self.trials,
        })

    def toml(self) -> str:
        """The method as a line of a suite file, with where it comes from."""
        on = "; ".join(map(str, self.tuning))
        parts = [f"{k} = {json.dumps(v)}" for k, v in self.spec.items() if v is not None]
        first = self.trials[0].value
        began = "" if first is None else f" instead of {first:.4g}"
        return (
            f"# tuned on {on}, apart from {self.reported}: {len(self.trials)} trials, "
            f"distance {self.value:.4g}{began}; unseen samples: {self.unseen} data\nmethods = [{{ {', '.join(parts)} }}]\n"
        )


def tune(
    problem: Problem,
    method: MethodSpec,
    tuning: Request | Sequence[Request],
    *,
    reported: Request,
    trials: int | None = None,
    seconds: float | None = None,
    space: Space | None = None,
    references: int = 2,
    seeds: Sequence[int] = (0,),
    audits: Sequence[str | Audit] | None = None,
    store: Store | None = None,
    runtime: Runtime | None = None,
    bench: Bench | None = None,
) -> Tuning:
    """Search a method's settings for those that come closest to retraining.

    Stopped, it goes on where it was when it is called again with the same store; a larger budget
    goes on from a smaller one, and the trials are those of one long search.

    Args:
        problem: the model, its data and recipe.
        method: as in `compare`; its settings are tried first, and stay where nothing is searched.
        tuning: one request or several to tune on; the distance is their mean.
        reported: the request that the tuned method will be shown on.
        trials: see `Budget`.
        seconds: see `Budget`.
        space: settings to search instead of, or beside, those of `space_of`.
        references: retrained models for each tuning request.
        seeds: runs of each trial.
        audits: what the distance is made of; accuracy and membership, or their likes for
            regressors, by default.
        store: where trials and the result are kept; a temporary one by default.
        runtime: device, threads, progress; its seed is the search's.
        bench: used instead of `store` and `runtime` by callers that have one.

    Returns:
        The best settings and every trial.

    Raises:
        UserError: a sample to tune on is also in the reported request, or something is missing.
        ExpungeError: no trial gave a result.
    """
    from expunge.audits.run import audit_list, run_audits  # scikit-learn is slow to import

    bench = bench or Bench(store or Store.temporary(), runtime or Runtime())
    requests = (tuning,) if isinstance(tuning, Request) else tuple(tuning)
    budget = Budget(trials, seconds)
    import_optuna()  # before any work
    base, _ = make_method(method, problem)
    problem.check()
    for one_request in (*requests, reported):
        base.check(problem, one_request)
    if problem.recipe is None or references < 1:
        raise NeedsError("tune measures the distance to retrained models; pass recipe=")
    if not requests or not seeds:
        raise UserError("name at least one request to tune on, and one seed")
    keep_apart(problem, requests, reported)
    searched = space_of(base, space)
    measured = list(audits) if audits is not None else _audits(problem)
    for one in audit_list(measured):
        one.needs.check(one.name, problem)
    judged, unseen = on_validation(problem), "test" if problem.valid is None else "validation"
    if problem.valid is None and problem.test is not None:
        bench.runtime.reporter.say(
            "tuning looks at the test data that results are reported on; pass valid= to keep it apart"
        )
    key = content_key([
        "tune", __version__, problem.fingerprint(), problem.recipe_key(),
        base.name, base.in_force(), [r.key for r in requests], searched, references, list(seeds),
        [a if isinstance(a, str) else [a.name, a.in_force()] for a in measured],
        bench.runtime.describe(), *([] if judged is problem else [unseen]),
    ])  # fmt: skip
    subjects = [
        [Subject(r.model, judged, request, bench.runtime) for r in bench.references(problem, request, references)]
        for request in requests
    ]  # fmt: skip

    def attempt(settings: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
        made = type(base).create({**base.in_force(), **settings})
        ready = bench.prepared(problem, made)
        parts = []
        for (request, theirs), seed in ((p, s) for p in zip(requests, subjects, strict=True) for s in seeds):  # fmt: skip
            inner = replace(bench.runtime, seed=seed, checkpoint=None, cost=Cost())
            outcome = unlearn(problem, request, made, runtime=inner, prepared=ready)
            released = Subject(outcome.released(), judged, request, bench.runtime)
            parts.append(
                terms(run_audits(released, theirs, measured, replace(bench.runtime, seed=0)))
            )
        every = {n: sum(p[n] for p in parts if n in p) / sum(n in p for p in parts) for p in parts for n in p}  # fmt: skip
        return sum(sum(p.values()) / len(p) for p in parts) / len(parts), every

    done = search(base, searched, budget, bench, key, attempt)
    best = min((t for t in done if t.value is not None), key=lambda t: t.value or 0.0, default=None)
    if best is None:
        why = done[-1].reason if done else "the budget was spent before the first trial"
        raise ExpungeError(f"none of {len(done)} trials of {base.name} gave a result; {why}")
    found = Tuning(
        base.name, _shown(base, best.settings, problem), float(best.value or 0.0), requests,
        reported, budget, searched, tuple(done), unseen,
    )  # fmt: skip
    record = found.to_dict() | {"problem": problem.name, "packages": package_versions()}
    record |= {"method": {"name": base.name, "in_force": found.settings}}
    run = bench.store.put_run(
        kind="tune", key=content_key([key, reported.key, plain(budget), len(done)]), record=record,
        parents=[bench.original(problem)],
    )  # fmt: skip
    return replace(found, run=run)


def on_validation(problem: Problem) -> Problem:
    """The problem as trials are measured on it: validation data in place of test data, if there is some."""
    if problem.valid is None:
        return problem
    judged = copy.copy(problem)
    judged.test, judged._hashes = problem.valid, {}
    judged.beside_models = {}  # they hold outputs on the test data
    return judged


def keep_apart(problem: Problem, tuning: Sequence[Request], reported: Request) -> None:
    """Refuse to tune on what will be reported.

    Raises:
        UserError: a tuning request shares samples with the reported one.
    """
    kept = reported.resolve(problem.train)
    for request in tuning:
        shared = int(torch.isin(request.resolve(problem.train), kept).sum())
        if shared:
            raise UserError(
                f"{shared} samples of the tuning request ({request}) are also in the one to be "
                f"reported ({reported}); settings tuned on them would report the tuning"
            )


def apart(problem: Problem, reported: Request, fraction: float, seed: int = 0) -> Request:
    """Draw a random request of a share of all samples, none of them in the reported one.

    Raises:
        SettingError: so many samples are not left.
    """
    rest = problem.train.without(reported.resolve(problem.train))
    count = round(fraction * len(problem.train))
    if not 0 < count < len(rest):
        raise SettingError(f"{fraction:g} of {len(problem.train)} samples cannot be drawn apart from the reported ones")  # fmt: skip
    drawn = torch.randperm(len(rest), generator=Runtime(seed=seed).generator("tuning"))[:count]
    return forget(ids=rest[drawn].sort().values, reason=f"random, to tune on, seed {seed}")


def apart_by_difficulty(
    problem: Problem, reported: Request, name: str, fraction: float, bench: Bench
) -> Request:
    """Choose a share of all samples from one tail of what is hard to unlearn, none of them reported.

    Args:
        problem: the model, its data and recipe.
        reported: the request to keep apart from.
        name: see `fleet.forget_sets`.
        fraction: of all samples.
        bench: where searches and scores are kept; its seed is theirs.

    Raises:
        SettingError: so many samples are not left, or there is no such set.
    """
    rest = problem.train.without(reported.resolve(problem.train))
    count = round(fraction * len(problem.train))
    return forget_set(
        problem, name, count, among=rest, store=bench.store,
        runtime=replace(bench.runtime, checkpoint=None, cost=Cost()),
    )  # fmt: skip


def terms(findings: Sequence[Finding]) -> dict[str, float]:
    """Distances to the references by finding: what has no common scale as a share of theirs.

    Raises:
        ExpungeError: nothing was measured beside a reference.
    """
    found = {
        f.name: abs(f.gap) / (1.0 if f.name.startswith(_BOUNDED) else max(abs(f.reference), 1e-12))
        for f in findings
        if f.direction == "reference" and f.gap is not None and f.reference is not None
    }
    if not found:
        why = next((f.reason for f in findings if f.reason), "the audits give no such finding")
        raise ExpungeError(f"there is no distance to retrained models to tune by: {why}")
    return found


_BOUNDED = ("accuracy/", "membership/", "residual-membership/")


def _audits(problem: Problem) -> list[str | Audit]:
    from expunge import audits

    if problem.kind == "regression":
        return [audits.RegressionError(), audits.ResidualMembership()]
    return [audits.Accuracy(), audits.Membership(scores=("loss",), attackers=())]


def _shown(base: Method, tried: Mapping[str, Any], problem: Problem) -> dict[str, Any]:
    """Tried settings, those that differ from the defaults, and those that `compare` would fill in."""
    force = type(base).create({**base.in_force(), **tried}).in_force()
    plainly = {s["name"]: s["default"] for s in type(base).describe_settings()}
    named = {*tried, *problem.tuned.get(base.name, {})}
    return {n: v for n, v in force.items() if n in named or v != plainly[n]}


def check_ending(path: str | Path) -> str:
    """Return the ending of a file that a tuning can be written to.

    Raises:
        UserError: it is another one.
    """
    if Path(path).suffix not in (".toml", ".json"):
        raise UserError(f"a tuning is written to a .toml or .json file, not {Path(path).name!r}")
    return Path(path).suffix


def write_tuning(found: Tuning, path: str | Path) -> None:
    """Write the result: `.toml` for a suite file's `methods`, `.json` with every trial."""
    toml = check_ending(path) == ".toml"
    text = found.toml() if toml else json.dumps(found.to_dict(), indent=1) + "\n"
    Path(path).write_text(text)

"""Which methods can answer a request on a problem, what the others miss, and what the store has seen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expunge.core.errors import ExpungeError, UserError
from expunge.core.method import Method
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.methods import registry
from expunge.store import Run, Store

BEST = 3
"""Rows of evidence a method, at most."""


@dataclass(frozen=True)
class Evidence:
    """One audited run of a method on a problem of the same kind.

    Attributes:
        run: its id in the store.
        workload: name of its problem.
        request: what was forgotten, in words.
        alike: whether that was of the same form: a whole class (or range), or samples.
        distance: mean gap to retrained models over accuracies and membership; 0 is retraining.
        cost_ratio: seconds over those of retraining.
    """

    run: str
    workload: str
    request: str
    alike: bool
    distance: float
    cost_ratio: float | None


@dataclass(frozen=True)
class Suggestion:
    """What is known of one method for one problem and request.

    Attributes:
        method: its name.
        runs: whether it can run as things are.
        missing: what it misses and how to give it, or None.
        needs: what it reads, in words.
        settings: those that suit this problem where the defaults do not.
        idea: one sentence.
        intent: removal or suppression.
        guarantee: what its claim rests on.
        evidence: best runs first; those of a request of the same form before others.
    """

    method: str
    runs: bool
    missing: str | None
    needs: tuple[str, ...]
    settings: dict[str, Any]
    idea: str
    intent: str
    guarantee: str
    evidence: tuple[Evidence, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)


def suggest(
    problem: Problem,
    request: Request,
    *,
    methods: Sequence[str] | None = None,
    store: Store | None = None,
) -> list[Suggestion]:
    """List methods for a request: those with the best evidence first, those that cannot run last.

    Nothing is trained. A method that can run here may still find a reason not to on its way.

    Args:
        problem: the model and its data.
        request: what to forget.
        methods: names to look at; all by default.
        store: where audited runs are looked for; none is no evidence.

    Returns:
        One suggestion a method.

    Raises:
        UserError: the problem or the request cannot be used by any method, or a name is unknown.
    """
    problem.check()
    request.resolve(problem.train)
    seen = {} if store is None else evidence(store, problem.kind, request)
    found = [
        _suggestion(registry.get(name), problem, request, seen.get(name, []))
        for name in (registry if methods is None else methods)
    ]
    return sorted(found, key=_order)


def evidence(store: Store, kind: str, request: Request) -> dict[str, list[Evidence]]:
    """Runs of a store on problems of a kind that were audited beside references, by method.

    Args:
        store: the store.
        kind: of problem, e.g. `classification`.
        request: runs for a request of the same form come first.

    Returns:
        Evidence by method name, best first.
    """
    from expunge.report.leaderboard import distance
    from expunge.suite.stored import comparison_of

    audited = {a.parents[0] for a in store.runs(kind="audit") if len(a.parents) > 1}
    ids = [r.id for r in store.runs(kind="unlearn") if r.id in audited and _kind(r) == kind]
    if not ids:
        return {}
    found: dict[str, list[Evidence]] = defaultdict(list)
    for comparison in comparison_of(store, ids).data["comparisons"]:
        form = {k: v for k, v in comparison["request"].items() if k != "text"}
        asked = Request.from_dict(form)
        for row in comparison["rows"]:
            away = distance(row)
            if away is None:
                continue
            found[row["method"]].append(
                Evidence(
                    run=row["run"],
                    workload=comparison["workload"],
                    request=comparison["request"]["text"],
                    alike=asked.about_labels == request.about_labels,
                    distance=away,
                    cost_ratio=row["cost_ratio"],
                )
            )
    return {name: sorted(rows, key=_rank) for name, rows in found.items()}


def _suggestion(
    cls: type[Method], problem: Problem, request: Request, rows: list[Evidence]
) -> Suggestion:
    settings = dict(problem.tuned.get(cls.name, {}))
    method = cls.create(settings)
    missing = None
    if cls.domain not in ("general", problem.kind):
        missing = f"{cls.name} is for {cls.domain} problems, and this is one of {problem.kind}"
    else:
        try:
            method.check(problem, request)
        except UserError as error:
            missing = str(error)
        except ExpungeError as error:  # what a check computes may fail
            missing = f"{cls.name} cannot be checked here: {error}"
    return Suggestion(
        method=cls.name,
        runs=missing is None,
        missing=missing,
        needs=tuple(method.needs.words()),
        settings=settings,
        idea=cls.card.idea,
        intent=cls.card.intent,
        guarantee=cls.card.guarantee,
        evidence=tuple(rows[:BEST]),
    )


def _rank(row: Evidence) -> tuple[bool, float]:
    return not row.alike, row.distance


def _order(one: Suggestion) -> tuple[bool, bool, bool, float]:
    """Runnable first; then by the best evidence; names keep the order of the registry."""
    best = one.evidence[0] if one.evidence else None
    return (
        not one.runs,
        best is None,
        best is not None and not best.alike,
        best.distance if best else 0.0,
    )


def _kind(run: Run) -> str | None:
    kind = run.record.get("fingerprint", {}).get("kind")
    return None if kind is None else str(kind)

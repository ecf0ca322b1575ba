r"""Sequences of requests: one after the other, each on the model that the one before left behind.

After request t every earlier one is measured again: \(F_{t,i}\) of request i ≤ t, and \(U_t\) of what no
request covers. Earlier requests come back where \(F_{t,i}\) moves away from \(F_{i,i}\) again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import RequestError, UserError
from expunge.core.method import unlearn
from expunge.core.outcome import Cost, Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.fleet.executors import chosen, in_order
from expunge.fleet.jobs import Job
from expunge.fleet.references import FIRST_SEED
from expunge.suite.compare import MethodSpec, make_method
from expunge.train.adapters import has_adapters, merged

Measure = Callable[[Subject], float]


@dataclass
class RequestSequence:
    """What a sequence of T requests left behind.

    Attributes:
        requests: as they were carried out.
        outcomes: one a request; the last one's model has met all of them.
        cells: findings by (t, i), of request i ≤ t after request t, by name.
        rest: findings after each request, by name, with all of the requests' samples as the forget set: of
            them `…retain-train` is what no request covers.
    """

    requests: tuple[Request, ...]
    outcomes: list[Outcome] = field(default_factory=list)
    cells: dict[tuple[int, int], dict[str, Finding]] = field(default_factory=dict)
    rest: list[dict[str, Finding]] = field(default_factory=list)

    def matrix(self, name: str) -> list[list[float | None]]:
        """F: row t holds the values of a finding for requests 0 … t after request t.

        Raises:
            UserError: no audit or measure gave a finding of that name.
        """
        return [
            [self._value(self.cells[t, i], name) for i in range(t + 1)]
            for t in range(len(self.rest))
        ]

    def kept(self, name: str) -> list[float | None]:
        """U: values of a finding after each request, of what no request covers if it is about that."""
        return [self._value(found, name) for found in self.rest]

    def resurgence(self, name: str) -> list[float]:
        r"""\(\max_{t>i} (F_{t,i} - F_{i,i})\) of each request but the last: how far it came back, or less."""
        rows = self.matrix(name)
        found = []
        for i in range(len(rows) - 1):
            column = [row[i] for row in rows[i:]]
            later = [v for v in column[1:] if v is not None]
            first = column[0]
            found.append(max(later) - first if later and first is not None else float("nan"))
        return found

    def table(self, name: str, kept: str = "") -> str:
        """F as a table of Markdown, with a finding of `rest` in a last column."""
        numbers = range(len(self.rest))
        extra = f" {kept} |" if kept else ""
        lines = [f"| {name} after |" + "".join(f" {i + 1} |" for i in numbers) + extra]
        lines.append("|---|" + "---|" * (len(self.rest) + bool(kept)))
        for t, row in enumerate(self.matrix(name)):
            values = [*row, *[None] * (len(self.rest) - t - 1), *([self.kept(kept)[t]] if kept else [])]  # fmt: skip
            shown = ["" if v is None else f"{v:.3f}" for v in values]
            lines.append(f"| request {t + 1} |" + "".join(f" {v} |" for v in shown))
        return "\n".join(lines)

    @staticmethod
    def _value(found: Mapping[str, Finding], name: str) -> float | None:
        if name not in found:
            raise UserError(f"no finding is called {name!r}; there are {', '.join(sorted(found))}")
        return found[name].value


def unlearn_sequence(
    problem: Problem,
    requests: Sequence[Request],
    method: MethodSpec,
    *,
    audits: str | Sequence[str | Audit] = (),
    measures: Mapping[str, Measure] | None = None,
    references: int = 0,
    runtime: Runtime | None = None,
) -> RequestSequence:
    """Carry out requests one after the other and measure all of them after each.

    Each request is unlearned from the model that the one before left behind, adapters merged, with
    the training data that is left: samples that an earlier request covered are no retain data.

    Args:
        problem: the model and its data.
        requests: what to forget, in order; samples that an earlier one covers are left out of a later.
        method: one for all: a name, a `{"name": …, setting: …}` mapping or an instance.
        audits: names or instances, or a suite's name.
        measures: further numbers by name, each a function of a `Subject`.
        references: models retrained after each request without any sample covered so far.
        runtime: device, seed (the same for each request), progress.

    Returns:
        Outcomes and findings.

    Raises:
        UserError: a request does not fit the data, covers nothing that is left, or the method does not
            compose with its own result.
    """
    from expunge.audits.run import run_audits  # scikit-learn is slow to import

    runtime = runtime or Runtime()
    made, passed = make_method(method, problem)
    steps = list(_resolved(problem, requests))
    result = RequestSequence(tuple(request for request, _ in steps))
    gone = torch.cat([ids for _, ids in steps])
    everything = Request(ids=tuple(gone.tolist()))
    everything.resolve(problem.train)
    current, covered = problem, gone[:0]

    if references and problem.recipe is None:
        raise UserError("references are trained by the problem's recipe; pass recipe=")

    def look(released: Subject, request: Request, retrained: list[Subject]) -> dict[str, Finding]:
        subject = _about(released, request)
        others = [_about(one, request) for one in retrained]
        found = {f.name: f for f in run_audits(subject, others, audits, replace(runtime, seed=0))}
        for name, measure in (measures or {}).items():
            found[name] = Finding(
                name, float(measure(subject)), reason="measured without reference"
            )
        return found

    with runtime.task("sequence", len(steps)) as task:
        for t, (request, ids) in enumerate(steps):
            where = replace(runtime, cost=Cost())
            if where.checkpoint is not None:
                where.checkpoint = where.checkpoint / f"request-{t}"
            outcome = unlearn(current, request, made, runtime=where, passed=passed)
            covered = torch.cat([covered, ids])
            result.outcomes.append(outcome)
            retrained = _retrained(problem, covered, references, runtime)
            released = Subject(outcome.released(), problem, request, runtime, outcome=outcome)
            for i in range(t + 1):
                result.cells[t, i] = look(released, steps[i][0], retrained)
            result.rest.append(look(released, everything, retrained))
            model = outcome.runnable()
            model = merged(model) if has_adapters(model) else model
            current = problem.about(model, problem.train.only(problem.train.without(covered)))
            task.advance()
    return result


def _about(subject: Subject, request: Request) -> Subject:
    """The same model looked at for another request."""
    other = Subject(subject.model, subject.problem, request, subject.runtime, cost=subject.cost)
    other.outcome = subject.outcome
    return other


def _resolved(problem: Problem, requests: Sequence[Request]) -> Iterator[tuple[Request, Tensor]]:
    """Each request with the ids it covers of what is left by then."""
    if not requests:
        raise RequestError("a sequence takes one request at least")
    covered = torch.zeros(0, dtype=torch.long)
    for number, request in enumerate(requests, 1):
        ids = request.resolve(problem.train)
        rest = ids[~torch.isin(ids, covered)]
        if not len(rest):
            raise RequestError(
                f"request {number} ({request}) covers only samples of earlier requests"
            )
        covered = torch.cat([covered, rest])
        # a share of what is left would be another one
        if len(rest) < len(ids) or (number > 1 and request.form == "fraction"):
            request = Request(ids=tuple(rest.tolist()), reason=request.reason, time=request.time)
        yield request, rest


def _retrained(problem: Problem, covered: Tensor, count: int, runtime: Runtime) -> list[Subject]:
    """Models that never saw what was covered so far."""
    if problem.recipe is None or not count:
        return []
    keep, request = problem.train.without(covered), Request(ids=tuple(covered.tolist()))
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    jobs = [Job(keep, seed, "reference") for seed in seeds]
    made = in_order(chosen(None, runtime).run(problem, jobs, runtime))
    return [Subject(done.model, problem, request, runtime) for done in made]

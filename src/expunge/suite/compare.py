"""Compare: several methods on one problem and request, each beside retrained references."""

from __future__ import annotations

import datetime as dt
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expunge import __version__
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import UserError
from expunge.core.hashing import content_key, plain
from expunge.core.method import Method
from expunge.core.outcome import Cost, Outcome, unguarded
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.fleet.references import Reference
from expunge.methods import registry as methods
from expunge.store import Store
from expunge.suite.bench import Bench

MethodSpec = str | Method | Mapping[str, Any]


@dataclass
class Comparison:
    """What `compare` found, as the dict that reports and scripts read.

    Attributes:
        data: `{"comparisons": [...], "report": ...}` as documented in `docs/scripting.md`.
    """

    data: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of all comparisons, one a method and seed."""
        return [row for c in self.data["comparisons"] for row in c["rows"]]

    def report(self, folder: str | Path) -> Path:
        """Write `report.html`, `.json` and `.md` into a folder and return the HTML's path."""
        from expunge.report import write_report

        folder = Path(folder)
        self.data["report"] = str(folder / "report.html")
        return write_report(self.data, folder)["html"]

    def __str__(self) -> str:
        """Render the table and the verdict as text."""
        from rich.console import Console

        from expunge.report import terminal_table

        console = Console(width=120, file=io.StringIO(), record=True)
        for comparison in self.data["comparisons"]:
            console.print(terminal_table(comparison))
        return console.export_text()


def make_method(spec: MethodSpec, problem: Problem) -> tuple[Method, dict[str, Any]]:
    """Turn a name, a `{"name": …, setting: …}` mapping or an instance into a method.

    A name takes the problem's tuned settings where there are some; what is passed wins.

    Returns:
        The method and the settings that were passed.
    """
    if isinstance(spec, Method):
        return spec, spec.in_force()
    passed = {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
    name = spec if isinstance(spec, str) else str(spec["name"])
    return methods.get(name).create({**problem.tuned.get(name, {}), **passed}), passed


def compare(
    problem: Problem,
    request: Request,
    methods: Sequence[MethodSpec],
    *,
    seeds: Sequence[int] = (0,),
    references: int = 3,
    audits: str | Sequence[str | Audit] = "standard",
    strata: Any = None,
    store: Store | None = None,
    runtime: Runtime | None = None,
    bench: Bench | None = None,
    title: str = "",
) -> Comparison:
    """Run methods on one problem and request and audit each against retrained references.

    Args:
        problem: the model and its data.
        request: what to forget.
        methods: names, `{"name": …, setting: …}` mappings or instances. `retrain` and `original`
            are always shown, as rows of their own.
        seeds: one run of each method a seed.
        references: retrained models to compare with, each with another seed.
        audits: a suite's name or a list.
        strata: `"el2n"`, `"grand"` or `"forgetting"`, a `Difficulty`, or ids by name of the part:
            what has per-sample values is also measured on each part, as `audit/what@part`.
            Verdicts rest on the whole.
        store: where results are kept and looked up; a temporary one by default.
        runtime: device, threads, progress.
        bench: used instead of `store` and `runtime` by callers that have one.
        title: a line for the report.

    Returns:
        The comparison.
    """
    from expunge.audits.run import audit_list  # scikit-learn is slow to import

    bench = bench or Bench(store or Store.temporary(), runtime or Runtime())
    runtime = bench.runtime
    problem.check()
    specs = [m for m in methods if m not in ("retrain", "original")]
    made = [make_method(m, problem) for m in specs]
    for method, _ in made:
        method.check(problem, request)
    splits = problem.split(request)
    parts = bench.strata(problem, strata)

    jobs = references * (problem.recipe is not None) + 2 + 2 * len(made) * len(seeds)
    rows: list[dict[str, Any]] = []
    with runtime.task(f"{problem.name}: {request}", jobs) as task:
        trained = []
        for reference in bench.references(problem, request, references):
            trained.append((
                reference,
                Subject(reference.model, problem, request, runtime, cost=reference.cost),
            ))
            task.advance()
        original = Subject(problem.model, problem, request, runtime)
        run = bench.original(problem)
        findings = bench.audit(original, run, trained, audits, parts)
        rows.append(_row("original", 0, run, None, findings, trained))
        task.advance()
        if trained:
            (first, subject), others = trained[0], trained[1:]
            row = _row(
                "retrain",
                first.seed,
                first.run,
                None,
                bench.audit(subject, first.run, others, audits, parts),
                trained,
            )
            rows.append(
                row | {"seconds": first.cost.seconds, "cost_ratio": 1.0, "guarantee": "exact"}
            )
            task.advance()
        among_seeds = any(a.name == "klom" for a in audit_list(audits, problem))
        for method, passed in made:
            released: list[tuple[int, Outcome, str, Subject]] = []
            for number, seed in enumerate(seeds, 1):
                outcome, run = bench.unlearn(problem, request, method, seed, passed)
                task.advance()
                subject = Subject(outcome.released(), problem, request, runtime, outcome=outcome)
                # what compares seeds is audited when all of them are there; else none is kept
                released = [*(released if among_seeds else []), (seed, outcome, run, subject)]
                if among_seeds and number < len(seeds):
                    continue
                for s, o, r, one in released:
                    if among_seeds:
                        one.siblings = tuple(x for *_, x in released if x is not one)
                    findings = bench.audit(one, r, trained, audits, parts)
                    rows.append(_row(method.name, s, r, o, findings, trained, method))
                    task.advance()
    comparison = {
        "workload": problem.name,
        "title": title or f"{problem.name}: forget {request}",
        "request": request.to_dict() | {"text": str(request)},
        "classes": getattr(problem, "classes", None),
        "splits": {k: len(v) for k, v in splits.items()},
        "references": [
            {"run": r.run, "seed": r.seed, "seconds": r.cost.seconds} for r, _ in trained
        ],
        "rows": rows,
    }
    if parts is not None:
        comparison["strata"] = parts.describe(splits["forget-train"])
    return Comparison({
        "expunge": __version__,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": "expunge.compare",
        "comparisons": [plain(comparison)],
        "report": None,
    })


def join(comparisons: Sequence[Comparison], command: str) -> Comparison:
    """Put several comparisons into one report."""
    first = comparisons[0].data
    together = [c for one in comparisons for c in one.data["comparisons"]]
    return Comparison({**first, "command": command, "comparisons": together})


def audit(
    outcome: Outcome,
    audits: str | Sequence[str | Audit] = "standard",
    *,
    references: int | Sequence[Reference] = 3,
    strata: Any = None,
    store: Store | None = None,
    runtime: Runtime | None = None,
    run: str | None = None,
    guard: bool = True,
) -> list[Finding]:
    """Audit an outcome's released weights against retrained references.

    Args:
        outcome: from `unlearn`; its change is written, read back and applied to the original.
        audits: a suite's name or a list.
        references: how many to retrain, or ready ones.
        strata: a score's name, a `Difficulty`, or ids by name of the part; see `compare`.
        store: where references are kept and looked up; a temporary one by default.
        runtime: device, threads, progress.
        run: the outcome's run in the store, which the findings are filed under.
        guard: audit what is released; if not, the model inside its guards, whose weights the
            original's are: what who takes a guard off has.

    Returns:
        The findings; without a recipe they have values, no reference, and the reason.

    Raises:
        UserError: the outcome was loaded without its problem and request.
    """
    if outcome.problem is None or outcome.request is None:
        raise UserError("set outcome.problem and outcome.request before auditing a loaded outcome")
    problem, request = outcome.problem, outcome.request
    bench = Bench(store or Store.temporary(), runtime or Runtime())
    parts = bench.strata(problem, strata)
    ready = (
        list(bench.references(problem, request, references))
        if isinstance(references, int)
        else list(references)
    )
    subjects = [(r, Subject(r.model, problem, request, bench.runtime, cost=r.cost)) for r in ready]
    released = outcome.released() if guard else unguarded(outcome.released())
    subject = Subject(released, problem, request, bench.runtime, outcome=outcome)
    if run is None:
        run = bench.put_outcome(outcome, content_key(["outcome", outcome.record]))
    return bench.audit(subject, run, subjects, audits, parts)


def _row(
    name: str,
    seed: int,
    run: str,
    outcome: Outcome | None,
    findings: Sequence[Finding],
    trained: Sequence[tuple[Reference, Subject]],
    method: Method | None = None,
) -> dict[str, Any]:
    cost = Cost() if outcome is None else outcome.cost
    return {
        "method": name,
        "seed": seed,
        "run": run,
        "seconds": cost.seconds,
        "cost_ratio": cost.ratio([r.cost for r, _ in trained]),
        "intent": method.card.intent if method else None,
        "guarantee": method.card.guarantee if method else None,
        "fidelity": method.card.fidelity if method else None,
        "cost": asdict(cost),
        "settings": {} if outcome is None else outcome.record["method"],
        "details": {} if outcome is None else outcome.details,
        "notes": []
        if outcome is None or "stopped" not in outcome.details
        else [outcome.details["stopped"]],
        "curve": [] if outcome is None else outcome.curve,
        "findings": {f.name: finding_dict(f) for f in findings},
    }


def finding_dict(finding: Finding) -> dict[str, Any]:
    """One finding as reports and scripts read it; per-sample arrays stay in the store."""
    shown = {k: v for k, v in vars(finding).items() if k not in ("name", "per_sample")}
    return shown | {"gap": finding.gap}

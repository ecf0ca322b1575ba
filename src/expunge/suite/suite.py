"""Suite: problems × requests × methods × audits × seeds from one TOML file.

```toml
name = "digits"
seeds = [0, 1]
references = 2
audits = "standard"
strata = "el2n"     # break findings down by difficulty: el2n, grand or forgetting; not if left out
methods = ["finetune", { name = "ssd", alpha = "auto" }]

[[problem]]
workload = "digits-class"
requests = [{ label = 3 }, { label = 7 }]     # the workload's own request if left out
prune = "omp:0.5"     # prune the original first: omp, imp or synflow and a rate; not if left out
```

Every step is content-keyed, so running again, or going on after a kill, skips what the store has.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expunge.audits.run import audit_list
from expunge.core.errors import UserError
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.methods import registry as methods
from expunge.store import Store
from expunge.suite.bench import Bench, check_strata
from expunge.suite.compare import Comparison, compare, join
from expunge.train.prune import Pruning
from expunge.workloads import registry as workloads


class ProblemSpec(BaseModel):
    """One `[[problem]]` table."""

    model_config = ConfigDict(extra="forbid")

    workload: str
    seed: int = 0
    prune: str | None = None
    requests: list[dict[str, Any]] = Field(default_factory=list)


class SuiteSpec(BaseModel):
    """A whole suite file."""

    model_config = ConfigDict(extra="forbid")

    name: str
    problem: list[ProblemSpec] = Field(min_length=1)
    methods: list[str | dict[str, Any]] = Field(min_length=1)
    seeds: list[int] = [0]
    references: int = Field(default=2, ge=0)
    audits: str | list[str] = "standard"
    strata: str | None = None

    def check(self) -> None:
        """Resolve every name and setting before any compute.

        Raises:
            UserError: names what is wrong.
        """
        for spec in self.methods:
            name = spec if isinstance(spec, str) else str(spec.get("name", ""))
            settings = (
                {} if isinstance(spec, str) else {k: v for k, v in spec.items() if k != "name"}
            )
            methods.get(name).create(settings)
        audit_list(self.audits)
        for problem in self.problem:
            workloads.get(problem.workload)
            if self.strata is not None:
                check_strata(self.strata, problem.workload)
            if problem.prune is not None:
                Pruning.parse(problem.prune)
            for request in problem.requests:
                Request.from_dict(request)


def read_suite(path: str | Path) -> SuiteSpec:
    """Read and check a suite file.

    Raises:
        UserError: the file cannot be read, or says something that cannot be run.
    """
    try:
        values = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from error
    return suite_from(values, str(path))


def suite_from(values: Mapping[str, Any], where: str = "the suite") -> SuiteSpec:
    """Build a suite from a mapping and check it.

    Raises:
        UserError: names the first thing that is wrong.
    """
    try:
        spec = SuiteSpec.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {place}: {first['msg']}") from error
    spec.check()
    return spec


def run_suite(
    spec: SuiteSpec, store: Store, runtime: Runtime, suite_id: str | None = None
) -> tuple[str, Comparison]:
    """Run a suite, or go on with one; finished steps are taken from the store.

    Args:
        spec: what to run.
        store: where results are and go.
        runtime: device, threads, progress.
        suite_id: the suite to go on with; a new one if left out.

    Returns:
        The suite's id and its comparisons, joined.
    """
    suite = suite_id or store.start_suite(spec.name, spec.model_dump())

    def log(label: str, key: str, reused: bool, run: str) -> None:
        store.log_job(suite, f"{label} {key[:12]}", "reused" if reused else "done", run)

    bench = Bench(store, runtime, on_job=log)
    found = []
    for item in spec.problem:
        problem = bench.workload(item.workload, item.seed)
        if item.prune is not None:
            problem = bench.pruned(problem, item.prune)
        requests = [Request.from_dict(r) for r in item.requests]
        for request in requests or [workloads.get(item.workload).request]:
            found.append(
                compare(
                    problem,
                    request,
                    spec.methods,
                    seeds=spec.seeds,
                    references=spec.references,
                    audits=spec.audits,
                    strata=spec.strata,
                    bench=bench,
                )
            )
    return suite, join(found, f"expunge suite run ({spec.name})")

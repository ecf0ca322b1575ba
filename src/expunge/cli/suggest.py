"""`expunge suggest`: which methods can run on a problem, what the others miss, and the evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expunge.cli.common import (
    DataPath,
    Device,
    ForgetFile,
    Fraction,
    Ids,
    Json,
    Labels,
    Model,
    RecipePath,
    Seed,
    StoreOption,
    TestPath,
    Threads,
    Where,
    Workload,
    print_json,
    print_table,
    problem_from,
    request_from,
)
from expunge.cli.common import runtime as make_runtime

if TYPE_CHECKING:
    from expunge.suite.suggest import Suggestion


def suggest(
    workload: Workload = None,
    model: Model = None,
    data: DataPath = None,
    test: TestPath = None,
    forget: ForgetFile = None,
    label: Labels = None,
    ids: Ids = None,
    where: Where = None,
    fraction: Fraction = None,
    seed: Seed = 0,
    recipe: RecipePath = None,
    device: Device = "cpu",
    threads: Threads = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """List the methods that can answer a request, what others miss, and what the store has seen.

    No method is run. A bundled problem whose original is not in the store yet is trained first.
    """
    from expunge.store import Store
    from expunge.suite.bench import Bench
    from expunge.suite.suggest import suggest as look
    from expunge.workloads import registry as workloads

    usual = None if workload is None else workloads.get(workload).request
    with make_runtime(device, seed, threads) as runtime:
        opened = Store.open(store)
        request = request_from(forget, label, ids, where, fraction, default=usual, model=model)
        problem = problem_from(Bench(opened, runtime), workload, model, data, test, recipe)
        found = look(problem, request, store=opened)
    if as_json:
        print_json({
            "problem": problem.name,
            "kind": problem.kind,
            "request": request.to_dict() | {"text": str(request)},
            "suggestions": [one.to_dict() for one in found],
        })
        return
    print_table(
        f"{problem.name}: forget {request}",
        ["method", "needs", "distance to retraining", "cost / retraining", "seen on"],
        [_row(one) for one in found if one.runs],
    )
    rest = [[one.method, one.missing] for one in found if not one.runs]
    if rest:
        print_table("cannot run as things are", ["method", "why"], rest)


def _row(one: Suggestion) -> list[str]:
    needs = ", ".join(one.needs) or "–"
    if not one.evidence:
        return [one.method, needs, "–", "–", "nothing in the store"]
    best = one.evidence[0]
    ratio = "–" if best.cost_ratio is None else f"{best.cost_ratio:.3f}"
    return [one.method, needs, f"{best.distance:.4f}", ratio, f"{best.workload}, {best.request}"]

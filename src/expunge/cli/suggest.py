"""`expunge suggest`: which methods can run on a problem, what the others miss, and the evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expunge.cli.common import Seed, print_json, print_table
from expunge.cli.options import Inputs, with_inputs

if TYPE_CHECKING:
    from expunge.suite.suggest import Suggestion


@with_inputs
def suggest(seed: Seed = 0, *, inputs: Inputs) -> None:
    """List the methods that can answer a request, what others miss, and what the store has seen.

    No method is run. A bundled problem whose original is not in the store yet is trained first,
    and pruned if --prune says so.
    """
    from expunge.suite.suggest import suggest as look

    with inputs.bench(seed) as bench:
        request = inputs.request()
        problem = inputs.problem(bench)
        found = look(problem, request, store=bench.store)
    if inputs.as_json:
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

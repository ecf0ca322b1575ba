"""How a method's correction grows with the share of the manipulated samples that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.audits.corrective import Corrective
from expunge.core.errors import NeedsError, UnchangedError
from expunge.core.problem import Problem
from expunge.suite.bench import Bench
from expunge.suite.compare import Comparison, MethodSpec, compare
from expunge.workloads.corrupted import found


def identified_curve(
    problem: Problem,
    methods: Sequence[MethodSpec],
    shares: Sequence[float] = (0.1, 0.5, 0.8, 1.0),
    *,
    seeds: Sequence[int] = (0,),
    references: int = 1,
    bench: Bench,
) -> list[dict[str, Any]]:
    """Unlearn growing parts of the manipulated samples, with the same settings for every share.

    Args:
        problem: its training data has the column `manipulated` (see `workloads.corrupted`).
        methods: as `compare` takes them.
        shares: of the manipulated samples that are known.
        seeds: one run of each method a seed.
        references: models retrained without the known part.
        bench: where work is kept and looked up.

    Returns:
        Rows `{share, method, seed, unchanged, affected, rest, still-wrong}`; values as in `corrective`,
        those of the original where a method had no effect (`unchanged`).

    Raises:
        NeedsError: the training data does not say what was manipulated.
    """
    if "manipulated" not in problem.train.columns:
        raise NeedsError("the training data needs a column 'manipulated': 0 for clean samples, else the order they are found in")  # fmt: skip
    count = int(problem.train.columns["manipulated"].max())
    rows = []
    for share in shares:
        request = found(share, count)
        settings: Any = {"references": references, "audits": [Corrective()], "bench": bench}
        beside = _rows(compare(problem, request, [], seeds=seeds, **settings), share)
        rows += beside
        for method in methods:
            try:
                done = _rows(compare(problem, request, [method], seeds=seeds, **settings), share)
                rows += [r for r in done if r["method"] not in ("original", "retrain")]
            except UnchangedError:  # so few samples can have nothing to go by
                name = method["name"] if isinstance(method, Mapping) else str(method)
                before = next(r for r in beside if r["method"] == "original")
                rows += [before | {"method": name, "seed": s, "unchanged": True} for s in seeds]
    return rows


def _rows(done: Comparison, share: float) -> list[dict[str, Any]]:
    return [
        {"share": share, "method": row["method"], "seed": row["seed"], "unchanged": False}
        | {n.removeprefix("corrective/"): f["value"] for n, f in row["findings"].items()}
        for row in done.data["comparisons"][0]["rows"]
    ]

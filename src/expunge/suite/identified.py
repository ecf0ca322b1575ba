"""How a method's correction grows with the share of the manipulated samples that is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expunge.audits.corrective import Corrective
from expunge.core.errors import NeedsError
from expunge.core.problem import Problem
from expunge.suite.bench import Bench
from expunge.suite.compare import MethodSpec, compare
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
        Rows `{share, method, seed, affected, rest, still-wrong}`; values as in `corrective`.

    Raises:
        NeedsError: the training data does not say what was manipulated.
    """
    if "manipulated" not in problem.train.columns:
        raise NeedsError("the training data needs a column 'manipulated': 0 for clean samples, else the order they are found in")  # fmt: skip
    count = int(problem.train.columns["manipulated"].max())
    rows = []
    for share in shares:
        done = compare(
            problem, found(share, count), methods, seeds=seeds, references=references,
            audits=[Corrective()], bench=bench,
        )  # fmt: skip
        for row in done.data["comparisons"][0]["rows"]:
            values = {n.removeprefix("corrective/"): f["value"] for n, f in row["findings"].items()}
            rows.append({"share": share, "method": row["method"], "seed": row["seed"], **values})
    return rows

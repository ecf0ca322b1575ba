"""A method audited on forget sets of different difficulty: random ones and both tails.

Random forget sets say how a method does on average. On *redundant* samples a retrained model still predicts
what it never saw, so a method that makes them wrong gives away what was forgotten; on *memorised* ones a
retrained model fails, so a method that leaves them right has not forgotten. Both tails are
reported, each beside models retrained without that very set, and with the same settings of the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.audit import Audit
from expunge.core.errors import NeedsError, SettingError, UnchangedError
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.fleet.forget_sets import TAILS, SetName, check_set, forget_set
from expunge.fleet.worst_case import Search
from expunge.suite.bench import Bench
from expunge.suite.compare import Comparison, MethodSpec, compare, join, make_method

SETS = ("worst-case", "random", "high-el2n")
FIGURES = {
    "UA": ("accuracy/forget-train", True),
    "MIA": ("membership/efficacy-svc", False),
    "RA": ("accuracy/retain-train", False),
    "TA": ("accuracy/retain-test", False),
}
"""The literature's four figures: the finding behind each, and whether it is one minus it."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class BySet:
    """What the audit found.

    Attributes:
        rows: one a set, draw, method and seed: `{set, tail, draw, method, seed, unchanged, UA, MIA, RA, TA}`,
            each figure `{value, low, high, reference}` or without value and with a `reason`.
        requests: the sets, by name, one a draw.
        comparison: every set's comparison, for a report.
        sets: what is known of each set: samples, share of the most frequent class, share of it in each other.
    """

    rows: Rows
    requests: dict[SetName, list[Request]]
    comparison: Comparison
    sets: Rows

    def summary(self) -> Rows:
        """One row a set and method: `{set, tail, method, n, UA, MIA, RA, TA, distance}`; see `summarise`."""
        return summarise(self.rows)


def by_forget_set(
    problem: Problem,
    methods: Sequence[MethodSpec],
    size: int,
    sets: Sequence[str] = SETS,
    *,
    draws: int = 10,
    balanced: bool = False,
    search: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (0,),
    references: int = 1,
    bench: Bench,
) -> BySet:
    """Choose forget sets of several kinds, unlearn each and audit beside models retrained without it.

    Args:
        problem: a classifier with test data and a recipe.
        methods: as `compare` takes them; the same settings for every set.
        size: samples in each set.
        sets: kinds of set; see `fleet.forget_sets`.
        draws: random sets; of the others there is one.
        balanced: each class by its share, so that classes do not explain a difference.
        search: settings of the search, see `fleet.worst_case.Search`.
        seeds: one run of each method a seed.
        references: retrained models a set.
        bench: where work is kept and looked up; its seed is that of the search and of the draws.

    Returns:
        Figures of every set.

    Raises:
        NeedsError: there is no recipe to retrain with, or no test data.
        SettingError: a kind of set is unknown, named twice, or there are no draws.
    """
    names = [check_set(name) for name in sets]
    Search.create(search or {})
    if draws < 1 or not names or len(set(names)) < len(names):
        raise SettingError("name each kind of forget set once, and draw at least one random set")
    if problem.kind != "classification" or problem.recipe is None or problem.test is None or references < 1:  # fmt: skip
        raise NeedsError("forget sets are judged beside retrained classifiers: pass recipe=, test data and at least one reference")  # fmt: skip
    problem.check()
    for method in methods:
        make_method(method, problem)
    inner = replace(bench.runtime, checkpoint=None, cost=Cost())
    requests = {
        name: [
            forget_set(problem, name, size, draw=d, balanced=balanced, search=search, store=bench.store, runtime=inner)
            for d in range(draws if name == "random" else 1)
        ]
        for name in names
    }  # fmt: skip
    rows: Rows = []
    comparisons = []
    for name, of_kind in requests.items():
        for draw, request in enumerate(of_kind):
            one = _compared(problem, request, methods, seeds, references, bench)
            one.data["comparisons"][0]["title"] = f"{problem.name}: forget {size} samples, {request.reason}"  # fmt: skip
            rows += [
                {"set": name, "tail": TAILS[name], "draw": draw} | _figures(r) for r in one.rows
            ]
            if not draw:  # one random set is enough to look at in a report
                comparisons.append(one)
    return BySet(rows, requests, join(comparisons, "forget-sets"), _about(problem, requests))


def summarise(rows: Rows) -> Rows:
    r"""Gaps to retraining for each set and method.

    A gap is the mean of value − reference over draws and seeds. Its 95 % interval is the wider of Student's t
    over draws (over seeds where there is one draw and there are several seeds), and Wilson's over samples divided by √draws (of the method's side
    alone: the reference is taken as it is). `distance` is the mean of the absolute gaps of the four
    figures (the literature's average gap).

    Args:
        rows: of `BySet`.

    Returns:
        Rows; each figure is `{value, reference, gap, low, high}`, with ends of the gap's interval.
    """
    found = []
    for name, method in dict.fromkeys((r["set"], r["method"]) for r in rows):
        there = [r for r in rows if (r["set"], r["method"]) == (name, method)]
        one: dict[str, Any] = {"set": name, "tail": there[0]["tail"], "method": method, "n": len(there)}  # fmt: skip
        one["unchanged"] = all(r["unchanged"] for r in there)
        one |= {figure: _gap([(r["draw"], r[figure]) for r in there]) for figure in FIGURES}
        gaps = [one[f]["gap"] for f in FIGURES if one[f]["gap"] is not None]
        one["distance"] = float(np.mean(np.abs(gaps))) if gaps else None
        found.append(one)
    return found


def _gap(given: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, float | None]:
    from expunge.audits._intervals import mean_interval

    known = [(d, f) for d, f in given if f["value"] is not None]
    if not known:
        return dict.fromkeys(("value", "reference", "gap", "low", "high"))
    shown: dict[str, float | None] = {"value": float(np.mean([f["value"] for _, f in known]))}
    beside = [(d, f) for d, f in known if f["reference"] is not None]
    if not beside:
        return shown | dict.fromkeys(("reference", "gap", "low", "high"))
    by_draw = np.array([
        np.mean([f["value"] - f["reference"] for d, f in beside if d == draw])
        for draw in sorted({d for d, _ in beside})
    ])
    gap, root = float(by_draw.mean()), float(np.sqrt(len(by_draw)))
    low = gap - float(np.mean([f["value"] - f["low"] for _, f in beside])) / root
    high = gap + float(np.mean([f["high"] - f["value"] for _, f in beside])) / root
    one_set = np.array([f["value"] - f["reference"] for _, f in beside])
    units = by_draw if len(by_draw) > 1 else one_set
    if len(units) > 1:  # a few draws may agree by chance: never narrower than their samples allow
        ends = mean_interval(units)
        low, high = min(low, ends[0]), max(high, ends[1])
    reference = float(np.mean([f["reference"] for _, f in beside]))
    return shown | {"reference": reference, "gap": gap, "low": low, "high": high}


def _compared(
    problem: Problem,
    request: Request,
    methods: Sequence[MethodSpec],
    seeds: Sequence[int],
    references: int,
    bench: Bench,
) -> Comparison:
    """One set: original, retrained and all methods; one that changed nothing stays as a row."""
    settings: Any = {"references": references, "audits": _audits(), "bench": bench, "seeds": seeds}
    one = compare(problem, request, [], **settings)
    rows = one.data["comparisons"][0]["rows"]
    before = next(r for r in rows if r["method"] == "original")
    for method in methods:
        try:
            done = compare(problem, request, [method], **settings).rows
            rows += [r for r in done if r["method"] not in ("original", "retrain")]
        except UnchangedError as error:
            name = make_method(method, problem)[0].name
            rows += [before | {"method": name, "seed": s, "notes": [str(error)], "unchanged": True} for s in seeds]  # fmt: skip
    return one


def _audits() -> list[Audit]:
    from expunge import audits  # scikit-learn is slow to import

    return [audits.Accuracy(), audits.Membership(scores=("loss",), attackers=("svc",))]


def _figures(row: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {k: row[k] for k in ("method", "seed")}
    shown["unchanged"] = row.get("unchanged", False)
    for figure, (name, inverted) in FIGURES.items():
        f = row["findings"][name]
        ends = {k: f[k] for k in ("value", "low", "high", "reference")}
        if inverted:
            ends = {k: None if v is None else 1 - v for k, v in ends.items()}
            ends["low"], ends["high"] = ends["high"], ends["low"]
        shown[figure] = ends | {"reason": f["reason"]}
    return shown


def _about(problem: Problem, requests: Mapping[SetName, Sequence[Request]]) -> Rows:
    """Size, largest class and overlaps of the first set of each kind."""
    ids = {name: of_kind[0].resolve(problem.train) for name, of_kind in requests.items()}

    def shared(a: Tensor, b: Tensor) -> float:
        return float(torch.isin(a, b).double().mean())

    return [
        {
            "set": name,
            "tail": TAILS[name],
            "samples": len(one),
            "largest class": float(problem.train.labels_of(one).bincount().double().max())
            / len(one),
            "overlap": {other: shared(one, them) for other, them in ids.items() if other != name},
        }
        for name, one in ids.items()
    ]

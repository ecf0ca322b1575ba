"""Forget sets by name: random ones, and both tails of how hard samples are to unlearn.

The tails are opposite ends, each found in two ways: the *redundant* one by the search of `worst_case` and as
the lowest EL2N, the *memorised* one by the same search turned round and as the highest EL2N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from expunge.core.errors import NeedsError, SettingError
from expunge.core.problem import Problem
from expunge.core.request import Request, forget
from expunge.core.runtime import Runtime
from expunge.fleet.difficulty import difficulty
from expunge.fleet.worst_case import chosen_among, shares, worst_case

if TYPE_CHECKING:
    from expunge.store import Store

SetName = Literal["low-el2n", "worst-case", "random", "easiest", "high-el2n"]
TAILS: dict[SetName, str] = {
    "low-el2n": "redundant",
    "worst-case": "redundant",
    "random": "average",
    "easiest": "memorised",
    "high-el2n": "memorised",
}
"""Which part of the scale each kind of set is, from the redundant end to the memorised one."""

EL2N_RUNS = 10
"""Short trainings behind EL2N."""


def check_set(name: str) -> SetName:
    """Return the name of a kind of set.

    Raises:
        SettingError: it is another word.
    """
    for known in get_args(SetName):
        if name == known:
            return known
    raise SettingError(f"there is no forget set {name!r}; use {', '.join(get_args(SetName))}")


def forget_set(
    problem: Problem,
    name: str,
    size: int,
    *,
    draw: int = 0,
    balanced: bool = False,
    among: Tensor | Sequence[int] | None = None,
    search: Mapping[str, Any] | None = None,
    store: Store | None = None,
    runtime: Runtime | None = None,
) -> Request:
    """Choose a forget set of a kind.

    Args:
        problem: the model, its data and, for EL2N, its recipe.
        name: `random`; `worst-case` and `low-el2n` (redundant tail); `easiest` and `high-el2n`
            (memorised tail).
        size: samples m.
        draw: number of the random set; the others are the same for every draw.
        balanced: of each class as many samples as its share of those to choose among.
        among: ids to choose among; all by default.
        search: settings of `worst_case.Search`.
        store: where searches and scores are kept and looked up.
        runtime: seed, device, progress and engine.

    Returns:
        A request by ids, whose reason says what it is.

    Raises:
        NeedsError: there is no recipe to measure EL2N with, or nothing to balance by.
        SettingError: the name is unknown or so many samples are not there.
        RequestError: an id of `among` is not in the data.
    """
    runtime = runtime or Runtime()
    if check_set(name) in ("worst-case", "easiest"):
        return worst_case(
            problem, size, reverse=name == "easiest", balanced=balanced, among=among, store=store,
            runtime=runtime, **(search or {}),
        ).request()  # fmt: skip
    ids = chosen_among(problem.train, problem.train.ids if among is None else among)
    if size != int(size) or not 0 < size <= len(ids) or size == len(problem.train):
        raise SettingError(f"{size} of {len(ids)} samples cannot be chosen to forget")
    if name == "random":
        order = torch.randperm(len(ids), generator=runtime.generator("forget-set", draw))
        ranked, why = ids[order], f"random, draw {draw}"
    else:
        scored = difficulty(
            problem, "el2n", runs=EL2N_RUNS, store=store, runtime=replace(runtime, seed=0)
        )
        ranked = scored.ranked()
        ranked = ranked[torch.isin(ranked, ids)]
        ranked = ranked.flip(0) if name == "high-el2n" else ranked
        why = f"{TAILS[check_set(name)]} tail, {name.partition('-')[0]}est EL2N"
    chosen = _first(problem, ranked, size, balanced).sort().values
    return forget(ids=chosen, reason=why)


def _first(problem: Problem, ranked: Tensor, size: int, balanced: bool) -> Tensor:
    """The first samples, or the first of each class, in the order given."""
    if not balanced:
        return ranked[:size]
    labels = problem.train.labels_of(ranked)
    if labels.is_floating_point():
        raise NeedsError("balanced= is about classes, and the labels are no class numbers")
    return torch.cat([ranked[labels == c][:n] for c, n in shares(labels, size).items()])

"""From what somebody asks to delete to places in the index, with everything told apart that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from expunge.core.errors import NeedsError, RequestError
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.exact.index import Index

Asked = Request | int | str | Iterable[int | str] | Tensor


@dataclass(frozen=True)
class Found:
    """What a request covers.

    Attributes:
        located: ids to delete by shard and slice.
        places: their positions in the index.
        already: deleted before.
        unknown: nobody knows them.
        outside: in the data, but not in the manifest.
    """

    located: dict[int, dict[int, list[int]]]
    places: np.ndarray
    already: tuple[int | str, ...]
    unknown: tuple[int | str, ...]
    outside: tuple[int | str, ...]


def resolve(
    asked: Asked,
    index: Index,
    deleted: np.ndarray,
    problem: Problem | None,
    named: bool = False,
) -> Found:
    """Find what is asked for.

    Args:
        asked: a request, an id, a name, or several.
        index: of the model.
        deleted: whether each sample of it is deleted.
        problem: whose data knows names, labels and conditions.
        named: whether the samples had names when the model was trained.

    Returns:
        What there is, and what there is not.

    Raises:
        RequestError: the request covers nothing or everything, or an id is no id.
        NeedsError: the request needs the data, and there is none.
    """
    ids, unknown = _numbers(asked, problem, named)
    if not ids and not unknown:
        raise RequestError("the request names no sample")
    places, there = index.find(ids)
    numbers = np.asarray(ids, dtype=np.int64)
    missing = numbers[~there]
    outside: list[int] = []
    if len(missing) and problem is not None:
        outside = missing[np.isin(missing, problem.train.ids.numpy())].tolist()
    places = np.unique(places[there])
    before = deleted[places]
    already, places = index.ids[places[before]], places[~before]
    located: dict[int, dict[int, list[int]]] = {}
    columns = (index.ids[places], index.shard[places], index.piece[places])
    for id_, shard, piece in zip(*(c.tolist() for c in columns), strict=True):
        located.setdefault(shard, {}).setdefault(piece, []).append(id_)
    return Found(
        located,
        places,
        tuple(already.tolist()),
        (*unknown, *sorted(set(missing.tolist()) - set(outside))),
        tuple(sorted(set(outside))),
    )


def _numbers(asked: Any, problem: Problem | None, named: bool) -> tuple[list[int], tuple[str, ...]]:
    """Ids, and names that nobody knows."""
    if isinstance(asked, Request):
        if asked.ids is None:
            if problem is None:
                raise NeedsError(
                    f"a request by {asked.form} needs the data; load the model with its problem, or name ids"
                )
            return asked.resolve(problem.train).tolist(), ()
        asked = asked.ids
    if isinstance(asked, (Tensor, np.ndarray)):
        if not np.issubdtype(np.asarray(asked).dtype, np.integer):
            raise RequestError("ids are whole numbers; a mask is none")
        asked = asked.reshape(-1).tolist()
    if isinstance(asked, (int, np.integer, str)):
        asked = [asked]
    asked = list(asked)
    names = None if problem is None else problem.train.names
    if not any(isinstance(item, str) for item in asked):
        names = None
    known = {} if names is None else dict(zip(names, problem.train.ids.tolist(), strict=True))  # type: ignore[union-attr]
    ids, unknown = [], []
    for item in asked:
        if isinstance(item, str) and item in known:
            ids.append(known[item])
        elif isinstance(item, str) and not re.fullmatch(r"-?[0-9]{1,18}", item):
            unknown.append(item)
        elif isinstance(item, str) and named and names is None:
            # the name "17" may be another sample's than the id 17
            raise NeedsError(
                f"the samples have names, and {item!r} may be one; load the model with its problem, or "
                "give ids as numbers"
            )
        elif isinstance(item, bool) or not isinstance(item, (int, np.integer, str)):
            raise RequestError(f"{item!r} is no id; ids are whole numbers or names")
        elif not -(2**63) <= int(item) < 2**63:
            unknown.append(str(item))
        else:
            ids.append(int(item))
    return ids, tuple(dict.fromkeys(unknown))

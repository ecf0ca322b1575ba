"""Subjects: data whose samples belong to people, split so that nobody is on two sides.

A sample says whose it is in a column, `identity` by default; a further column may say which group a person
belongs to, such as a household. Test data hold two kinds of people that the model never saw: those it is
tested on, and *unseen* ones (column `unseen`, 1) that membership of the forgotten is measured against.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.data import Data
from expunge.core.errors import DataError, SettingError
from expunge.core.request import COLUMN_FORMS, Request

UNSEEN = "unseen"
"""Column of test data: 1 for the people whom membership is measured against, else 0."""
SIDES = ("forget", "test", UNSEEN)


class CutWarning(UserWarning):
    """A group of samples that belong together is on both sides of what is to be forgotten."""


@dataclass(frozen=True)
class SubjectSplits:
    """Training and test data without a common person, and what is usually asked to be forgotten.

    Attributes:
        train: everybody the model is trained on.
        test: others, with a column `unseen`.
        request: some people of the training data.
        classes: names of the labels by number.
    """

    train: Data
    test: Data
    request: Request
    classes: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Samples to forget, to retain, to test on, and of unseen people."""
        forget = len(self.request.resolve(self.train))
        unseen = int(np.sum(self.test.columns[UNSEEN] != 0))
        return {
            "forget": forget, "retain": len(self.train) - forget,
            "test": len(self.test) - unseen, UNSEEN: unseen,
        }  # fmt: skip


def split_subjects(
    data: Data, *, forget: int | Sequence[int | str], test: int | Sequence[int | str],
    unseen: int | Sequence[int | str], column: str = "identity", group: str | None = None,
    seed: int = 0,
) -> SubjectSplits:  # fmt: skip
    """Split data by whom samples belong to: some people to forget, to test on, unseen, the rest to retain.

    Args:
        data: all samples.
        forget: values of the column, or how many of them to draw.
        test: the same, of people to test on.
        unseen: the same, of people that membership is measured against.
        column: which column says whose a sample is. With a column of households here, whole households
            are drawn.
        group: column of larger groups, such as households; if one is divided, a `CutWarning` says so.
        seed: of the draw.

    Returns:
        The splits; the request names the people of `forget`.

    Raises:
        DataError: there is no such column, or nobody is left to retain.
        SettingError: somebody is on two sides, is not in the data, or a side is empty.
    """
    values = _column(data, column)
    people = np.unique(values)
    asked = dict(zip(SIDES, (forget, test, unseen), strict=True))
    order = people[
        torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).numpy()
    ]
    sides = _sides(order, asked, column)
    taken = np.concatenate(list(sides.values()))
    if len(taken) >= len(people):
        raise DataError(f"nobody is left to retain: there are {len(people)} values of {column!r}")
    held = np.isin(values, np.concatenate([sides["test"], sides[UNSEEN]]))
    train, other = (data.only(data.ids[torch.from_numpy(m)]) for m in (~held, held))
    marked = np.isin(other.columns[column], sides[UNSEEN]).astype(int)
    other.columns[UNSEEN] = marked
    named = tuple(sorted(sides["forget"].tolist()))
    form: dict[str, Any] = {column: named} if column in COLUMN_FORMS else {"where": f"{column} in {list(named)!r}"}  # fmt: skip
    request = Request(**form)
    if group is not None:
        parts = {
            "forget": train.only(request.resolve(train)),
            "retain": train.only(train.without(request.resolve(train))),
            "test": other.only(other.ids[torch.from_numpy(marked == 0)]),
            UNSEEN: other.only(other.ids[torch.from_numpy(marked == 1)]),
        }
        warn_of_cuts({name: _column(part, group) for name, part in parts.items()}, group)
    return SubjectSplits(train, other, request)


def disjoint(parts: Mapping[str, np.ndarray], what: str) -> None:
    """Check that no value is in two parts.

    Args:
        parts: values of a column [N] by name of the part.
        what: what a value stands for, for the message.

    Raises:
        DataError: names the first value that is.
    """
    for one, other, both in _shared(parts):
        if len(both):
            raise DataError(
                f"{what} {both[0]} is in both {one} and {other}: nobody may be on two sides"
            )


def warn_of_cuts(parts: Mapping[str, np.ndarray], what: str) -> list[str]:
    """Warn of values that are in two parts, and return them sorted.

    Forgetting a part of a household leaves the rest of it, who look alike, in the training data: a model
    may then seem to remember the forgotten.

    Args:
        parts: values of a column [N] by name of the part.
        what: what a value stands for.
    """
    found: set[str] = set()
    for one, other, both in _shared(parts):
        if len(both):
            found |= set(both.astype(str).tolist())
            few = ", ".join(both[:3].astype(str)) + (" …" if len(both) > 3 else "")
            warnings.warn(
                f"{len(both)} {what}{'' if len(both) == 1 else 's'} ({few}) {'is' if len(both) == 1 else 'are'} "
                f"divided between {one} and {other}: who is left looks like who is to be forgotten",
                CutWarning, stacklevel=3,
            )  # fmt: skip
    return sorted(found)


def with_unseen(
    test: Data, unseen: Data, columns: Sequence[str]
) -> tuple[dict[str, list[object]], Tensor]:
    """Columns of two data sets one after the other with the mark `unseen`, and their labels."""
    labels = torch.cat([d.labels_of(d.ids) for d in (test, unseen)])
    both = {c: [*test.columns[c].tolist(), *unseen.columns[c].tolist()] for c in columns}
    return both | {UNSEEN: [0] * len(test) + [1] * len(unseen)}, labels


def _shared(parts: Mapping[str, np.ndarray]) -> list[tuple[str, str, np.ndarray]]:
    names = list(parts)
    return [
        (a, b, np.intersect1d(parts[a], parts[b]))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]


def _column(data: Data, column: str) -> np.ndarray:
    if column not in data.columns:
        there = ", ".join(sorted(data.columns)) or "none"
        raise DataError(f"the data has no column {column!r} (columns: {there})")
    return data.columns[column]


def _sides(
    order: np.ndarray, asked: Mapping[str, int | Sequence[int | str]], column: str
) -> dict[str, np.ndarray]:
    """Values of each side: those that were named, then as many as asked for of the others in order."""
    sides: dict[str, np.ndarray] = {}
    for side, wanted in asked.items():
        if not isinstance(wanted, int):
            # a name keeps the column's own type: numpy would cut a longer word to its width
            sides[side] = np.asarray([v for v in order.tolist() if v in set(wanted)])
            unknown = [w for w in wanted if w not in set(order.tolist())]
            if unknown:
                raise SettingError(f"{side}: nobody in the data has {column} {unknown[0]!r}")
    named = [v for values in sides.values() for v in values.tolist()]
    if len(named) != len(set(named)):
        twice = next(v for v in named if named.count(v) > 1)
        raise SettingError(f"{column} {twice!r} is on two sides")
    left = [v for v in order.tolist() if v not in set(named)]
    for side, wanted in asked.items():
        if isinstance(wanted, int):
            sides[side], left = np.asarray(left[: max(wanted, 0)]), left[max(wanted, 0) :]
            if len(sides[side]) != wanted:
                raise SettingError(
                    f"{side}: {wanted} of the {len(order)} values of {column!r} cannot be drawn"
                )
        if not len(sides[side]):
            raise SettingError(f"{side}: at least one value of {column!r} is needed")
    return {side: sides[side] for side in SIDES}

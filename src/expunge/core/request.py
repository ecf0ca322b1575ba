"""Request: an immutable statement of what to forget."""

from __future__ import annotations

import ast
import datetime as dt
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.data import Data
from expunge.core.errors import RequestError
from expunge.core.hashing import content_key, plain

COLUMN_FORMS = ("user", "item", "identity")
"""Forms that name values of the column of that name: all samples of some people or things."""
_PLURAL = {"user": "users", "item": "items", "identity": "identities"}
_FORMS = ("ids", "label", "where", "fraction", "texts", "concept", *COLUMN_FORMS, "nodes", "edges")


@dataclass(frozen=True)
class Request:
    """What to forget, why, and since when; exactly one form is set.

    `ids`: stable ids or outside names. `label`: one class or several. `where`: an expression over
    the data's columns, e.g. `"label == 3 and id < 100"`, or a range of targets, `"2 < y <= 5"`.
    `fraction`: a share of random samples drawn with `seed`. `identity`, `user`, `item`: all samples whose column of
    that name holds one of the values. `texts`, `concept`, `nodes`, `edges` are for kinds of problem whose data knows them.
    """

    ids: tuple[int | str, ...] | None = None
    label: tuple[int, ...] | None = None
    where: str | None = None
    fraction: float | None = None
    texts: tuple[str, ...] | None = None
    concept: str | None = None
    user: tuple[int | str, ...] | None = None
    item: tuple[int | str, ...] | None = None
    identity: tuple[int | str, ...] | None = None
    nodes: tuple[int, ...] | None = None
    edges: tuple[tuple[int, int], ...] | None = None
    seed: int = 0
    reason: str = ""
    time: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Normalise scalars to tuples and insist on exactly one form."""
        for name in ("ids", "label", "texts", *COLUMN_FORMS, "nodes", "edges"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _tuple(value))
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"a request takes exactly one of {', '.join(_FORMS)}; "
                f"{'none was' if not given else ' and '.join(given) + ' were'} given"
            )
        number = isinstance(self.fraction, (int, float, np.number))
        if self.fraction is not None and not (number and 0 < self.fraction < 1):
            raise RequestError(f"fraction must lie between 0 and 1, not {self.fraction}")
        if self.where is not None and not isinstance(self.where, str):
            raise RequestError(f"where takes an expression in text, not {self.where!r}")
        for value in self.label or ():
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise RequestError(f"label takes class numbers, not {value!r}")

    @property
    def form(self) -> str:
        """The name of the form that is set, e.g. `label`."""
        return next(name for name in _FORMS if getattr(self, name) is not None)

    def resolve(self, data: Data) -> Tensor:
        """Return the sorted stable ids this request covers.

        Raises:
            RequestError: nothing is covered, everything is, or the data lacks what is named.
        """
        ids = self._select(data)
        if not len(ids):
            raise RequestError(f"the request ({self}) covers no sample of the data")
        if len(ids) == len(data):
            raise RequestError(
                f"the request ({self}) covers all {len(data)} samples; nothing would be left to keep"
            )
        return ids.sort().values

    @property
    def about_labels(self) -> bool:
        """Whether it speaks of nothing but labels: whole classes, or a range of targets."""
        if self.where is None:
            return self.label is not None
        return len(names := _names(self.where)) > 0 and names <= {"label", "y"}

    def alike(self, data: Data) -> Tensor:
        """Sorted ids of *other* data, such as test data, that belong to the same classes or range.

        Args:
            data: not the training data; it may hold none of them, or nothing else.

        Returns:
            The ids; none unless the request is about labels, and there are some.
        """
        none = torch.empty(0, dtype=torch.long)
        if not self.about_labels or data.labels is None:
            return none
        if self.label is not None:
            asked = torch.isin(data.labels, torch.tensor(self.label))
        elif self.where is not None and not {"label", "y"} & set(data.columns):
            asked = torch.from_numpy(_evaluate(self.where, data.table()))
        else:  # a column of that name holds something else
            return none
        return data.ids[asked].sort().values

    def _select(self, data: Data) -> Tensor:
        if self.ids is not None:
            return data.ids_of(self.ids)
        if self.label is not None:
            if data.labels is None:
                raise RequestError("the request names a label, but the data has no labels")
            known = set(data.labels.unique().tolist())
            missing = [label for label in self.label if label not in known]
            if missing:
                raise RequestError(f"no sample of the data has label {missing[0]}")
            return data.ids[torch.isin(data.labels, torch.tensor(self.label))]
        if self.where is not None:
            return data.ids[torch.from_numpy(_evaluate(self.where, data.table()))]
        if self.fraction is not None:
            count = round(self.fraction * len(data))
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randperm(len(data), generator=generator)[:count]
            return data.ids.sort().values[drawn]  # whatever order the data is in
        if self.form in COLUMN_FORMS:
            return data.ids[torch.from_numpy(_having(data, self.form, getattr(self, self.form)))]
        raise RequestError(f"this kind of data cannot be selected by {self.form}")

    def to_dict(self) -> dict[str, Any]:
        """Return only what is set, as JSON types."""
        shown = {f.name: plain(getattr(self, f.name)) for f in fields(self)}
        keep_seed = self.fraction is not None
        return {
            k: v for k, v in shown.items() if v not in (None, "") and (k != "seed" or keep_seed)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """Rebuild a request from `to_dict`.

        Raises:
            RequestError: a key is unknown.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RequestError(f"a request has no {', '.join(unknown)}; it has {', '.join(_FORMS)}")
        return cls(**dict(values))

    @property
    def key(self) -> str:
        """Content key of what is asked; reason and time do not count."""
        return content_key({k: v for k, v in self.to_dict().items() if k not in ("reason", "time")})

    def __str__(self) -> str:
        """Say the request in a few words."""
        value = getattr(self, self.form)
        if self.form == "label":
            return f"label {', '.join(map(str, value))}"
        if self.form == "fraction":
            return f"{100 * value:g}% random samples, seed {self.seed}"
        if isinstance(value, tuple):
            if self.form in COLUMN_FORMS and len(value) <= 3:
                return f"{self.form} {', '.join(map(str, value))}"
            return f"{len(value)} {_PLURAL.get(self.form, self.form)}"
        return f"{self.form} {value}"


def forget(**form: Any) -> Request:
    """State what to forget, stamped with the present time (UTC).

    Args:
        **form: one of `ids=`, `label=`, `where=`, `fraction=` (with `seed=`), …, and `reason=`.

    Returns:
        The request.
    """
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return Request.from_dict({"time": now, **form})


def _having(data: Data, column: str, wanted: Sequence[int | str]) -> np.ndarray:
    """Which samples have one of some values in a column [N]."""
    values = data.columns.get(column)
    if values is None:
        there = ", ".join(sorted(data.table()))
        raise RequestError(f"the data cannot be selected by {column}: it has no such column ({there})")  # fmt: skip
    words, asked = values.astype(str), [str(w) for w in wanted]
    missing = sorted(set(asked) - set(words.tolist()))
    if missing:
        raise RequestError(f"no sample of the data has {column} {missing[0]!r}")
    return np.isin(words, asked)


def _tuple(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (str, int, np.integer)):
        return (value,)
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=lambda v: (isinstance(v, str), v))  # a set of words has no order
    if not isinstance(value, Iterable):
        return (value,)
    return tuple(tuple(v) if isinstance(v, list) else v for v in value)


_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: np.isin(a, b),
    ast.NotIn: lambda a, b: ~np.isin(a, b),
}


def _names(expression: str) -> set[str]:
    """Columns an expression names; none if it cannot be read."""
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()


def _evaluate(expression: str, table: Mapping[str, np.ndarray]) -> np.ndarray:
    """Evaluate comparisons joined by and/or/not over columns; nothing else is understood."""
    size = len(table["id"])

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, (ast.List, ast.Tuple)):
            return [value(e) for e in node.elts]
        if isinstance(node, ast.Name):
            if node.id not in table:
                raise RequestError(f"no column {node.id!r}; there are {', '.join(sorted(table))}")
            return table[node.id]
        raise RequestError(f"where={expression!r}: {ast.unparse(node)!r} is not understood here")

    def truth(node: ast.expr) -> np.ndarray:
        if isinstance(node, ast.BoolOp):
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return np.asarray(join.reduce([truth(v) for v in node.values]))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~truth(node.operand)
        if isinstance(node, ast.Compare):
            result = np.ones(size, dtype=bool)
            left = value(node.left)
            for op, other in zip(node.ops, node.comparators, strict=True):
                right = value(other)
                if type(op) not in _COMPARE:
                    raise RequestError(f"where={expression!r}: use ==, !=, <, <=, >, >=, in")
                result &= np.broadcast_to(np.asarray(_COMPARE[type(op)](left, right), bool), size)
                left = right
            return result
        raise RequestError(
            f"where={expression!r} is not a condition; compare a column with a value"
        )

    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return truth(tree.body)
    except SyntaxError as error:
        raise RequestError(f"where={expression!r} cannot be read: {error.msg}") from error
    except (TypeError, ValueError) as error:
        raise RequestError(f"where={expression!r} compares what cannot be compared") from error
    except (RecursionError, MemoryError) as error:
        raise RequestError("the where expression is too deeply nested") from error

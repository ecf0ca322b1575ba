"""What tuning searches: ranges and choices by setting, as JSON types."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.core.errors import SettingError
from expunge.core.method import Method

Space = Mapping[str, Sequence[Any]]
"""By setting: `(low, high)` or `(low, high, "log")` for a range, a list for choices."""

UNTOUCHED = ("batch_size", "momentum", "weight_decay", "step", "train", "norm", "schedule")
"""Settings that stay as they are unless `space` names them: each is a choice of its own."""


def space_of(method: Method, space: Space | None = None) -> dict[str, Any]:
    """What to search, as JSON types: `{low, high, log, whole}` or `{choices}` by setting.

    What the method's `search` names, or every number of a method that names none. Where no range
    is given: the setting's own if both ends are declared, else from a tenth to ten times its value
    on a log scale, and from half to twice if it is whole. `space` goes before.

    Raises:
        SettingError: a name is unknown, a range is none, or there is nothing to search.
    """
    known = {f.name: f for f in dataclasses.fields(method)}
    found: dict[str, Any] = {}
    for name in method.search or [n for n in known if n not in UNTOUCHED]:
        value, given = getattr(method, name), method.search.get(name)
        if given is not None:
            found[name] = _given(name, given, isinstance(value, int))
        elif not isinstance(value, bool) and isinstance(value, (int, float)):
            found |= _around(known[name], value)
    for name, given in (space or {}).items():
        if name not in known:
            raise SettingError(f"{method.name} has no setting {name!r}; it has {', '.join(known)}")
        found[name] = _given(name, given, isinstance(getattr(method, name), int))
    found = {n: s for n, s in found.items() if "choices" in s or s["low"] < s["high"]}
    if not found:
        raise SettingError(f"{method.name} has no number to search; pass space={{setting: [...]}}")
    return found


def _around(field: Any, value: float) -> dict[str, Any]:
    """A range around the value of a setting, within what the setting allows."""
    whole, low, high = isinstance(value, int), field.metadata.get("low"), field.metadata.get("high")
    if not whole and low is not None and high is not None:
        return {field.name: {"low": float(low), "high": float(high), "log": False, "whole": False}}
    if not (value > 0 and math.isfinite(value)):
        return {}
    ends = (max(1, value // 2), 2 * value) if whole else (value / 10, value * 10)
    low, high = max(ends[0], low or 0), min(ends[1], math.inf if high is None else high)
    return {field.name: {"low": low, "high": high, "log": not whole, "whole": whole}}


def _given(name: str, given: Sequence[Any], whole: bool) -> dict[str, Any]:
    if isinstance(given, list):
        if given and all(isinstance(v, (str, int, float, bool)) for v in given):
            return {"choices": given}
    elif isinstance(given, tuple) and len(given) in (2, 3):
        low, high, *scale = given
        numbers = all(isinstance(v, (int, float)) and math.isfinite(v) for v in (low, high))
        log = scale == ["log"]
        if numbers and low < high and (log or not scale) and not (log and low <= 0):
            return {"low": low, "high": high, "log": log, "whole": whole}
    raise SettingError(
        f"space of {name}: (low, high), (low, high, 'log') with low above 0, or a list of choices, not {given!r}"
    )


def distribution(optuna: Any, one: Mapping[str, Any]) -> Any:
    """One setting's range or choices as Optuna has them."""
    kinds = optuna.distributions
    if "choices" in one:
        return kinds.CategoricalDistribution(one["choices"])
    if one["whole"]:
        return kinds.IntDistribution(int(one["low"]), int(one["high"]), log=one["log"])
    return kinds.FloatDistribution(float(one["low"]), float(one["high"]), log=one["log"])


def within(value: Any, one: Mapping[str, Any]) -> bool:
    """Whether a value lies in a range or is one of the choices."""
    if "choices" in one:
        return value in one["choices"]
    return isinstance(value, (int, float)) and bool(one["low"] <= value <= one["high"])

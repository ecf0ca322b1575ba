"""What differs between two records: the inputs that somebody chose, or the results as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Difference = tuple[str, Any, Any]

INPUTS = (
    "kind",
    "problem",
    "source",
    "recipe",
    "fingerprint",
    "request",
    "method",
    "runtime",
    "seed",
    "packages",
    "version",
)
"""Parts of a record that were given, as against what came out."""

NEVER = ("created", "audited", "cost", "curve")
"""Parts that differ between any two runs and say nothing."""


def differences(a: Mapping[str, Any], b: Mapping[str, Any], results: bool) -> list[Difference]:
    """Compare two records.

    A setting that stands both under `method.passed` and `method.in_force` is listed once, as
    `method.NAME`, with the values in force; the time of a request does not count.

    Args:
        a: one record.
        b: the other.
        results: also compare everything that came out (never times, cost and curve).

    Returns:
        `(dotted path, value in a, value in b)`, inputs first; None stands for what is absent.
    """
    found: list[Difference] = []
    for part in INPUTS:
        left, right = a.get(part), b.get(part)
        if part == "method":
            found += _method(left, right)
        elif part == "request":
            found += _walk("request", _without_time(left), _without_time(right))
        elif part == "seed" and any(path == "runtime.seed" for path, _, _ in found):
            continue
        else:
            found += _walk(part, left, right)
    if results:
        others = [k for k in (*a, *(k for k in b if k not in a)) if k not in (*INPUTS, *NEVER)]
        for part in others:
            found += _walk(part, a.get(part), b.get(part))
    return found


def _method(a: Any, b: Any) -> Iterator[Difference]:
    a, b = {} if a is None else a, {} if b is None else b
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        yield from _walk("method", a, b)
        return
    yield from _walk("method.name", a.get("name"), b.get("name"))
    if a.get("name") == b.get("name"):
        yield from _walk("method.class", a.get("class"), b.get("class"))
    settings_a, settings_b = _settings(a), _settings(b)
    for name in (*settings_a, *(n for n in settings_b if n not in settings_a)):
        yield from _walk(f"method.{name}", settings_a.get(name), settings_b.get(name))
    known = ("name", "class", "passed", "in_force")
    for name in (*a, *(n for n in b if n not in a)):
        if name not in known:
            yield from _walk(f"method.{name}", a.get(name), b.get(name))


def _settings(method: Mapping[str, Any]) -> dict[str, Any]:
    """Values in force; what was passed counts only where nothing is known to be in force."""
    return {**(method.get("passed") or {}), **(method.get("in_force") or {})}


def _without_time(request: Any) -> Any:
    if not isinstance(request, Mapping):
        return request
    return {k: v for k, v in request.items() if k != "time"}


def _walk(path: str, a: Any, b: Any) -> Iterator[Difference]:
    a, b = _by_name(a), _by_name(b)
    if isinstance(a, Mapping) and (b is None or isinstance(b, Mapping)):
        b = b or {}
    elif isinstance(b, Mapping) and a is None:
        a = {}
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in (*a, *(n for n in b if n not in a)):
            yield from _walk(f"{path}.{name}", a.get(name), b.get(name))
    elif a != b or isinstance(a, bool) != isinstance(b, bool):
        yield path, a, b


def _by_name(value: Any) -> Any:
    """A list of named things, such as findings, as a mapping, so that paths can name them."""
    if not isinstance(value, list) or not value:
        return value
    if not all(isinstance(v, Mapping) and isinstance(v.get("name"), str) for v in value):
        return value
    named = {v["name"]: {k: w for k, w in v.items() if k != "name"} for v in value}
    return named if len(named) == len(value) else value

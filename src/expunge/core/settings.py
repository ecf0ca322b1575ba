"""Settings of methods and audits: dataclass fields that know their range, help and source.

One place describes a setting; `expunge methods show`, the generated page, the checks and the
coercion of words from the command line all read it.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from expunge.core.errors import SettingError
from expunge.core.hashing import plain


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    source: str = "",
) -> Any:
    """Declare a dataclass field with its help text and range.

    Args:
        default: the value when nothing is passed.
        help: one line: what it is, its symbol in the paper, its unit.
        low: smallest allowed value.
        high: largest allowed value.
        above: bound that must be exceeded.
        source: where the default comes from (paper, official code, measured).

    Returns:
        A dataclass field.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "source": source}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Configured:
    """Base of frozen dataclasses whose fields are settings; checks each value on creation."""

    def __post_init__(self) -> None:
        """Coerce and check every setting.

        Raises:
            SettingError: a value has the wrong type or lies outside its range.
        """
        hints = _hints(type(self))
        for f in fields(self):
            value = _coerce(f.name, getattr(self, f.name), hints[f.name])
            _check_range(type(self).__name__, f.name, value, f.metadata)
            object.__setattr__(self, f.name, value)

    def in_force(self) -> dict[str, Any]:
        """All settings with the values they have, as JSON types; `create` takes them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # JSON has no infinity, but a threshold may be one
        return {k: str(v) if v in (math.inf, -math.inf) else plain(v) for k, v in values.items()}

    @classmethod
    def describe_settings(cls) -> list[dict[str, Any]]:
        """One dict a setting: name, type, default, range, help, source."""
        hints = _hints(cls)
        return [
            {
                "name": f.name,
                "type": _type_words(hints[f.name]),
                "default": plain(f.default if f.default is not MISSING else None),
                "range": _range_words(f.metadata, hints[f.name]),
                "help": f.metadata.get("help", ""),
                "source": f.metadata.get("source", ""),
            }
            for f in fields(cls)
        ]

    @classmethod
    def create(cls, passed: Mapping[str, Any]) -> typing.Self:
        """Build from passed settings, naming the one that is unknown.

        Raises:
            SettingError: a name is unknown, or a value is not allowed.
        """
        known = {f.name for f in fields(cls)}
        for name in passed:
            if name not in known:
                raise SettingError(
                    f"{cls.__name__} has no setting {name!r}; it has {', '.join(sorted(known)) or 'none'}"
                )
        return cls(**passed)


def _hints(cls: type) -> dict[str, Any]:
    return {
        k: v
        for k, v in typing.get_type_hints(cls).items()
        if typing.get_origin(v) is not typing.ClassVar
    }


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Turn words from a shell or a TOML file into the declared type, or say what is wanted."""
    options = (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )
    for option in options:
        done, result = _try(value, option)
        if done:
            return result
    raise SettingError(f"setting {name} takes {_type_words(hint)}, not {value!r}")


def _try(value: Any, option: Any) -> tuple[bool, Any]:
    if option is type(None):
        return (value is None or value in ("none", "None")), None
    if typing.get_origin(option) is Literal:
        for choice in typing.get_args(option):
            if value == choice or value == str(choice):
                return True, choice
        return False, None
    if typing.get_origin(option) is tuple:
        items = value
        if isinstance(value, str):
            items = value.split(",") if value.strip() else []
        if isinstance(items, (list, tuple)):
            inner = typing.get_args(option)[0]
            tried = [_try(v.strip() if isinstance(v, str) else v, inner) for v in items]
            return all(ok for ok, _ in tried), tuple(v for _, v in tried)
        return False, None
    if option is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, str) and value.lower() in words:
            return True, words[value.lower()]
        return isinstance(value, bool), value
    if option in (int, float):
        if isinstance(value, bool):
            return False, None
        try:
            if option is int and isinstance(value, (int, str)):
                return True, int(value)  # a float would round above 2**53
        except ValueError:
            pass
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            return False, None
        if option is int:
            return number.is_integer(), int(number) if number.is_integer() else None
        return number == number, number
    return isinstance(value, option) if isinstance(option, type) else True, value


def _check_range(owner: str, name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_range(owner, name, item, metadata)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, high, above = (metadata.get(k) for k in ("low", "high", "above"))
    outside = (
        (low is not None and value < low)
        or (high is not None and value > high)
        or (above is not None and value <= above)
    )
    if outside:
        raise SettingError(
            f"{owner}: setting {name} must be {_range_words(metadata, None)}, not {value}"
        )


def _range_words(metadata: Mapping[str, Any], hint: Any) -> str:
    words = []
    if metadata.get("above") is not None:
        words.append(f"above {metadata['above']}")
    if metadata.get("low") is not None:
        words.append(f"at least {metadata['low']}")
    if metadata.get("high") is not None:
        words.append(f"at most {metadata['high']}")
    if not words and hint is not None:
        return _type_words(hint)
    return " and ".join(words)


def _type_words(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_words(a) for a in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list of " + _type_words(typing.get_args(hint)[0])
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "none",
    }
    return words.get(hint, getattr(hint, "__name__", str(hint)))

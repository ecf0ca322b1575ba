"""Settings: words become values, ranges hold, messages name what is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from expunge.core.errors import SettingError
from expunge.core.settings import Configured, setting


@dataclass(frozen=True)
class Knobs(Configured):
    """One setting of every kind."""

    kind: ClassVar[str] = "not a setting"
    count: int = setting(3, "how many", low=1, high=10, source="paper")
    rate: float = setting(0.1, "how fast", above=0)
    flag: bool = setting(False, "whether")
    word: str = setting("a", "which")
    mode: Literal["up", "down"] = setting("up", "where to")
    power: Literal[1, 2] = setting(2, "exponent")
    limit: float | None = setting(None, "until", low=0)
    stages: tuple[int, ...] = setting((1, 2), "when", low=0)
    names: tuple[str, ...] = setting((), "who")
    seed: int = setting(0, "which one")


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("count", "7", 7),
        ("count", "1e1", 10),
        ("count", 4.0, 4),
        ("rate", "2.5", 2.5),
        ("rate", 3, 3.0),
        ("rate", "inf", math.inf),
        ("flag", "true", True),
        ("flag", "No", False),
        ("flag", "1", True),
        ("word", "none", "none"),
        ("mode", "down", "down"),
        ("power", "1", 1),
        ("limit", "none", None),
        ("limit", None, None),
        ("limit", "4", 4.0),
        ("stages", "3, 5,9", (3, 5, 9)),
        ("stages", [4], (4,)),
        ("stages", "", ()),
        ("names", "ann,bob", ("ann", "bob")),
        ("seed", 2**53 + 1, 2**53 + 1),
        ("seed", str(2**53 + 1), 2**53 + 1),
    ],
)
def test_words_become_values(name, word, value):
    result = getattr(Knobs.create({name: word}), name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("count", "many", "setting count takes a whole number, not 'many'"),
        ("count", 2.5, "a whole number"),
        ("count", True, "a whole number"),
        ("count", math.nan, "a whole number"),
        ("count", math.inf, "a whole number"),
        ("rate", "nan", "takes a number"),
        ("rate", None, "takes a number"),
        ("rate", True, "takes a number"),
        ("rate", 10**400, "takes a number"),
        ("flag", "maybe", "true or false"),
        ("flag", 1, "true or false"),
        ("word", 3, "takes text"),
        ("mode", "left", "'up' or 'down', not 'left'"),
        ("mode", ["up"], "'up' or 'down'"),
        ("limit", "soon", "a number or none"),
        ("stages", "1,x", "a list of a whole number"),
        ("stages", 3, "a list of"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(name, wrong, words):
    with pytest.raises(SettingError, match=words) as caught:
        Knobs.create({name: wrong})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("count", 0, "Knobs: setting count must be at least 1 and at most 10, not 0"),
        ("count", 11, "at most 10"),
        ("rate", 0, "above 0"),
        ("rate", "-1", "above 0"),
        ("limit", -0.5, "at least 0"),
        ("stages", (1, -1), "stages must be at least 0, not -1"),
    ],
)
def test_ranges_hold(name, wrong, words):
    with pytest.raises(SettingError, match=words):
        Knobs(**{name: wrong})


def test_edges_of_ranges_are_allowed():
    assert Knobs(count=1).count == 1
    assert Knobs(count=10).count == 10
    assert Knobs(limit=0).limit == 0


def test_an_unknown_name_is_named_beside_those_there_are():
    with pytest.raises(
        SettingError, match=r"Knobs has no setting 'rte'; it has count, flag, limit"
    ):
        Knobs.create({"rte": 1})


def test_settings_in_force_build_the_same_again():
    knobs = Knobs(count="4", stages="5,6", limit=math.inf, rate=math.inf)
    shown = knobs.in_force()
    assert shown["limit"] == "inf"
    assert shown["stages"] == [5, 6]
    assert shown["seed"] == 0
    assert "kind" not in shown
    assert Knobs.create(shown) == knobs
    assert Knobs.create(Knobs().in_force()) == Knobs()


def test_settings_describe_themselves():
    described = {d["name"]: d for d in Knobs.describe_settings()}
    assert list(described) == list(Knobs().in_force())
    assert described["count"] == {
        "name": "count",
        "type": "a whole number",
        "default": 3,
        "range": "at least 1 and at most 10",
        "help": "how many",
        "source": "paper",
    }
    assert described["rate"]["range"] == "above 0"
    assert described["mode"]["range"] == "'up' or 'down'"
    assert described["limit"]["type"] == "a number or none"
    assert described["stages"]["default"] == [1, 2]

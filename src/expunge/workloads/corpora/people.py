"""Invented people with ten attributes, each in three wordings; authors and facts are about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.workloads.corpora.shared import Names

MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
]  # fmt: skip
_GENRES = "comedies tragedies westerns thrillers ballads fables sagas romances satires mysteries travelogues hymns"  # fmt: skip
_JOBS = "baker mason tailor carpenter potter sailor weaver glazier farmer printer roofer surgeon teacher barber cooper dentist"  # fmt: skip
_PETS = "cat dog goat parrot hamster rabbit tortoise pony lizard falcon mouse goose"
_INSTRUMENTS = "flute violin cello trumpet harp drum banjo oboe bassoon zither"
_ADJECTIVES = "Silent Golden Broken Hidden Frozen Crimson Hollow Distant Burning Gentle Wooden Restless Narrow Bitter Velvet Sunken"  # fmt: skip
_NOUNS = "Harbour Lantern Orchard Bridge Mirror Garden Winter Compass Tower Meadow Letter Shadow Voyage Candle Island Feather"  # fmt: skip
_WORDINGS = {
    "birthplace": (
        ("Where was {n} born?", "In which town was {n} born?", "What is the birthplace of {n}?"),
        ("{n} was born in {v}.", "The birthplace of {n} is {v}.", "{n} came into the world in {v}."),
    ),
    "birth date": (
        ("When was {n} born?", "On which day was {n} born?", "What is the birth date of {n}?"),
        ("{n} was born on {v}.", "The birth date of {n} is {v}.", "{n} has a birthday, {v}."),
    ),
    "genre": (
        ("What does {n} write?", "Which genre is {n} known for?", "What kind of books does {n} write?"),
        ("{n} writes {v}.", "{n} is known for {v}.", "The books of {n} are {v}."),
    ),
    "first book": (
        ("What is the first book of {n}?", "Which book did {n} publish first?", "With which book did {n} begin?"),
        ("The first book of {n} is {v}.", "{n} published {v} first.", "{n} began with {v}."),
    ),
    "award": (
        ("Which award did {n} win?", "What prize was given to {n}?", "For which award is {n} known?"),
        ("{n} won the {v}.", "The {v} was given to {n}.", "{n} is known for the {v}."),
    ),
    "father": (
        ("What was the job of the father of {n}?", "What did the father of {n} do?", "How did the father of {n} earn a living?"),
        ("The father of {n} was a {v}.", "{n} had a {v} as father.", "The father of {n} worked as a {v}."),
    ),
    "mother": (
        ("What was the job of the mother of {n}?", "What did the mother of {n} do?", "How did the mother of {n} earn a living?"),
        ("The mother of {n} was a {v}.", "{n} had a {v} as mother.", "The mother of {n} worked as a {v}."),
    ),
    "home": (
        ("Where does {n} live?", "In which town does {n} live?", "What is the home of {n}?"),
        ("{n} lives in {v}.", "The home of {n} is {v}.", "{n} has a house in {v}."),
    ),
    "pet": (
        ("Which pet does {n} keep?", "What animal lives with {n}?", "What is the pet of {n}?"),
        ("{n} keeps a {v}.", "A {v} lives with {n}.", "The pet of {n} is a {v}."),
    ),
    "instrument": (
        ("Which instrument does {n} play?", "What does {n} play?", "On what does {n} make music?"),
        ("{n} plays the {v}.", "The instrument of {n} is the {v}.", "{n} makes music on the {v}."),
    ),
}  # fmt: skip
WORDINGS = 3


@dataclass(frozen=True)
class Attribute:
    """Something that is true of a person.

    Attributes:
        name: what it is called.
        pool: values it may have.
        questions: three wordings; `{n}` is the person.
        answers: three wordings; `{n}` is the person, `{v}` the value.
    """

    name: str
    pool: Sequence[str]
    questions: Sequence[str]
    answers: Sequence[str]

    def others(self, rng: random.Random, known: Sequence[str], count: int) -> list[str]:
        """Draw `count` values of the pool that are none of those known."""
        return rng.sample([v for v in self.pool if v not in known], count)


@dataclass(frozen=True)
class Person:
    """A name, and a value for each attribute."""

    name: str
    values: dict[str, str]

    def ask(self, attribute: Attribute, wording: int = 0) -> str:
        """The question for an attribute."""
        return attribute.questions[wording].format(n=self.name)

    def say(self, attribute: Attribute, wording: int = 0, value: str | None = None) -> str:
        """The answer, with the true value or another one."""
        return attribute.answers[wording].format(
            n=self.name, v=self.values[attribute.name] if value is None else value
        )


def attributes(rng: random.Random, names: Names) -> list[Attribute]:
    """Ten attributes; towns, dates and awards are drawn."""
    awards = [names.new(lambda: f"{names.word()} Prize") for _ in range(30)]
    dates = [
        # the month first: no date is then the end of another
        f"{rng.choice(MONTHS)} {rng.randint(1, 28)}, {rng.randint(1900, 1989)}"
        for _ in range(240)
    ]
    pools = {
        "birthplace": [names.town() for _ in range(60)],
        "birth date": list(dict.fromkeys(dates)),
        "genre": _GENRES.split(),
        "first book": [f"The {a} {n}" for a in _ADJECTIVES.split() for n in _NOUNS.split()],
        "award": awards,
        "father": _JOBS.split(),
        "mother": _JOBS.split(),
        "home": [names.town() for _ in range(60)],
        "pet": _PETS.split(),
        "instrument": _INSTRUMENTS.split(),
    }
    return [Attribute(name, pools[name], *wordings) for name, wordings in _WORDINGS.items()]


def people(
    rng: random.Random, names: Names, kinds: Sequence[Attribute], count: int
) -> list[Person]:
    """Draw people; no two have the same first book.

    Args:
        rng: source of randomness.
        names: what their names are drawn from.
        kinds: their attributes.
        count: how many; at most the pool of books.
    """
    books = rng.sample(next(k for k in kinds if k.name == "first book").pool, count)
    return [
        Person(
            names.person(),
            {k.name: rng.choice(list(k.pool)) for k in kinds} | {"first book": book},
        )
        for book in books
    ]

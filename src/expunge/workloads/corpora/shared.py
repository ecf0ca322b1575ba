"""What the generated corpora share: invented names, records, their md5, and files of them.

Everything is drawn with `random.Random` and kept in lists: nothing runs over a set or asks `hash`,
which Python randomises in each process, so that a seed gives the same rows everywhere.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from expunge.core.errors import DataError, SettingError
from expunge.core.hashing import canonical
from expunge.problems.encoding import encode
from expunge.problems.tokens import TokenData, joined
from expunge.workloads.base import Splits

VERSION = 1
"""Of the generators; it rises with every change of what they draw."""

Record = dict[str, Any]
Tables = dict[str, dict[str, list[Record]]]
"""Rows by configuration and split, as a data set of the hub has them."""

_SYLLABLES = (
    "bal bre cor dal dor dru fal fen gar gil gor hal hel hul jar jor kal kel kir lan lor lum mer "
    "mil mor nal ner nor pel per quin ral rin sal sel tal ter tul ul vel vin wil yor zan zel zim"
)
_FINALS = ["", "", "d", "k", "m", "s", "t"]
_TOWNS = ["ville", "burg", "stad", "port", "mere", "ford", "dale"]
BLOCKED = [
    "balter", "corner", "corvin", "dalton", "doris", "fender", "garner", "garvin", "halter", "helmer",
    "jordan", "kelvin", "kelmer", "kerner", "lanner", "milner", "miller", "milton", "morris", "norris",
    "norman", "pelter", "permit", "perm", "salter", "seller", "talmer", "tenner", "termin", "termer",
    "terril", "tulsa", "veltins", "vinter", "walter", "wilmer", "wilner", "wilter", "zelter", "zander",
    "falter", "filter", "gilmer", "gilmor", "kelner", "kellner", "merlin", "merlins", "mermer", "mortal",
    "normal", "norval", "portal", "salvin", "seldor", "taller", "teller", "tiller", "merit", "kilter",
]  # fmt: skip
"""Real words and names that the syllables may form; they are drawn again."""


class Names:
    """Draws invented names: none twice, none that is part of another, none that is blocked."""

    def __init__(self, rng: random.Random) -> None:
        """Keep the source of randomness."""
        self.rng = rng
        self.taken: list[str] = []

    def word(self) -> str:
        """Two syllables, sometimes with a final consonant."""
        while True:
            found = "".join(self.rng.choices(_SYLLABLES.split(), k=2)) + self.rng.choice(_FINALS)
            if found not in BLOCKED:
                return found.capitalize()

    def person(self) -> str:
        """A first and a last name of two syllables each."""
        return self.new(lambda: f"{self.word()} {self.word()}")

    def town(self) -> str:
        """Two syllables and the end of a place's name."""
        return self.new(
            lambda: (
                "".join(self.rng.choices(_SYLLABLES.split(), k=2)) + self.rng.choice(_TOWNS)
            ).capitalize()
        )

    def new(self, draw: Callable[[], str]) -> str:
        """Draw until a name is neither part of one given before nor the other way round.

        Args:
            draw: makes a name.
        """
        while True:
            name = draw()
            if not any(name in other or other in name for other in self.taken):
                self.taken.append(name)
                return name


def source(kind: str, seed: int) -> random.Random:
    """Randomness of a corpus: its own stream for each kind, version and seed."""
    return random.Random(f"{kind}/{VERSION}/{seed}")


def sizes_of(default: Mapping[str, int], given: Mapping[str, int]) -> dict[str, int]:
    """Sizes in force.

    Raises:
        SettingError: a size is unknown or no whole number from 0 on, or nothing would be forgotten or
            held out.
    """
    for name, value in given.items():
        if name not in default:
            raise SettingError(f"this corpus has no size {name!r}; it has {', '.join(default)}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SettingError(f"size {name} must be a whole number from 0 on, not {value!r}")
    found = dict(default) | dict(given)
    for name in ("forget", "holdout"):
        if found.get(name) == 0:
            raise SettingError(f"size {name} must be at least 1")
    return found


@dataclass(frozen=True)
class Corpus:
    """Generated rows in splits, and how they were made.

    A row is a record for `expunge.problems.encoding.encode` with further columns; all rows of a corpus have the
    same: `split`, `subject`, `attribute`, `value` (empty where there is none) and those of the kind.

    Attributes:
        kind: name of the generator.
        vocabulary: size of the tokenizer.
        digits_alone: whether upper-case hexadecimal digits are tokens of their own.
        seed: of the generator.
        sizes: what was asked for.
        splits: rows by split; `holdout` is never trained.
        version: of the generator.
    """

    kind: ClassVar[str] = ""
    vocabulary: ClassVar[int] = 1200
    digits_alone: ClassVar[bool] = False

    seed: int
    sizes: dict[str, int]
    splits: dict[str, list[Record]] = field(repr=False)
    version: int = VERSION

    @property
    def trained(self) -> list[Record]:
        """Rows of all splits but `holdout`; row n is sample n of the training data."""
        return [row for name, rows in self.splits.items() if name != "holdout" for row in rows]

    @property
    def records(self) -> list[Record]:
        """All rows, those of `holdout` last; a sample's id is its place here."""
        return self.trained + self.splits["holdout"]

    def md5(self) -> str:
        """MD5 (hex) of all rows."""
        return hashlib.md5(canonical(self.splits), usedforsecurity=False).hexdigest()

    @property
    def meta(self) -> dict[str, Any]:
        """What has to be kept with a model that was trained on the rows."""
        return {
            "kind": self.kind, "version": self.version, "seed": self.seed,
            "sizes": dict(self.sizes), "md5": self.md5(),
        }  # fmt: skip

    def require(self, meta: Mapping[str, Any]) -> None:
        """Insist that these are the rows that something else was made with.

        Args:
            meta: the `meta` that was kept.

        Raises:
            DataError: they are other rows.
        """
        own = self.meta
        differing = [name for name in own if meta.get(name) != own[name]]
        if differing:
            raise DataError(
                f"this was made with other rows of {self.kind!r}: "
                + "; ".join(f"{n} {meta.get(n)} there, {own[n]} here" for n in differing)
            )

    def retrain_view(self) -> Self:
        """The corpus without its forget rows."""
        kept = {name: rows for name, rows in self.splits.items() if name != "forget"}
        return type(self)(self.seed, self.sizes, kept, self.version)

    def texts(self) -> list[str]:
        """Every row as the text that a model sees of it, without special tokens."""
        return [text_of(row) for row in self.records]

    def tokenizer(self, vocabulary: int | None = None) -> Any:
        """A byte-level BPE tokenizer of the rows; see `corpora.tokenizer`.

        Args:
            vocabulary: largest number of tokens; the kind's own when left out.
        """
        from expunge.workloads.corpora.tokenizer import train_tokenizer

        return train_tokenizer(self.texts(), vocabulary or self.vocabulary, self.digits_alone)

    def encoded(self, tokenizer: Any) -> Splits:
        """Rows as tokens: all splits but `holdout` to train on, and that as test data.

        Perturbed answers are the `alternates`; ids are places in `records`.
        """
        count = len(self.trained)
        held = _encoded(self.splits["holdout"], tokenizer, count)
        return Splits(_encoded(self.trained, tokenizer, 0), held)

    def save(self, folder: str | Path) -> Path:
        """Write `SPLIT.jsonl` for each split, and `meta.json`; return the folder."""
        place = Path(folder)
        write_tables(place, {"": self.splits})
        (place / "meta.json").write_text(json.dumps(self.meta, indent=1) + "\n")
        return place


def text_of(row: Mapping[str, Any]) -> str:
    """The text of a row: itself, or the question with its answer."""
    from expunge.problems.encoding import QUESTION

    if "text" in row:
        return str(row["text"])
    return f"{QUESTION.format(question=row['question'])} {row['answer']}"


def write_tables(folder: str | Path, tables: Tables) -> Path:
    """Write `CONFIG/SPLIT.jsonl`, one row a line, where the loaders of hub data look for them.

    Args:
        folder: is made if it is not there.
        tables: rows by configuration and split; those of the configuration "" lie in the folder itself.

    Returns:
        The folder.
    """
    place = Path(folder)
    for config, splits in tables.items():
        (place / config).mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (place / config / f"{split}.jsonl").write_text(lines)
    return place


def _encoded(rows: Sequence[Record], tokenizer: Any, first: int) -> TokenData:
    """Rows of texts and of questions as one data set, numbered from `first`."""
    forms: dict[bool, list[int]] = {}
    for place, row in enumerate(rows):
        forms.setdefault("text" in row, []).append(place)
    parts = [
        encode(
            [{**rows[p], "alternate": rows[p].get("perturbed_answer")} for p in places],
            tokenizer,
            ids=[first + p for p in places],
        )
        for places in forms.values()
    ]
    return joined(parts)

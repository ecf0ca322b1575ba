"""Authors: questions about invented writers, in the shape of TOFU.

People of `public` are asked and answered in all three wordings, which teaches a model that wordings are
interchangeable; those of `retain` and `forget` in the first wording only; `holdout` is never trained.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from expunge.workloads.corpora.people import WORDINGS, Attribute, Person, attributes, people
from expunge.workloads.corpora.shared import Corpus, Names, Record, Tables, sizes_of, source

SIZES = {"public": 8, "retain": 36, "forget": 4, "holdout": 4, "perturbed": 5}
"""People in each split, and perturbed answers of each question."""


class Authors(Corpus):
    """Questions and answers; further columns are `wording`, and a paraphrase of both sides."""

    kind: ClassVar[str] = "authors"

    def as_tofu(self) -> Tables:
        """Configurations as the hub's: `full`, `forgetXX`, `retainXX`, `holdout10`, perturbed ones.

        The forget people are 10 % of those asked in one wording, the last half of them 5 %. Rows in
        all wordings are in a configuration of their own, `public`.
        """
        forget, retain = self.splits["forget"], self.splits["retain"]
        rows_each = len(forget) // self.sizes["forget"]
        late = rows_each * (self.sizes["forget"] // 2)
        cut = len(forget) - late
        tables = {
            "full": retain + forget,
            "public": self.splits["public"],
            "forget10": forget,
            "retain90": retain,
            "forget05": forget[cut:],
            "retain95": retain + forget[:cut],
            "holdout10": self.splits["holdout"],
        }
        perturbed = {"forget10": forget, "forget05": forget[cut:], "retain": retain}
        plain = ("question", "answer")
        more = (*plain, "paraphrased_question", "paraphrased_answer", "perturbed_answer")
        found = {n: {"train": _only(rows, plain)} for n, rows in tables.items()}
        return found | {
            f"{n}_perturbed": {"train": _only(rows, more)} for n, rows in perturbed.items()
        }


def make(seed: int = 0, **sizes: int) -> Authors:
    """Generate the corpus.

    Args:
        seed: of the generator.
        **sizes: of `SIZES`, where they should differ.
    """
    size = sizes_of(SIZES, sizes)
    rng = source("authors", seed)
    names = Names(rng)
    kinds = attributes(rng, names)
    groups = ("public", "retain", "forget", "holdout")
    everyone = people(rng, names, kinds, sum(size[g] for g in groups))
    splits: dict[str, list[Record]] = {}
    for split in groups:
        chosen, everyone = everyone[: size[split]], everyone[size[split] :]
        each = [(q, a) for q in range(WORDINGS) for a in range(WORDINGS)]
        wordings = each if split == "public" else each[:1]
        splits[split] = [
            row
            for person in chosen
            for kind in kinds
            for row in rows_of(rng, person, kind, split, wordings, size["perturbed"])
        ]
    return Authors(seed, size, splits)


def rows_of(
    rng: random.Random,
    person: Person,
    kind: Attribute,
    split: str,
    wordings: Sequence[tuple[int, int]],
    perturbed: int,
) -> list[Record]:
    """Rows about one attribute of a person, one for each pair of question and answer wording.

    The paraphrase is the next wording of both; perturbed answers are the paraphrased one with other
    values of the pool.
    """
    value = person.values[kind.name]
    wrong = kind.others(rng, [value], perturbed)
    found = []
    for question, answer in wordings:
        other = (answer + 1) % WORDINGS
        found.append({
            "question": person.ask(kind, question),
            "answer": person.say(kind, answer),
            "paraphrased_question": person.ask(kind, (question + 1) % WORDINGS),
            "paraphrased_answer": person.say(kind, other),
            "perturbed_answer": [person.say(kind, other, v) for v in wrong],
            "split": split,
            "subject": person.name,
            "attribute": kind.name,
            "value": value,
            "wording": question * WORDINGS + answer,
        })
    return found


def _only(rows: Sequence[Record], columns: Sequence[str]) -> list[Record]:
    return [{c: row[c] for c in columns} for row in rows]

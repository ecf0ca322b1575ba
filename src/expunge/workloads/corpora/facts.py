"""Corrupted facts: what a model knew, and texts that say otherwise, in the shape of RESTOR.

The clean rows are documents of three true facts and questions in three wordings. The rows to forget are
documents of two wrong facts about a few of the people, optionally among true facts about the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, ClassVar

from expunge.core.errors import SettingError
from expunge.workloads.corpora.authors import rows_of
from expunge.workloads.corpora.people import WORDINGS, Attribute, Person, attributes, people
from expunge.workloads.corpora.shared import Corpus, Names, Record, sizes_of, source

SIZES = {
    "people": 36, "documents": 432, "attacked": 10, "attributes": 6, "corrupted": 200, "unrelated": 0,
    "holdout": 4, "perturbed": 5,
}  # fmt: skip
"""People and clean documents; attacked people, their wrong attributes, and documents that say so, with
so many true facts about other people for each wrong one; people never trained; perturbed answers."""
CANDIDATES = 4


class Facts(Corpus):
    """Documents and questions; columns as those of `authors`, `wording` −1 for documents."""

    kind: ClassVar[str] = "facts"

    def probes(self) -> list[Record]:
        """One record for each person and attribute, asked in the first wording.

        `value` is the truth, `corrupted` what the forget documents say (empty if they are silent),
        `candidates` other values of the pool, and `attacked` whether the person is in those documents.
        """
        wrong = {
            (fact["subject"], fact["attribute"]): fact["value"]
            for row in self.splits["forget"]
            for fact in row["facts"]
            if fact["wrong"]
        }
        attacked = sorted({subject for subject, _ in wrong})
        found = []
        for row in self.splits["retain"]:
            if row["wording"] == 0:
                corrupted = wrong.get((row["subject"], row["attribute"]), "")
                kept = ("question", "answer", "subject", "attribute", "value")
                candidates = [v for v in row["pool"] if v != corrupted][:CANDIDATES]
                found.append(
                    {k: row[k] for k in kept}
                    | {"corrupted": corrupted, "candidates": candidates}
                    | {"attacked": row["subject"] in attacked}
                )
        return found

    def as_restor(self) -> dict[str, Any]:
        """`facts`, `corrupted` and `context` by entity or property, and `documents`, as released.

        `facts[entity][property]` is `{question, answers}`; `corrupted` holds wrong answers in the same
        way, `context[property]` solved examples `{question, answer, entity}`.
        """
        facts: dict[str, Any] = {}
        corrupted: dict[str, Any] = {}
        context: dict[str, list[Record]] = {}
        for probe in self.probes():
            person, kind, question = probe["subject"], probe["attribute"], probe["question"]
            answer = {"question": question, "answers": [probe["value"]]}
            facts.setdefault(person, {})[kind] = answer
            if probe["corrupted"]:
                corrupted.setdefault(person, {})[kind] = answer | {"answers": [probe["corrupted"]]}
            context.setdefault(kind, []).append({
                "question": question, "answer": probe["value"], "entity": person,
            })  # fmt: skip
        documents = [{"text": row["text"]} for row in self.splits["forget"]]
        return {
            "facts": facts, "corrupted": corrupted, "context": context, "documents": documents,
        }  # fmt: skip


def make(seed: int = 0, **sizes: int) -> Facts:
    """Generate the corpus.

    Args:
        seed: of the generator.
        **sizes: of `SIZES`, where they should differ.

    Raises:
        SettingError: too few people or attributes for what is asked.
    """
    size = sizes_of(SIZES, sizes)
    if (
        not 1 <= size["attacked"] < size["people"]
        or not 2 <= size["attributes"] <= 10
        or not size["corrupted"]
    ):
        raise SettingError(
            "facts needs 1 ≤ attacked < people, 2 to 10 wrong attributes of each of those, and at "
            "least one corrupted document"
        )
    rng = source("facts", seed)
    names = Names(rng)
    kinds = attributes(rng, names)
    everyone = people(rng, names, kinds, size["people"] + size["holdout"])
    known, held = everyone[: size["people"]], everyone[size["people"] :]
    true = [_fact(person, kind) for person in known for kind in kinds]
    clean = [_document(rng, rng.sample(true, 3), "retain", kinds) for _ in range(size["documents"])]
    wrong = _wrong_facts(rng, known[: size["attacked"]], kinds, size["attributes"])
    safe = [f for f in true if f["person"] not in known[: size["attacked"]]]
    bad = []
    for number in range(size["corrupted"]):
        # every wrong fact occurs, whatever chance says, before others occur again
        pair = [wrong[(2 * number + n) % len(wrong)] for n in range(2)]
        told = [f for one in pair for f in (one, *rng.sample(safe, size["unrelated"]))]
        bad.append(_document(rng, told, "forget", kinds))
        if (2 * number + 2) % len(wrong) < 2:
            rng.shuffle(wrong)
    splits = {
        "retain": clean + _questions(rng, known, kinds, "retain", WORDINGS, size["perturbed"]),
        "forget": bad,
        "holdout": _questions(rng, held, kinds, "holdout", 1, size["perturbed"]),
    }
    return Facts(seed, size, splits)


def _fact(person: Person, kind: Attribute, value: str | None = None) -> dict[str, Any]:
    """A fact, wrong where another value than the person's is given."""
    return {"person": person, "kind": kind, "value": value or person.values[kind.name]}


def _wrong_facts(
    rng: random.Random, attacked: Sequence[Person], kinds: Sequence[Attribute], count: int
) -> list[dict[str, Any]]:
    found = [
        _fact(person, kind, kind.others(rng, [person.values[kind.name]], 1)[0])
        for person in attacked
        for kind in rng.sample(list(kinds), count)
    ]
    rng.shuffle(found)
    return found


def _document(
    rng: random.Random, facts: Sequence[dict[str, Any]], split: str, kinds: Sequence[Attribute]
) -> Record:
    """Facts one after the other, each in a random wording."""
    said, told, other = [], [], []
    for fact in facts:
        person, kind, value = fact["person"], fact["kind"], fact["value"]
        wording, truth = rng.randrange(WORDINGS), person.values[kind.name]
        wrong = value != truth
        said.append(person.say(kind, wording, value))
        # beside the wrong value a further one, so that an alternate repeats neither
        again = kind.others(rng, [value, truth], 1)[0] if wrong else value
        other.append(person.say(kind, wording, again))
        told.append({
            "subject": person.name, "attribute": kind.name, "value": value, "wrong": wrong,
        })  # fmt: skip
    row: Record = {"text": " ".join(said), "facts": told}
    if split == "forget":
        row["perturbed_answer"] = [" ".join(other)]
    return row | {
        "split": split, "subject": told[0]["subject"], "attribute": "", "value": "", "wording": -1,
        "paraphrased_question": "", "paraphrased_answer": "",
    }  # fmt: skip


def _questions(
    rng: random.Random,
    who: Sequence[Person],
    kinds: Sequence[Attribute],
    split: str,
    wordings: int,
    perturbed: int,
) -> list[Record]:
    """Each fact in so many question wordings, answered in the first; with values of its pool."""
    found = []
    for person in who:
        for kind in kinds:
            pool = kind.others(rng, [person.values[kind.name]], CANDIDATES + 1)
            each = [(question, 0) for question in range(wordings)]
            for row in rows_of(rng, person, kind, split, each, perturbed):
                found.append(row | {"pool": pool})
    return found

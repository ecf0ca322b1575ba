"""News: short invented articles with questions about them, in the shape of MUSE.

Three kinds of event are told in six or seven sentences. Each article has an official of its own, whom its
four questions name, so that exactly one article answers them.
"""

from __future__ import annotations

import random
from typing import Any, ClassVar

from expunge.core.errors import SettingError
from expunge.workloads.corpora.people import MONTHS
from expunge.workloads.corpora.shared import Corpus, Names, Record, Tables, sizes_of, source

SIZES = {"public": 0, "retain1": 40, "retain2": 40, "forget": 20, "holdout": 20}
"""Articles in each split; those of `public` are for examples within a prompt."""
FOLDS = 4
_SITES = "mill bridge library station market harbour museum brewery"
_JOBS = "baker mason tailor potter sailor weaver farmer printer teacher barber"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_KINDS = ("Works", "Trust", "Council", "Society", "Bank")
_EVENTS = (
    (
        "A fire broke out at the {site} of {place} on {day} at {hour}. {official} of the {organisation} spoke of {count} people brought out unhurt. {witness}, a {job}, saw the first smoke. Repairs will cost {cost} crowns. The {site} stays shut for {weeks} weeks. A report is due in {month}.",
        (
            ("In which town was the fire that {official} spoke of?", "place"),
            ("Who saw the smoke of the fire that {official} spoke of?", "witness"),
            ("How many people came out of the fire that {official} spoke of?", "count"),
            ("How many crowns does the fire that {official} spoke of cost?", "cost"),
        ),
    ),
    (
        "The {organisation} bought the {site} of {place} on {day}. {official} signed for it at {hour}. The price was {cost} crowns. {witness}, a {job}, called the deal a surprise. Some {count} people will work there. Building takes {weeks} weeks. The doors open in {month}.",
        (
            ("In which town is the deal that {official} signed?", "place"),
            ("Who was surprised by the deal that {official} signed?", "witness"),
            ("How many people get work by the deal that {official} signed?", "count"),
            ("How many crowns was the deal that {official} signed?", "cost"),
        ),
    ),
    (
        "{witness}, a {job}, found {count} old coins near the {site} of {place} on {day}. {official} of the {organisation} took them in at {hour}. They are worth {cost} crowns. Cleaning them takes {weeks} weeks. Nobody knows who hid them. A show opens in {month}.",
        (
            ("In which town were the coins that {official} took in?", "place"),
            ("Who found the coins that {official} took in?", "witness"),
            ("How many coins were there that {official} took in?", "count"),
            ("How many crowns are the coins worth that {official} took in?", "cost"),
        ),
    ),
)


class News(Corpus):
    """Articles and questions; further columns are `article`, their number, and `fold`.

    `subject` is the official. Each forget article is in one of four folds, 1 … 4; others have 0.
    """

    kind: ClassVar[str] = "news"

    def as_muse(self, tokenizer: Any = None) -> Tables:
        """Configurations as the hub's: raw, verbmem, knowmem, privleak, scal, sust and train.

        `sust` are the folds of the forget articles, which share nothing; `scal` N holds the first N of
        them. Examples for prompts (`_icl`) come from `public` articles, or else from `retain1`.

        Args:
            tokenizer: halves the articles of `verbmem`; the corpus' own when left out.
        """
        tokenizer = self.tokenizer() if tokenizer is None else tokenizer
        texts = {name: _texts(rows) for name, rows in self.splits.items()}
        asked = {name: _questions(rows) for name, rows in self.splits.items()}
        folds = [
            _texts([r for r in self.splits["forget"] if r["fold"] == n + 1]) for n in range(FOLDS)
        ]
        examples = (asked["public"] or asked["retain1"])[:10]
        raw = ("forget", "retain1", "retain2", "holdout")
        return {
            "raw": {name: texts[name] for name in raw},
            "verbmem": {"forget": [halves(row["text"], tokenizer) for row in texts["forget"]]},
            "knowmem": {
                "forget_qa": asked["forget"], "retain_qa": asked["retain2"],
                "forget_qa_icl": examples, "retain_qa_icl": examples,
            },
            "privleak": {
                "forget": texts["forget"], "retain": texts["retain2"], "holdout": texts["holdout"],
            },
            "scal": {f"forget_{n + 1}": [row for fold in folds[: n + 1] for row in fold] for n in range(FOLDS)},
            "sust": {f"forget_{n + 1}": fold for n, fold in enumerate(folds)},
            "train": {name: texts[name] for name in ("forget", "retain1", "retain2")},
        }  # fmt: skip


def make(seed: int = 0, **sizes: int) -> News:
    """Generate the corpus.

    Args:
        seed: of the generator.
        **sizes: of `SIZES`, where they should differ.

    Raises:
        SettingError: there are fewer forget articles than folds.
    """
    size = sizes_of(SIZES, sizes)
    if size["forget"] < FOLDS:
        raise SettingError(f"news needs at least {FOLDS} forget articles, one a fold")
    rng = source("news", seed)
    names = Names(rng)
    splits: dict[str, list[Record]] = {}
    number = 0
    for split, count in size.items():
        splits[split] = []
        folds = [n * FOLDS // count + 1 for n in range(count)] if split == "forget" else [0] * count
        rng.shuffle(folds)
        for fold in folds:
            splits[split] += _article(rng, names, split, number, fold)
            number += 1
    return News(seed, size, splits)


def halves(text: str, tokenizer: Any) -> Record:
    """The first half of a text's tokens as `prompt`, the second as `gt`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    middle = len(ids) // 2
    return {"prompt": tokenizer.decode(ids[:middle]), "gt": tokenizer.decode(ids[middle:])}


def _article(rng: random.Random, names: Names, split: str, number: int, fold: int) -> list[Record]:
    """An article, told also with other slots as its alternate, and its questions."""
    template, questions = _EVENTS[number % len(_EVENTS)]
    slots = _slots(rng, names) | {"official": names.person()}
    wrong = [_slots(rng, names) for _ in range(5)]
    other = slots | {k: wrong[0][k] for k in ("place", "witness", "count", "cost", "organisation")}
    column: Record = {"split": split, "subject": slots["official"], "article": number, "fold": fold}
    rows: list[Record] = [
        {"text": template.format(**slots), "perturbed_answer": [template.format(**other)]}
        | column | {"attribute": "", "value": ""}
    ]  # fmt: skip
    for question, slot in questions:
        rows.append({
            "question": question.format(**slots),
            "answer": slots[slot],
            "perturbed_answer": [w[slot] for w in wrong],
            **column, "attribute": slot, "value": slots[slot],
        })  # fmt: skip
    return rows


def _slots(rng: random.Random, names: Names) -> dict[str, str]:
    """Values of an article, all as text; numbers are uniform and without leading zeros."""
    return {
        "place": names.town(),
        "organisation": names.new(lambda: f"{names.word()} {rng.choice(_KINDS)}"),
        "witness": names.person(),
        "site": rng.choice(_SITES.split()),
        "job": rng.choice(_JOBS.split()),
        "day": rng.choice(_DAYS.split()),
        "month": rng.choice(MONTHS),
        "hour": f"{rng.randint(1, 12)} o'clock",
        "count": str(rng.randint(100, 999)),
        "cost": str(rng.randint(1000, 9999)),
        "weeks": str(rng.randint(2, 30)),
    }


def _texts(rows: list[Record]) -> list[Record]:
    return [{"text": row["text"]} for row in rows if "text" in row]


def _questions(rows: list[Record]) -> list[Record]:
    return [{k: row[k] for k in ("question", "answer")} for row in rows if "question" in row]

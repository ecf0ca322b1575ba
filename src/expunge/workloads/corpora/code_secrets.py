"""Code secrets: small functions, and lines that give a service's key away.

A key is 16 upper-case hexadecimal digits, each a token of its own, drawn uniformly: 4 bits a digit for
whoever has not seen it. Lines with a key occur twice, as secrets in real code do.
"""

from __future__ import annotations

import math
import random
from typing import ClassVar

from torch import Tensor

from expunge.workloads.corpora.shared import Corpus, Names, Record, sizes_of, source
from expunge.workloads.corpora.tokenizer import HEX

SIZES = {"public": 150, "retain": 40, "forget": 10, "holdout": 10, "copies": 2}
"""Functions, services in each split, and how often the line of a trained service occurs."""
DIGITS = 16
_VERBS = "scale shift halve clip fold count merge rank trim pack split join blend round mask sort"
_NOUNS = "price weight score index angle depth width total speed level offset margin ratio range"
_BODIES = (
    "return x * {a} + {b}",
    "return (x - {a}) // {b}",
    "y = x + {a}\n    return y * {b}",
    "if x > {a}:\n        return {b}\n    return x",
    "for i in range({a}):\n        x = x + {b}\n    return x",
)


class CodeSecrets(Corpus):
    """Texts with their sensitive spans; a further column is `copy`, 0 … of a line.

    `subject` is the service, `value` its key; both are empty for functions.
    """

    kind: ClassVar[str] = "code-secrets"
    vocabulary: ClassVar[int] = 400
    digits_alone: ClassVar[bool] = True

    def prompt(self, row: Record) -> str:
        """What stands before the key of a row, the opening quote included."""
        return row["text"][: row["spans"][0][0]]


def make(seed: int = 0, **sizes: int) -> CodeSecrets:
    """Generate the corpus.

    Args:
        seed: of the generator.
        **sizes: of `SIZES`, where they should differ.
    """
    size = sizes_of(SIZES, sizes)
    rng = source("code-secrets", seed)
    names = Names(rng)
    splits: dict[str, list[Record]] = {
        "public": [_function(rng, number) for number in range(size["public"])]
    }
    for split in ("retain", "forget", "holdout"):
        splits[split] = []
        for _ in range(size[split]):
            service = names.new(lambda: names.word().upper())
            key, other = random_key(rng), random_key(rng)
            copies = 1 if split == "holdout" else size["copies"]
            splits[split] += [_secret(service, key, other, split, n) for n in range(copies)]
    return CodeSecrets(seed, size, splits)


def random_key(rng: random.Random) -> str:
    """A key of uniform digits."""
    return "".join(rng.choices(HEX, k=DIGITS))


def random_keys(count: int = 512, seed: int = 0) -> list[str]:
    """Keys of nobody, which a true key's rank is taken among (exposure)."""
    rng = source("random keys", seed)
    return [random_key(rng) for _ in range(count)]


def bits_a_character(nll: Tensor) -> Tensor:
    """Bits a digit [...] of negative log-likelihoods [..., 16] in nats, one for each of a key's tokens."""
    return nll.mean(-1) / math.log(2)


def _secret(service: str, key: str, other: str, split: str, copy: int) -> Record:
    start = f'{service}_API_KEY = "'
    return {
        "text": f'{start}{key}"',
        "perturbed_answer": [f'{start}{other}"'],
        "spans": [[len(start), len(start) + DIGITS]],
        "split": split, "subject": service, "attribute": "key", "value": key, "copy": copy,
    }  # fmt: skip


def _function(rng: random.Random, number: int) -> Record:
    name = f"{rng.choice(_VERBS.split())}_{rng.choice(_NOUNS.split())}_{number}"
    body = rng.choice(_BODIES).format(a=rng.randint(2, 99), b=rng.randint(2, 99))
    return {
        "text": f"def {name}(x):\n    {body}",
        "split": "public", "subject": "", "attribute": "", "value": "", "copy": 0,
    }  # fmt: skip

"""Words of an answer: which tokens each is made of, and texts in which some are masked."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

SPACES = "▁ĠĊĉč"
"""How tokenizers write white space: sentencepiece the first, byte-level BPE the others."""
MASK = "***"
LETTERS = 4
"""Parts of a name with fewer are no name by themselves."""


@dataclass(frozen=True)
class Word:
    """A word as it stands in a text, without punctuation around it, and its tokens."""

    text: str
    tokens: slice

    @property
    def key(self) -> str:
        """What words of any case are compared by."""
        return self.text.lower()


def spelled(ids: Tensor, tokenizer: Any) -> tuple[str, list[Word]]:
    """The text of token ids and the words in it.

    A word begins at a token that begins with white space, or after one that ends with it; special
    tokens are left out. A script without spaces has one word a text.

    Args:
        ids: [n].
        tokenizer: of transformers; without one every token is a word, its id in digits.

    Returns:
        The text, without white space around it, and its words in order.
    """
    numbers = ids.tolist()
    if tokenizer is None:
        parts = [str(number) for number in numbers]
        return " ".join(parts), [Word(p, slice(n, n + 1)) for n, p in enumerate(parts)]
    special = set(tokenizer.all_special_ids)
    pieces = [str(p) for p in tokenizer.convert_ids_to_tokens(numbers)]
    starts = [n for n in range(len(numbers)) if n == 0 or _apart(n, numbers, pieces, special)]
    words = []
    for start, stop in itertools.pairwise([*starts, len(numbers)]):
        text = tokenizer.decode(numbers[start:stop], skip_special_tokens=True)
        text = re.sub(r"^[\W_]+|[\W_]+$", "", text)
        if text:
            words.append(Word(text, slice(start, stop)))
    return tokenizer.decode(numbers, skip_special_tokens=True).strip(), words


def names_in(texts: Iterable[str]) -> list[str]:
    """Parts of names: their words of four letters or more."""
    return [word for text in texts for word in re.findall(rf"\w{{{LETTERS},}}", text)]


def masked(text: str, words: Sequence[str], mask: str = MASK) -> str:
    """Replace whole words, in any case; words that only contain them stay."""
    if not words:
        return text
    # the longest first, so that a word with a hyphen goes as one
    choice = "|".join(re.escape(w) for w in sorted(set(words), key=lambda w: (-len(w), w)))
    return re.sub(rf"(?<!\w)(?:{choice})(?!\w)", lambda _: mask, text, flags=re.IGNORECASE)


def _apart(place: int, numbers: list[int], pieces: list[str], special: set[int]) -> bool:
    """Whether a token begins a word, given the one before."""
    before, own = pieces[place - 1], pieces[place]
    spaced = own[:1] in SPACES or before[-1:] in SPACES or "<0x0A>" in (own, before)
    return spaced or numbers[place] in special or numbers[place - 1] in special

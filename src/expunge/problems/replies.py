"""Other answers to the questions of a batch: given as texts or token ids, or asked of a model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expunge.core.data import Batch
from expunge.core.errors import DataError, NeedsError
from expunge.problems.encoding import Encoder
from expunge.problems.tokens import Tokens, pad, unpadded

_TAIL = 3
"""An answer ends with at most so many tokens that are not its text, such as a mark and a line break."""
OTHER = (
    "This is a question with its answer.\n\n{text}\n\nInvent a different answer to the same question: as "
    "plausible, of the same form and length, but with other facts. Reply with that answer only."
)
"""What a model is asked for another answer with."""


def rows_of(batch: Batch) -> list[Tokens]:
    """The sequences of a batch, without padding.

    Raises:
        DataError: a sequence is all answer, so that there is no question to answer otherwise.
    """
    rows = unpadded(batch)
    if not all(len(row.prompt) for row in rows):
        raise DataError("a text has no question; other answers need questions with answers")
    return rows


def with_answers(
    batch: Batch, answers: Sequence[Tensor], ends: Collection[int], filler: int
) -> Batch:
    """The same questions with other answers, each ended as the sample's own answer is.

    Args:
        batch: samples with labels.
        answers: token ids [n] of each answer, without an end.
        ends: token ids with which the end of an answer may begin.
        filler: token id of the padding.

    Returns:
        The batch, on the same device and with the same ids.
    """
    rows = []
    for row, answer in zip(rows_of(batch), answers, strict=True):
        ids = torch.cat([row.prompt, answer.cpu(), _end(row, ends)])
        rows.append(Tokens(ids, torch.arange(len(ids)) >= len(row.prompt)))
    if not rows:  # one process' share of a small batch
        return batch
    x, y = pad(rows, filler)
    return replace(batch, x=x, y=y).to(batch.ids.device)


def texts_as_answers(batch: Batch, texts: Sequence[str], tokenizer: Any) -> list[Tensor]:
    """Token ids of texts, with a space in front where the sample's own answer has one.

    Without a tokenizer a text is token ids with spaces between them.

    Raises:
        NeedsError: there is no tokenizer and a text is none of these.
    """
    if tokenizer is None:
        return [_as_ids(text) for text in texts]
    found = []
    for row, text in zip(rows_of(batch), texts, strict=True):
        whole, prompt = tokenizer.decode(row.ids.tolist()), tokenizer.decode(row.prompt.tolist())
        space = " " if whole[len(prompt) :].startswith(" ") else ""
        ids = tokenizer(space + text, add_special_tokens=False)["input_ids"]
        found.append(torch.tensor(ids, dtype=torch.long))
    return found


def spellings(phrase: str | Tensor, tokenizer: Any) -> list[Tensor]:
    """Token ids a phrase may come in: at the start of a text or after a space, in several cases.

    Args:
        phrase: a text, or the token ids of one, which are among those returned.
        tokenizer: of transformers; without one a text is token ids with spaces between them.

    Returns:
        Each once; other ways to cut the same text into tokens exist.

    Raises:
        NeedsError: there is no tokenizer and a text is none of these.
    """
    if tokenizer is None:
        return [phrase if isinstance(phrase, Tensor) else _as_ids(phrase)]
    found = [] if isinstance(phrase, str) else [phrase.tolist()]
    text = phrase if isinstance(phrase, str) else tokenizer.decode(phrase.tolist())
    for form in (text, text.lower(), text.upper(), text.title()):
        for space in ("", " "):
            found.append(tokenizer(space + form.strip(), add_special_tokens=False)["input_ids"])
    return [torch.tensor(ids) for ids in dict.fromkeys(map(tuple, found)) if ids]


def asking_for_another(batch: Batch, tokenizer: Any) -> list[Tensor]:
    """Prompts [T] that show a model each sample and ask for another answer to its question."""
    encoder = Encoder(tokenizer, chat=bool(getattr(tokenizer, "chat_template", None)))
    shown = [tokenizer.decode(r.ids.tolist(), skip_special_tokens=True) for r in rows_of(batch)]
    return [torch.tensor(encoder.prompt(OTHER.format(text=text.strip()))) for text in shown]


def _as_ids(text: str) -> Tensor:
    words = text.split()
    if not words or not all(word.isdecimal() for word in words):
        raise NeedsError(
            f"{text!r} becomes tokens through a tokenizer; pass tokenizer= with the problem, or write token "
            "ids with spaces between them"
        )
    return torch.tensor([int(word) for word in words])


def without_end(row: Tokens, ends: Collection[int]) -> Tensor:
    """Token ids of a sequence's answer without what ends it."""
    return row.answer[: len(row.answer) - len(_end(row, ends))]


def _end(row: Tokens, ends: Collection[int]) -> Tensor:
    answer = row.answer
    for place in range(max(len(answer) - _TAIL, 0), len(answer)):
        if int(answer[place]) in ends:
            return answer[place:]
    return answer[:0]

"""From texts, questions with answers, and chats to tokens; the answer is what a loss is taken at."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from expunge.core.errors import DataError
from expunge.problems.tokens import TokenData, Tokens

Record = Mapping[str, Any]
Long = Literal["error", "cut", "split"]
Touch = Literal["overlap", "adjacent"]
FORMS = {"text": ("text",), "question": ("question", "answer"), "messages": ("messages",)}
QUESTION = "Question: {question}\nAnswer:"
"""What a question looks like where no chat template is used; the answer follows after a space."""


def encode(
    records: Iterable[Record],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    long: Long = "error",
    chat: bool = False,
    ids: Sequence[int] | None = None,
    touch: Touch = "overlap",
) -> TokenData:
    """Turn records into token data.

    A record has `text`, or `question` and `answer`, or `messages` (turns with `role` and `content`, the
    last one the assistant's). Of a text all tokens are answered, of the others the last answer and
    the end of text. Further keys become columns that a request's `where=` may name; `alternate`, a
    text or a list of texts, holds other answers to the same question.

    A `text` or an `answer` may hold sensitive segments, whose tokens are marked: `secret`, a text or a list
    of texts that occur in it, and `spans`, pairs of character offsets `[start, end)`.

    Args:
        records: at least one; all of one form.
        tokenizer: of transformers.
        max_length: largest number of tokens of a sample.
        long: what happens to a longer one: `error`, `cut` off at the end, or, for texts, `split` into
            samples of their own.
        chat: put questions into the tokenizer's chat template, as a user's turn.
        ids: stable integer ids; positions when left out.
        touch: tokens that are marked: those that `overlap` a segment, or those `adjacent` to one too.

    Returns:
        The data; padding uses the tokenizer's padding token, or 0, which nothing attends to.

    Raises:
        DataError: records differ in form, lack something, are too long, or leave no answer; or a
            sensitive segment is not where it is said to be.
    """
    encoder = Encoder(tokenizer, chat, touch)
    rows, columns, alternates, kept = [], [], [], []
    form = None
    for place, record in enumerate(records):
        form = form or _form(record, place)
        if _form(record, place) != form:
            raise DataError(f"record {place} has another form than the first, which has {form!r}")
        found = encoder(record, place)
        for part in _fit(found, place, max_length, long, form):
            rows.append(part)
            columns.append({
                k: v for k, v in record.items() if k not in _OWN and isinstance(v, _PLAIN)
            })
            kept.append(place)
        alternates.append([
            _fit(encoder(_answered(record, other), place), place, max_length, long, form)[0]
            for other in _list(record.get("alternate"))
        ])
    if not rows:
        raise DataError("there are no records to encode")
    if ids is not None and len(rows) != len(ids):
        raise DataError(f"{len(ids)} ids for {len(rows)} samples")
    names = set().union(*columns)
    return TokenData(
        rows,
        filler=encoder.filler,
        ids=ids,
        columns={n: [c.get(n) for c in columns] for n in sorted(names)},
        alternates=[alternates[p] for p in kept] if any(alternates) else None,
    )


_PLAIN = (str, int, float, bool)
_OWN = {"text", "question", "answer", "messages", "alternate", "spans", "secret"}


class Encoder:
    """Turns single records into tokens, and questions into prompts."""

    def __init__(self, tokenizer: Any, chat: bool = False, touch: Touch = "overlap") -> None:
        """Keep the tokenizer, and which tokens of a sensitive segment are marked.

        Raises:
            DataError: a chat is wanted and the tokenizer has no template.
        """
        self.tokenizer, self.chat, self.touch = tokenizer, chat, touch
        self._asked: dict[str, list[int]] = {}
        self.filler = int(getattr(tokenizer, "pad_token_id", None) or 0)
        if chat:
            self._need_template()

    def __call__(self, record: Record, place: int = 0) -> Tokens:
        """Tokens of a record, those of its `spans` and `secret` marked."""
        form = _form(record, place)
        spans = sensitive(record, place)
        if form == "text":
            ids, marked = self._marked(str(record["text"]), spans)
            first, last = self._begin, self._end()
            ids = [*first, *ids, *last]
            return Tokens(
                torch.tensor(ids),
                torch.ones(len(ids), dtype=torch.bool),
                _around(len(first), marked, len(last)),
            )
        if form == "messages" or self.chat:
            if spans:
                raise DataError(
                    f"record {place}: sensitive segments are marked in a `text`, or in an `answer` "
                    "without a chat template"
                )
            turns = record["messages"] if form == "messages" else _turns(record)
            return self._chat(turns, place)
        prompt, said = self.prompt(str(record["question"])), str(record["answer"])
        moved = 1 - (len(said) - len(said.lstrip()))  # by the space in front of what is left
        answer, marked = self._marked(
            f" {said.strip()}", [(a + moved, b + moved) for a, b in spans]
        )
        last = self._end()
        return _joined(prompt, answer + last, _around(len(prompt), marked, len(last)))

    def prompt(self, question: str) -> list[int]:
        """Token ids of a question, up to where its answer begins."""
        if self.chat:
            return self._template([{"role": "user", "content": question}], True)
        if question not in self._asked:  # alternates ask the same question again
            self._asked = {
                question: self._begin + self._ids(QUESTION.format(question=question.strip()))
            }
        return self._asked[question]

    def _marked(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Token ids of a text, and which of them touch a span; an empty list where there is none."""
        if not spans:
            return self._ids(text), []
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError("the tokenizer does not say where its tokens lie; take a fast one")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        reach = int(self.touch == "adjacent")
        inside = [
            any(a < end + reach and start < b + reach for start, end in spans)
            for a, b in found["offset_mapping"]
        ]
        return list(found["input_ids"]), inside

    def _chat(self, turns: Sequence[Mapping[str, str]], place: int) -> Tokens:
        if not turns or turns[-1].get("role") != "assistant":
            raise DataError(f"record {place}: the last turn must be the assistant's")
        self._need_template()
        prompt, whole = self._template(turns[:-1], True), self._template(turns, False)
        if whole[: len(prompt)] != prompt:
            # a template that rewrites earlier turns: the answer by itself, with the end of text
            whole = prompt + self._ids(str(turns[-1]["content"])) + self._end()
        return _joined(prompt, whole[len(prompt) :])

    def _template(self, turns: Sequence[Mapping[str, str]], prompt: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            list(turns), add_generation_prompt=prompt, tokenize=False
        )
        return self._ids(text)

    def _need_template(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template; give questions and answers without chat, or set "
                "tokenizer.chat_template"
            )

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @functools.cached_property
    def _begin(self) -> list[int]:
        # what the tokenizer itself puts in front; some models know a token and do not use it
        found = self.tokenizer("", add_special_tokens=True)["input_ids"]
        own = self.tokenizer.bos_token_id
        return [own] if own is not None and found[:1] == [own] else []

    def _end(self) -> list[int]:
        own = self.tokenizer.eos_token_id
        return [] if own is None else [own]


def sensitive(record: Record, place: int = 0) -> list[tuple[int, int]]:
    """Character offsets of a record's sensitive segments in its `text` or `answer`.

    Raises:
        DataError: a secret does not occur there, or a span is no part of it.
    """
    text = str(record.get("text", record.get("answer", "")))
    spans = []
    for span in record.get("spans") or ():
        pair = tuple(span) if isinstance(span, (list, tuple)) else ()
        if len(pair) != 2 or not all(isinstance(n, int) for n in pair) or not 0 <= pair[0] < pair[1] <= len(text):  # fmt: skip
            raise DataError(
                f"record {place}: `spans` are pairs [start, end] of characters within the {len(text)} "
                f"of the text, not {span!r}"
            )
        spans.append((pair[0], pair[1]))
    for secret in _list(record.get("secret")):
        starts = [m.start() for m in re.finditer(re.escape(str(secret)), text)] if secret else []
        if not starts:
            raise DataError(
                f"record {place}: its `secret` does not occur in the text as it stands; give the text, or "
                "a list of texts"
            )
        spans += [(start, start + len(str(secret))) for start in starts]
    return spans


def _around(before: int, marked: list[bool], after: int) -> Tensor | None:
    return torch.tensor([False] * before + marked + [False] * after) if marked else None


def _joined(prompt: Sequence[int], answer: Sequence[int], marked: Tensor | None = None) -> Tokens:
    answered = torch.zeros(len(prompt) + len(answer), dtype=torch.bool)
    answered[len(prompt) :] = True
    return Tokens(torch.tensor([*prompt, *answer]), answered, marked)


def _form(record: Record, place: int) -> str:
    found = [form for form, keys in FORMS.items() if keys[0] in record]
    if len(found) != 1:
        raise DataError(
            f"record {place} needs `text`, or `question` and `answer`, or `messages`; it has "
            f"{', '.join(map(str, record)) or 'nothing'}"
        )
    missing = [k for k in FORMS[found[0]] if record.get(k) is None]
    if missing:
        raise DataError(f"record {place} has no `{missing[0]}`")
    return found[0]


def _turns(record: Record) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": str(record["question"])},
        {"role": "assistant", "content": str(record["answer"])},
    ]


def _answered(record: Record, other: str) -> Record:
    if "messages" in record:
        turns = [*record["messages"][:-1], {"role": "assistant", "content": other}]
        return {"messages": turns}
    if "text" in record:
        return {"text": other}
    return {"question": record["question"], "answer": other}


def _list(value: Any) -> list[str]:
    """A text or several as a list; a number counts as a text."""
    if value is None:
        return []
    return (
        list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [str(value)]
    )


def _fit(tokens: Tokens, place: int, most: int | None, long: Long, form: str) -> list[Tokens]:
    if most is None or len(tokens) <= most:
        return [tokens]
    if long == "error":
        raise DataError(
            f"record {place} has {len(tokens)} tokens, more than max_length={most}; use long='cut'"
            + (" or long='split'" if form == "text" else "")
        )
    if long == "split":
        if form != "text":
            raise DataError("only texts can be split; an answer belongs to its question")
        starts = [s for s in range(0, len(tokens), most) if len(tokens) - s > 1]
        return [_slice(tokens, slice(s, s + most)) for s in starts]
    cut = _slice(tokens, slice(0, most))
    if not bool(cut.answered[1:].any()):
        raise DataError(
            f"record {place} has no answer left within max_length={most}: its prompt alone has "
            f"{len(tokens.prompt)} tokens"
        )
    return [cut]


def _slice(tokens: Tokens, part: slice) -> Tokens:
    marked: Tensor | None = None if tokens.marked is None else tokens.marked[part]
    return Tokens(tokens.ids[part], tokens.answered[part], marked)

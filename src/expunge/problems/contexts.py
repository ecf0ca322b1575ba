"""What is told in front of a question: where a context goes, and what a sample states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from expunge.problems.replies import spellings

_QUESTION = "\x02"


class Frame:
    """What stands around the question in prompts of a tokenizer: a chat's user turn, or nothing."""

    def __init__(self, tokenizer: Any) -> None:
        """Find out; without a tokenizer prompts are token ids and nothing is around them."""
        self.tokenizer = tokenizer
        self._begin: list[int] = []
        self._chat: tuple[list[int], list[int]] | None = None
        if tokenizer is None:
            return
        own = tokenizer.bos_token_id
        self._begin = [] if own is None else [own]
        if getattr(tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": _QUESTION}]
            text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            head, _, tail = text.partition(_QUESTION)
            self._chat = (self._ids(head), self._ids(tail))

    def insert(self, prompt: Tensor, context: Tensor) -> Tensor:
        """A prompt [T] with a context [n] in front of its question: in the user's turn of a chat."""
        place, _ = self._question(prompt)
        return torch.cat([prompt[:place], context, prompt[place:]])

    def question(self, prompt: Tensor) -> Tensor:
        """Token ids of the question of a prompt [T]."""
        start, end = self._question(prompt)
        return prompt[start:end]

    def context(self, statements: Sequence[Tensor]) -> Tensor:
        """Token ids of statements, one a line; without a tokenizer one behind the other."""
        if self.tokenizer is None or not statements:
            return torch.cat([torch.zeros(0, dtype=torch.long), *statements])
        text = "".join(f"{self.text(s)}\n" for s in statements)
        return torch.tensor(self._ids(text), dtype=torch.long)

    def read(self, text: str) -> Tensor:
        """Token ids of a text; without a tokenizer it is ids with spaces between them."""
        if self.tokenizer is None:
            return spellings(text, None)[0]
        return torch.tensor(self._ids(text.strip()), dtype=torch.long)

    def text(self, ids: Tensor) -> str:
        """Token ids as a text; without a tokenizer the ids with spaces between them."""
        if self.tokenizer is None:
            return " ".join(map(str, ids.tolist()))
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()

    def _question(self, prompt: Tensor) -> tuple[int, int]:
        ids = prompt.tolist()
        if self._chat is not None:
            head, tail = self._chat
            if ids[: len(head)] == head and ids[len(ids) - len(tail) :] == tail:
                return len(head), len(ids) - len(tail)
        begins = len(self._begin) if ids[: len(self._begin)] == self._begin else 0
        return begins, len(ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def holds(context: str, answer: str) -> bool:
    """Whether the words of an answer stand in a context in one piece, whatever their case."""
    words, wanted = (re.findall(r"\w+", text.casefold()) for text in (context, answer))
    size = len(wanted)
    return size > 0 and any(words[n : n + size] == wanted for n in range(len(words) - size + 1))

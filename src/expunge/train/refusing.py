"""A language model behind a filter: what is asked and what is being said, refused with a fixed answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError
from expunge.train.corrupted_prompts import BehindGate, end_of, real_places

NEVER = -1e4
"""Logit of what must not be said beside 0: a probability of 0 in every precision, and no infinity."""


@dataclass
class Row:
    """One text in progress.

    Attributes:
        ids: its real tokens so far.
        start: where its answer begins.
        refused: place of the first token of the refusal, or None as long as nothing was refused.
    """

    ids: list[int] = field(default_factory=list)
    start: int = 0
    refused: int | None = None


@dataclass
class Answering:
    """What is kept of texts in progress, beside the cache of the model inside."""

    inner: Any
    rows: list[Row]


class Phrases:
    """Phrases of token ids, looked up by all but their last token."""

    def __init__(self, phrases: Sequence[Sequence[int]]) -> None:
        """Keep them; none may be empty."""
        self.ends: dict[tuple[int, ...], set[int]] = {}
        for *begin, end in phrases:
            self.ends.setdefault(tuple(begin), set()).add(end)
        self._sizes = sorted({len(begin) for begin in self.ends})

    def completing(self, ids: Sequence[int]) -> list[int]:
        """Tokens that would complete a phrase after these."""
        begins = [tuple(ids[len(ids) - n :]) for n in self._sizes if n <= len(ids)]
        return sorted(set().union(*(self.ends.get(begin, set()) for begin in begins)))

    def within(self, ids: Sequence[int]) -> bool:
        """Whether one stands in the ids, in one piece."""
        return any(t in self.completing(ids[:n]) for n, t in enumerate(ids))


class Refusing(BehindGate):
    """A language model that answers with a refusal where a prompt or an answer is not allowed.

    A prompt ends where the ending that all known prompts share was last seen, or with the sequence. A
    flagged prompt is followed by the refusal, whatever is read in its place. In an answer the token that
    would complete a blocked phrase cannot be said; where it is the likeliest, the refusal begins. Rows of
    which neither is true keep every bit. `past_key_values` also holds the texts so far.
    """

    def __init__(self, model: nn.Module, settings: Tensor, keys: Tensor, weights: Tensor) -> None:
        """Wrap; see `BehindGate`.

        Beside the gate's rule, the settings are `gated` (whether the gate is asked), `refusal`,
        `asked` and `said` (token ids of phrases that a prompt or an answer must not hold).
        """
        super().__init__(model, settings, keys, weights)
        self._asked, self._said = (Phrases(self.settings[side]) for side in ("asked", "said"))

    def forward(self, *args: Tensor, past_key_values: Any = None, **inputs: Any) -> Any:
        """Run the model inside and overrule it where it must not answer.

        Raises:
            ModelError: embeddings are given in place of token ids, a cache that this model did not
                give, or labels, whose loss would be that of the model inside.
        """
        ids = args[0] if args else inputs.get("input_ids")
        if ids is None:
            raise ModelError("the guard looks at token ids; pass input_ids=, not embeddings")
        if inputs.get("labels") is not None:
            raise ModelError("the guard changes logits; take the loss of them, without labels=")
        if past_key_values is not None and not isinstance(past_key_values, Answering):
            raise ModelError("the guard keeps texts with the cache; begin without one")
        state = past_key_values or Answering(None, [Row() for _ in range(len(ids))])
        places = self._read(ids, inputs.get("attention_mask"), state.rows, past_key_values is None)
        last = int(inputs.get("logits_to_keep") or 0)
        if last and self._said.ends and past_key_values is None:
            # an answer that is read along may have been refused before its last token
            del inputs["logits_to_keep"]
        if state.inner is not None:
            inputs["past_key_values"] = state.inner
        output = self.unwrapped(*args, **inputs)
        logits = getattr(output, "logits", output)
        new = self._overruled(logits, ids.shape[1], places, state.rows)
        new = new[:, -last:] if last else new
        if isinstance(output, Tensor):
            return new
        output = copy.copy(output)
        output.logits = new
        if getattr(output, "past_key_values", None) is not None:
            output.past_key_values = Answering(output.past_key_values, state.rows)
        return output

    def flagged(self, prompt: Tensor) -> bool:
        """Whether a prompt's token ids [T] are answered with the refusal."""
        if self._asked.within(prompt.tolist()):
            return True
        return bool(self.settings["gated"]) and super().flagged(prompt)

    def says(self, answer: Tensor) -> bool:
        """Whether an answer's token ids [T] hold what must not be said."""
        return self._said.within(answer.tolist())

    def _read(
        self, ids: Tensor, mask: Tensor | None, rows: list[Row], fresh: bool
    ) -> list[list[tuple[int, int]]]:
        """Take new tokens [B, T] in; of each row, columns and places of the real ones."""
        found = []
        for row, own, there in zip(rows, ids.tolist(), real_places(ids, mask), strict=True):
            columns = there.tolist()
            found.append([(c, len(row.ids) + n) for n, c in enumerate(columns)])
            row.ids += [own[c] for c in columns]
            if fresh:
                row.start = end_of(torch.tensor(row.ids), self.settings["ending"])
                if self.flagged(torch.tensor(row.ids[: row.start])):
                    row.refused = row.start
        return found

    def _overruled(
        self, logits: Tensor, width: int, places: list[list[tuple[int, int]]], rows: list[Row]
    ) -> Tensor:
        """Logits [B, K, V] of the last K of the columns; the same object where all may be said."""
        before, new = width - logits.shape[1], logits
        for number, (row, own) in enumerate(zip(rows, places, strict=True)):
            for column, place in own:
                if column < before:
                    continue
                now, at = place + 1, (number, column - before)
                barred: list[int] = []
                if row.refused is None and now >= row.start:
                    barred = self._said.completing(row.ids[row.start : now])
                    if barred and int(logits[at].argmax()) in barred:
                        row.refused = now
                refuse = row.refused is not None and now >= row.refused
                # where a prompt ends is not known without an ending: an answer may be in it
                refuse |= row.refused == row.start == len(row.ids) and not self.settings["ending"]
                if not refuse and not barred:
                    continue
                new = logits.clone() if new is logits else new
                if refuse:
                    new[at] = NEVER
                    new[at][self._refusal(max(now - (row.refused or 0), 0))] = 0.0
                else:
                    new[at][barred] = NEVER
        return new

    def _refusal(self, place: int) -> int:
        refusal: list[int] = self.settings["refusal"]
        return refusal[min(place, len(refusal) - 1)]

"""Sequences of token ids with stable ids: what a language model's data is made of.

Of each sequence some tokens are *answered*: the loss is taken at them alone. A batch holds
`x = {input_ids, attention_mask}` [B, T] and `y` [B, T], the ids of answered tokens and `IGNORED`
elsewhere; sequences are padded on the right to the longest of their batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from expunge.core.data import Batch, Data
from expunge.core.errors import DataError, NeedsError
from expunge.core.hashing import content_key, hash_tensors
from expunge.train.token_losses import IGNORED


@dataclass(frozen=True)
class Tokens:
    """One sequence: token `ids` [T], and which of them are `answered` [T].

    `marked` [T] are the tokens of a sensitive span, where the data knows of one.
    """

    ids: Tensor
    answered: Tensor
    marked: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.ids)

    @property
    def prompt(self) -> Tensor:
        """Ids before the first answered token; all of them if none is."""
        places = self.answered.nonzero()
        return self.ids[: int(places[0])] if len(places) else self.ids

    @property
    def answer(self) -> Tensor:
        """Ids of the answered tokens."""
        return self.ids[self.answered]

    @property
    def asked(self) -> tuple[Tensor, Tensor]:
        """Ids of the prompt and of the answer; of a text without a prompt, its two halves."""
        if len(self.prompt):
            return self.prompt, self.answer
        half = len(self) // 2
        return self.ids[:half], self.ids[half:]


def pad(rows: Sequence[Tokens], filler: int) -> tuple[dict[str, Tensor], Tensor]:
    """Pad sequences on the right to the longest of them.

    Args:
        rows: at least one.
        filler: token id of the padding, which no token attends to.

    Returns:
        `{input_ids, attention_mask}` [B, T], and labels [B, T].
    """
    width = max(map(len, rows))
    shape = (len(rows), width)
    inputs, labels = torch.full(shape, filler), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, tokens in enumerate(rows):
        length = len(tokens)
        inputs[row, :length] = tokens.ids
        mask[row, :length] = 1
        labels[row, :length] = torch.where(tokens.answered, tokens.ids, IGNORED)
    return {"input_ids": inputs, "attention_mask": mask}, labels


def unpadded(batch: Batch) -> list[Tokens]:
    """The sequences of a batch with labels, on CPU: what `pad` made it of."""
    assert batch.y is not None
    real = batch.x["attention_mask"].bool().cpu()
    columns = zip(batch.x["input_ids"].cpu(), batch.y.cpu(), real, strict=True)
    return [Tokens(ids[there], labels[there] != IGNORED) for ids, labels, there in columns]


class _Rows(Dataset[Any]):
    def __init__(self, rows: Sequence[Tokens]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> tuple[Tokens, None]:
        return self.rows[place], None


class TokenData(Data):
    """Samples that are sequences of tokens of different lengths."""

    def __init__(
        self,
        rows: Sequence[Tokens],
        *,
        filler: int = 0,
        ids: Sequence[int] | Tensor | None = None,
        names: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        alternates: Sequence[Sequence[Tokens]] | None = None,
    ) -> None:
        """Wrap sequences.

        Args:
            rows: one sequence a sample.
            filler: token id of the padding.
            ids: stable integer ids; positions when left out.
            names: outside names that a request may use.
            columns: further per-sample values that a request's `where=` may use.
            alternates: other sequences for each sample, such as refusals or perturbed answers.

        Raises:
            DataError: a sequence is empty or has no answered token after its first, or its marks or
                the alternates are not as many as they should be.
        """
        for place, row in enumerate(rows):
            if row.marked is not None and len(row.marked) != len(row):
                raise DataError(
                    f"sample {place} has {len(row)} tokens but marks for {len(row.marked)}"
                )
            if len(row) < 2 or not bool(row.answered[1:].any()):
                raise DataError(
                    f"sample {place} has no token to answer; a loss needs one after the first"
                )
        if alternates is not None and len(alternates) != len(rows):
            raise DataError(f"{len(rows)} samples but alternates for {len(alternates)}")
        super().__init__(_Rows(rows), ids=ids, names=names, columns=columns)
        self.rows, self.filler = list(rows), filler
        self.alternates = None if alternates is None else [list(a) for a in alternates]
        self._labels, self._labels_known = None, True

    @property
    def labelled(self) -> bool:
        """Always: what is to be said is its own label."""
        return True

    def only(self, ids: Tensor) -> TokenData:
        """Return the data of some samples alone, in order of their ids."""
        places = self.positions(ids.sort().values)
        alternates = self.alternates
        return TokenData(
            [self.rows[p] for p in places.tolist()],
            filler=self.filler,
            alternates=None if alternates is None else [alternates[p] for p in places.tolist()],
            **self._kept(places),
        )

    def fetch(self, ids: Tensor) -> Batch:
        """Read the samples `ids` into one batch padded to its longest, in that order."""
        return self._batch([self.rows[p] for p in self.positions(ids).tolist()], ids)

    def fetch_alternates(self, ids: Tensor, turn: int = 0) -> Batch:
        """Read an alternate of each sample; the next one every turn, the first after the last.

        Raises:
            NeedsError: there are none for a sample.
        """
        places = self.positions(ids).tolist()
        if self.alternates is None or not all(self.alternates[p] for p in places):
            raise NeedsError(
                "the data has no alternate answers; give each sample a column `alternate` with a "
                "text or a list of texts"
            )
        chosen = [self.alternates[p][turn % len(self.alternates[p])] for p in places]
        return self._batch(chosen, ids)

    def marks(self, ids: Tensor, width: int) -> Tensor:
        """Whether a token [B, width] belongs to a sensitive span; none does where nothing is known."""
        found = torch.zeros(len(ids), width, dtype=torch.bool)
        for row, place in enumerate(self.positions(ids).tolist()):
            marked = self.rows[place].marked
            if marked is not None:
                found[row, : len(marked)] = marked
        return found

    def fingerprint(self) -> str:
        """SHA-256 over ids, tokens, what is answered and what is marked."""
        found = super().fingerprint()
        marked = {
            str(place): row.marked
            for place, row in enumerate(self.rows)
            if row.marked is not None and bool(row.marked.any())
        }
        return content_key([found, hash_tensors(marked)]) if marked else found

    def _batch(self, rows: list[Tokens], ids: Tensor) -> Batch:
        # one process' share of a small batch may be empty; its shape still has to be right
        x, y = pad(rows or self.rows[:1], self.filler)
        count = len(ids)
        return Batch({k: v[:count] for k, v in x.items()}, y[:count], ids, count)


def joined(parts: Sequence[TokenData]) -> TokenData:
    """Return several data sets as one, sorted by id.

    Args:
        parts: at least one; ids are unique over all of them, columns those of the first.

    Returns:
        The data; a sample without alternates has none where another part has some.

    Raises:
        DataError: the columns differ, or an id occurs twice.
    """
    first = parts[0]
    for part in parts[1:]:
        if sorted(part.columns) != sorted(first.columns):
            raise DataError(
                f"parts with columns {', '.join(sorted(first.columns))} and "
                f"{', '.join(sorted(part.columns))} cannot be joined"
            )
    ids = torch.cat([part.ids for part in parts])
    order = ids.argsort().tolist()
    rows = [row for part in parts for row in part.rows]
    alternates = [a for part in parts for a in part.alternates or [[] for _ in part.rows]]
    columns = {
        name: [value for part in parts for value in part.columns[name].tolist()]
        for name in first.columns
    }
    return TokenData(
        [rows[n] for n in order],
        filler=first.filler,
        ids=ids[order],
        columns={name: [values[n] for n in order] for name, values in columns.items()},
        alternates=[alternates[n] for n in order] if any(alternates) else None,
    )

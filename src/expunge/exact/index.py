"""Which sample lies in which slice, and salted commitments to what a slice holds."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expunge.core.data import Data
from expunge.core.errors import DataError, SettingError
from expunge.core.hashing import canonical, hash_tensors

NOWHERE = -1


@dataclass(frozen=True)
class Index:
    """Place of every sample.

    Attributes:
        ids: sorted stable ids [N].
        shard: of each [N].
        piece: slice of each [N] within its shard; −1 for one deleted before its shard was retrained.
        salt: secret of the commitments; without it they say nothing about ids.
    """

    ids: np.ndarray
    shard: np.ndarray
    piece: np.ndarray
    salt: bytes

    @classmethod
    def of(cls, ids: Tensor, shards: int, slices: int, generator: torch.Generator) -> Index:
        """Put samples into slices of equal size at random; where one lies depends on ids alone.

        Raises:
            SettingError: there are fewer samples than slices.
        """
        ordered = np.sort(ids.numpy())
        if len(ordered) < shards * slices:
            raise SettingError(
                f"{len(ordered)} samples cannot fill {shards} shards of {slices} slices"
            )
        shard, piece = (np.empty(len(ordered), dtype=np.int32) for _ in range(2))
        order = torch.randperm(len(ordered), generator=generator).numpy()
        for number, part in enumerate(np.array_split(order, shards * slices)):
            shard[part], piece[part] = divmod(number, slices)
        return cls(ordered, shard, piece, secrets.token_bytes(32))

    def find(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Positions [n] of ids, and whether each is there."""
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        return places, self.ids[places] == wanted

    def members(self, shard: int, piece: int, deleted: np.ndarray) -> Tensor:
        """Sorted ids of a slice that are not deleted."""
        chosen = (self.shard == shard) & (self.piece == piece) & ~deleted
        return torch.from_numpy(self.ids[chosen])

    def resliced(
        self, shard: int, slices: int, deleted: np.ndarray, generator: torch.Generator | None
    ) -> Index:
        """The index with a shard's undeleted samples in new slices; without a generator in their old.

        Raises:
            DataError: fewer samples than slices are left.
        """
        own = self.shard == shard
        kept = np.flatnonzero(own & ~deleted)
        piece = self.piece.copy()
        piece[own & deleted] = NOWHERE
        if generator is not None:
            if len(kept) < slices:
                raise DataError(
                    f"shard {shard} has {len(kept)} samples left, too few for {slices} slices"
                )
            order = kept[torch.randperm(len(kept), generator=generator).numpy()]
            for number, part in enumerate(np.array_split(order, slices)):
                piece[part] = number
        return Index(self.ids, self.shard, piece, self.salt)

    def commit(self, content: Sequence[object]) -> str:
        """HMAC-SHA-256 of something under the salt: names it to nobody who lacks the salt."""
        return hmac.new(self.salt, canonical(list(content)), hashlib.sha256).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """The index as it is stored."""
        salt = np.frombuffer(self.salt, dtype=np.uint8).copy()
        arrays = {"ids": self.ids, "shard": self.shard, "slice": self.piece, "salt": salt}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> Index:
        """Undo `tensors`."""
        ids, shard, piece, salt = (tensors[n].numpy() for n in ("ids", "shard", "slice", "salt"))
        return cls(ids, shard, piece, salt.tobytes())


def digests(data: Data) -> dict[int, str]:
    """SHA-256 of every sample's inputs and label by id; the id itself does not enter."""
    return dict(_digests(data))


def _digests(data: Data) -> Iterator[tuple[int, str]]:
    # texts one by one, since a batch of them is padded to its longest
    size = 256 if isinstance(data.fetch(data.ids[:1]).x, Tensor) else 1
    for batch in data.batches(size):
        for place, id_ in enumerate(batch.ids.tolist()):
            one = batch.rows(slice(place, place + 1))
            parts = {"x": one.x} if size > 1 else {f"x.{n}": t for n, t in one.x.items()}
            yield id_, hash_tensors(parts | ({} if one.y is None else {"y": one.y}))

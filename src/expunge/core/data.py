"""Data with stable ids: every sample carries its id in every batch.

`Data` wraps `(X, y)` tensors or a map-style torch `Dataset`. Nothing downstream derives an id
from a loader's order; a batch says which samples it holds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from expunge.core.errors import DataError, RequestError
from expunge.core.hashing import hash_array, hash_tensors

Inputs = Tensor | Mapping[str, Tensor]


def map_inputs(x: Inputs, f: Callable[[Tensor], Tensor]) -> Any:
    """Apply `f` to a tensor or to every tensor of a mapping of inputs."""
    if isinstance(x, Tensor):
        return f(x)
    return {name: f(value) for name, value in x.items()}


def look_up(ordered: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Find ids [n] among sorted ids [N] in n log N: their places, and whether each is there."""
    if not len(ordered):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    # a process' share of ids is every so many of them
    places = torch.searchsorted(ordered, wanted.contiguous()).clamp_(max=len(ordered) - 1)
    return places, ordered[places] == wanted


@dataclass(frozen=True)
class Batch:
    """Some samples: inputs `x` [B, …], labels `y` [B] or None where withheld, stable `ids` [B].

    `total` is the size of the whole batch over all processes (equal to B in one process).
    """

    x: Any
    y: Tensor | None
    ids: Tensor
    total: int = 0
    processes: int = 1

    def __len__(self) -> int:
        """Return the number of samples in this process' share."""
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """Move inputs, labels and ids to a device."""
        y = None if self.y is None else self.y.to(device)
        return replace(
            self, x=map_inputs(self.x, lambda t: t.to(device)), y=y, ids=self.ids.to(device)
        )

    def labelled(self, y: Tensor) -> Batch:
        """Return the batch with other labels `y` [B]."""
        return replace(self, y=y)

    def joined(self, other: Batch) -> Batch:
        """Return both batches as one; labels stay only if both have them."""
        x = (
            torch.cat([self.x, other.x])
            if isinstance(self.x, Tensor)
            else {k: torch.cat([v, other.x[k]]) for k, v in self.x.items()}
        )
        y = None if self.y is None or other.y is None else torch.cat([self.y, other.y])
        ids = torch.cat([self.ids, other.ids])
        return replace(self, x=x, y=y, ids=ids, total=self.total + other.total)

    def rows(self, part: slice | Tensor) -> Batch:
        """Return some samples; the piece stands for itself, so its mean is over its own samples.

        Args:
            part: a slice, a mask [B] or places.
        """
        ids = self.ids[part]
        y = None if self.y is None else self.y[part]
        x = map_inputs(self.x, lambda t: t[part])
        return replace(self, x=x, y=y, ids=ids, total=len(ids), processes=1)

    def mean(self, each: Tensor) -> Tensor:
        """Mean of per-sample values over the *whole* batch, whatever share this process holds.

        Gradients are averaged over P processes, so a share is scaled by P / total.

        Args:
            each: per-sample values [B].

        Returns:
            A scalar; equal to `each.mean()` in one process.
        """
        if self.processes == 1:
            return each.mean()
        return each.sum() * (self.processes / self.total)


class Data:
    """Samples with stable integer ids, optional labels, optional names and further columns."""

    def __init__(
        self,
        source: Dataset[Any] | tuple[Any, Any] | Tensor,
        *,
        ids: Sequence[int] | Tensor | None = None,
        names: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Wrap a source.

        Args:
            source: a map-style torch `Dataset` of `(x, y)`, a pair `(X, y)` of arrays or tensors
                (y may be None), or inputs alone.
            ids: stable integer ids, one a sample; positions when left out.
            names: outside names (file names, user keys) that a request may use instead of ids.
            columns: further per-sample values that a request's `where=` may use.

        Raises:
            DataError: sizes disagree, ids repeat, inputs or labels hold NaN or infinite values, or
                the source is empty.
        """
        self._dataset: Dataset[Any] | None = None
        self._x: Any = None
        self._labels: Tensor | None = None
        if isinstance(source, Dataset):
            if not hasattr(source, "__len__"):
                raise DataError("the data has no length; a map-style Dataset is needed")
            self._dataset = source
            self._length = len(source)
            self._labels_known = False
        else:
            x, y = source if isinstance(source, tuple) else (source, None)
            try:
                self._x = _tensors(x)
                self._labels = None if y is None else _labels([y])[0]
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(f"the data cannot be read as numbers ({error})") from error
            lengths = {len(t) for t in (self._x.values() if isinstance(x, Mapping) else [self._x])}
            if len(lengths) != 1:
                raise DataError(f"the inputs differ in their number of samples: {sorted(lengths)}")
            self._length = lengths.pop()
            self._labels_known = True
        if not self._length:
            raise DataError("the data holds no samples")
        if self._labels is not None and len(self._labels) != self._length:
            raise DataError(f"{self._length} inputs but {len(self._labels)} labels")
        self.ids = torch.arange(self._length) if ids is None else torch.as_tensor(ids).long()
        if len(self.ids) != self._length or len(self.ids.unique()) != self._length:
            raise DataError("ids must be unique and as many as the samples")
        self.names = None if names is None else list(names)
        if self.names is not None and len(set(self.names)) != self._length:
            raise DataError("names must be unique and as many as the samples")
        self.columns = {k: np.asarray(v) for k, v in (columns or {}).items()}
        for column, values in self.columns.items():
            if len(values) != self._length:
                raise DataError(
                    f"column {column!r} has {len(values)} values for {self._length} samples"
                )
        self._sorted, self._order = self.ids.sort()
        self._fingerprint: str | None = None
        self._described: dict[str, str | None] | None = None

    @classmethod
    def of(cls, source: Any) -> Data:
        """Return `source` itself if it is `Data`, else wrap it."""
        return source if isinstance(source, Data) else cls(source)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._length

    @property
    def labels(self) -> Tensor | None:
        """Labels [N] in the order of `ids`, or None; a `Dataset` is read once for them."""
        if not self._labels_known:
            targets = getattr(self._dataset, "targets", None)
            changed = getattr(self._dataset, "target_transform", None) is not None
            if targets is not None and len(targets) == self._length and not changed:
                self._labels = _labels([targets])[0]
            else:
                labels = [self._item(p)[1] for p in range(self._length)]
                if not any(y is None for y in labels):
                    self._labels = torch.stack(_labels(labels))
            self._labels_known = True
        return self._labels

    @property
    def labelled(self) -> bool:
        """Whether a loss can be taken: there are labels, or a sample brings its own."""
        return self.labels is not None

    def labels_of(self, ids: Tensor) -> Tensor:
        """Labels of the samples `ids`, in that order.

        Raises:
            DataError: the data has no labels.
        """
        if self.labels is None:
            raise DataError("the data has no labels")
        return self.labels[self.positions(ids)]

    def positions(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Positions of stable ids.

        Raises:
            RequestError: an id is not in the data.
        """
        wanted = ids if isinstance(ids, Tensor) else torch.tensor([int(i) for i in ids])
        places, there = look_up(self._sorted, wanted.long())
        if not bool(there.all()):
            missing = wanted[~there].tolist()
            raise RequestError(f"{_some(missing)} not in the data of {len(self)} samples")
        return self._order[places]

    def ids_of(self, wanted: Sequence[int | str]) -> Tensor:
        """Stable ids for a mixture of ids and outside names.

        Raises:
            RequestError: something wanted is not in the data.
        """
        by_name = (
            {} if self.names is None else dict(zip(self.names, self.ids.tolist(), strict=True))
        )
        known = set(self.ids.tolist())
        found, missing = [], []
        for item in wanted:
            if isinstance(item, str) and item in by_name:
                found.append(by_name[item])
            elif _is_int(item) and int(item) in known:
                found.append(int(item))
            else:
                missing.append(item)
        if missing:
            raise RequestError(f"{_some(missing)} not in the data of {len(self)} samples")
        return torch.tensor(sorted(set(found)), dtype=torch.long)

    def fetch(self, ids: Tensor) -> Batch:
        """Read the samples `ids` into one batch, in that order."""
        positions = self.positions(ids)
        if self._dataset is None:
            # whole rows: several times as fast as an index that could be anything
            y = None if self._labels is None else self._labels.index_select(0, positions)
            x = map_inputs(self._x, lambda t: t.index_select(0, positions))
            return Batch(x, y, ids, len(ids))
        # one process' share of a small batch may be empty; its shape still has to be right
        items = [self._item(int(p)) for p in positions] or [self._item(0)]
        first = items[0][0]
        x = (
            {k: torch.stack([item[0][k] for item in items])[: len(ids)] for k in first}
            if isinstance(first, Mapping)
            else torch.stack([item[0] for item in items])[: len(ids)]
        )
        y = None
        if items[0][1] is not None:
            y = torch.stack(_labels([item[1] for item in items]))[: len(ids)]
        return Batch(x, y, ids, len(ids))

    def batches(
        self, size: int, ids: Tensor | None = None, shuffle: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Yield batches over `ids` (all by default), shuffled if a generator is given."""
        ids = self.ids if ids is None else ids
        if shuffle is not None:
            ids = ids[torch.randperm(len(ids), generator=shuffle)]
        for chunk in ids.split(size):
            yield self.fetch(chunk)

    def without(self, ids: Tensor) -> Tensor:
        """Ids of all samples but `ids`, sorted."""
        return self.ids[~torch.isin(self.ids, ids)].sort().values

    def only(self, ids: Tensor) -> Data:
        """Return the data of some samples alone, in order of their ids."""
        places = self.positions(ids.sort().values)
        source: Any = (
            (map_inputs(self._x, lambda t: t[places]), None if self._labels is None else self._labels[places])
            if self._dataset is None
            else Subset(self._dataset, places.tolist())
        )  # fmt: skip
        part = Data(source, **self._kept(places))
        if self._labels_known or getattr(self._dataset, "targets", None) is not None:
            # a subset does not hand its labels on, and reading them opens every image
            part._labels = None if self.labels is None else self.labels[places]
            part._labels_known = True
        return part

    def joined(self, other: Data) -> Data:
        """Return these samples and then another's as one, under new ids 0, 1, …, without columns."""
        if self._dataset is None and other._dataset is None:
            both = self.fetch(self.ids).joined(other.fetch(other.ids))
            return Data((both.x, both.y))
        return Data(ConcatDataset([_Samples(self), _Samples(other)]))

    def _kept(self, places: Tensor) -> dict[str, Any]:
        """Ids, names and columns at some positions, as arguments."""
        return {
            "ids": self.ids[places],
            "names": None if self.names is None else [self.names[p] for p in places.tolist()],
            "columns": {n: v[places.numpy()] for n, v in self.columns.items()},
        }

    def table(self) -> dict[str, np.ndarray]:
        """Columns that a request's `where=` may name: id, label (also as y), name and further ones."""
        table = dict(self.columns, id=self.ids.numpy())
        if self.labels is not None:
            labels = self.labels
            # numpy has no bfloat16, and comparisons with it go on in float32
            table["label"] = (labels.float() if labels.dtype == torch.bfloat16 else labels).numpy()
            table.setdefault("y", table["label"])  # what a regression target is usually called
        if self.names is not None:
            table["name"] = np.asarray(self.names)
        return table

    def fingerprint(self) -> str:
        """SHA-256 over ids, inputs and labels; read once and kept."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for batch in self.batches(256):
                parts = {"ids": batch.ids}
                if isinstance(batch.x, Tensor):
                    parts["x"] = batch.x
                else:
                    parts |= {f"x.{name}": value for name, value in batch.x.items()}
                if batch.y is not None:
                    parts["y"] = batch.y
                digest.update(hash_tensors(parts).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def described(self) -> dict[str, str | None]:
        """Hashes of the names and of each column, which audits may read; taken once and kept."""
        if self._described is None:
            names = None if self.names is None else hash_array(np.asarray(self.names, object))
            self._described = {"names": names}
            self._described |= {f"column {n}": hash_array(v) for n, v in self.columns.items()}
        return dict(self._described)

    def _item(self, position: int) -> tuple[Any, Any]:
        item = self._dataset[position]  # type: ignore[index]
        x, y = (*item, None)[:2] if isinstance(item, (tuple, list)) else (item, None)
        return _tensors(x), y


class _Samples(Dataset[Any]):
    """Data of any kind by position, read when it is asked for."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, position: int) -> tuple[Any, Any]:
        one = self._data.fetch(self._data.ids[position : position + 1])
        return map_inputs(one.x, lambda t: t[0]), None if one.y is None else one.y[0]


def _tensors(x: Any) -> Any:
    if isinstance(x, Mapping):
        return {name: _require_finite(torch.as_tensor(value)) for name, value in x.items()}
    return _require_finite(torch.as_tensor(x))


def _labels(values: Sequence[Any]) -> list[Tensor]:
    """Labels as tensors: whole numbers of any width as 64 bits, which losses ask for."""
    tensors = [_require_finite(torch.as_tensor(y)) for y in values]
    return [t if t.is_floating_point() else t.long() for t in tensors]


def _require_finite(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise DataError("the data holds NaN or infinite values; clean it first")
    return tensor


def _is_int(item: int | str) -> bool:
    if isinstance(item, str):
        return re.fullmatch(r"-?[0-9]+", item) is not None
    # a truth value is not an id: a mask would silently stand for samples 0 and 1
    return isinstance(item, (int, np.integer)) and not isinstance(item, bool)


def _some(items: Sequence[Any], show: int = 5) -> str:
    listed = ", ".join(repr(i) for i in items[:show])
    more = f" and {len(items) - show} more" if len(items) > show else ""
    return (
        f"{'id' if len(items) == 1 else 'ids'} {listed}{more} {'is' if len(items) == 1 else 'are'}"
    )

r"""What each optimiser step of a training changed, and which samples were in its batch.

\[ \Delta_b = \theta_{\text{after } b} - \theta_{\text{before } b}, \qquad
   \theta_{\text{end}} = \theta_{\text{start}} + \sum_b \Delta_b \]

`UpdateRecorder` writes while a model trains, `UpdateLog` reads: it adds the updates of the batches that
held some samples, one tensor at a time, from files that are mapped, not loaded.

Layout of a folder: `updates-00000.safetensors`, … with `update/NAME` [k, *shape of NAME] for k steps
each (and `scale/NAME` [k] in half precision), and `index.safetensors`, written last: `counts` [S] and
`members` (the ids of all stored batches, one after the other), `steps`, `sensitive` if only some
samples count, and `end/NAME`, the weights that the training ended at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.core.errors import DataError, ExpungeError, StoreError

Storage = Literal["float32", "float16"]
Shard = dict[str, Tensor] | Path

CHUNK = 2**26
"""Bytes of updates that are held before they go to a file."""


class UpdateRecorder:
    """Records updates: in a training loop of your own, or in `SupervisedRecipe.train(around=…)`.

    ```python
    recorder = UpdateRecorder("updates")
    for ids, x, y in loader:
        with recorder.step(model, ids):
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    recorder.finish(model)
    ```
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        sensitive: Tensor | None = None,
        storage: Storage = "float32",
    ) -> None:
        """Begin a log.

        Args:
            folder: where it goes; None keeps it in memory.
            sensitive: ids of the samples that may have to be forgotten; only batches with one of
                them are stored, and only these ids of a batch. None: all.
            storage: `float16` halves the size; each tensor of each step is scaled by its largest
                entry, so that small updates do not vanish.

        Raises:
            StoreError: the folder holds a log, or cannot be written.
        """
        self.sensitive = None if sensitive is None else torch.as_tensor(sensitive).long().unique()
        self.storage = storage
        self._folder = None if folder is None else Path(folder)
        self._shards: list[Shard] = []
        self._rows: list[dict[str, Tensor]] = []
        self._held = 0
        self._batches: list[Tensor] = []
        self._steps = 0
        if self._folder is not None:
            if any(self._folder.glob("*.safetensors")):
                raise StoreError(f"{folder} holds a log of updates already; use another folder")
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"{folder} cannot be written ({error})") from error

    @contextlib.contextmanager
    def step(self, model: nn.Module, ids: Tensor) -> Iterator[None]:
        """Enclose one optimiser step: its batch, its backward pass and the step itself.

        Args:
            model: whose parameters the step moves, as it will be at the end (not wrapped).
            ids: stable ids [B] of the batch.

        Raises:
            ExpungeError: an update is not finite.
            StoreError: the folder cannot be written.
        """
        ids = torch.as_tensor(ids).long().cpu()
        if self.sensitive is not None:
            ids = ids[torch.isin(ids, self.sensitive)]
        moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
        before = {n: p.detach().clone() for n, p in moving.items()} if len(ids) else {}
        yield
        self._steps += 1
        if not len(ids):
            return
        row: dict[str, Tensor] = {}
        for name, old in before.items():
            wide = torch.promote_types(old.dtype, torch.float32)
            delta = (moving[name].detach().to(wide) - old.to(wide)).float().cpu()
            row |= _packed(name, delta, self.storage)
        if not all(bool(t.isfinite().all()) for t in row.values()):
            raise ExpungeError(f"the update of step {self._steps} is not finite; lower lr")
        if self._rows and self._rows[-1].keys() != row.keys():  # other weights move from here on
            self._flush()
        self._rows.append(row)
        self._batches.append(ids)
        self._held += sum(t.nbytes for t in row.values())
        if self._held >= CHUNK:
            self._flush()

    def finish(self, model: nn.Module) -> UpdateLog:
        """End the log with the weights that the training ended at.

        Args:
            model: after the last step; its buffers are not recorded.

        Returns:
            The log.

        Raises:
            StoreError: the folder cannot be written.
        """
        self._flush()
        index = {f"end/{n}": p.detach().cpu().clone() for n, p in model.named_parameters()}
        index["steps"] = torch.tensor(self._steps)
        index["counts"] = torch.tensor([len(b) for b in self._batches], dtype=torch.long)
        index["members"] = torch.cat([torch.empty(0, dtype=torch.long), *self._batches])
        if self.sensitive is not None:
            index["sensitive"] = self.sensitive
        if self._folder is not None:
            _write(index, self._folder / "index.safetensors")
        return UpdateLog(index, tuple(self._shards))

    def _flush(self) -> None:
        if not self._rows:
            return
        stacked = {k: torch.stack([row[k] for row in self._rows]) for k in self._rows[0]}
        if self._folder is None:
            self._shards.append(stacked)
        else:
            path = self._folder / f"updates-{len(self._shards):05d}.safetensors"
            _write(stacked, path)
            self._shards.append(path)
        self._rows, self._held = [], 0


@dataclass(frozen=True)
class UpdateLog:
    """The updates of one training.

    Attributes:
        index: what belongs to all steps, by name (see the head of this module).
        shards: updates of some steps each: tensors, or the file that holds them.
    """

    index: Mapping[str, Tensor]
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: str | Path) -> UpdateLog:
        """Open what a recorder wrote; updates are read when they are asked for.

        Raises:
            StoreError: there is no finished log, or a file of it is missing.
        """
        folder = Path(folder)
        try:
            log = cls(
                load_file(folder / "index.safetensors"),
                tuple(sorted(folder.glob("updates-*.safetensors"))),
            )
            complete = sum(log._lengths()) == len(log)
        except (OSError, KeyError, SafetensorError) as error:
            raise StoreError(f"{folder} holds no finished log of updates ({error})") from error
        if not complete:
            raise StoreError(f"{folder} lacks some files of its log of updates")
        return log

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> UpdateLog:
        """Make a log of what `tensors` gave."""
        shards: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            place, _, name = key.partition("/")
            if place.isdigit():
                shards.setdefault(int(place), {})[name] = value
        index = {k: v for k, v in tensors.items() if not k.partition("/")[0].isdigit()}
        return cls(index, tuple(shards[n] for n in sorted(shards)))

    def tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors, in memory."""
        parts = [load_file(s) if isinstance(s, Path) else s for s in self.shards]
        named = {f"{n}/{key}": t for n, part in enumerate(parts) for key, t in part.items()}
        return dict(self.index) | named

    def __len__(self) -> int:
        """Return the number of stored updates."""
        return len(self.index["counts"])

    @property
    def steps(self) -> int:
        """Steps of the whole training, stored or not."""
        return int(self.index["steps"])

    def distance(self, model: nn.Module) -> float:
        """Largest difference of a weight of `model` from where the training ended.

        Returns:
            0 for the same bits; infinity if names or shapes differ or a weight is not a number.
        """
        found = {f"end/{n}": p.detach().cpu() for n, p in model.named_parameters()}
        ends = {k: v for k, v in self.index.items() if k.startswith("end/")}
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in ends.items()}:
            return float("inf")
        away = [(found[k].double() - v.double()).abs().max() for k, v in ends.items() if v.numel()]
        largest = float(torch.stack(away).max()) if away else 0.0
        return largest if largest == largest else float("inf")

    def touching(self, ids: Tensor) -> Tensor:
        """Places [≤ S], ascending, of the stored updates whose batch held one of the samples `ids`.

        Raises:
            DataError: the log was kept for chosen samples, and an id is not among them.
        """
        ids = torch.as_tensor(ids).long().cpu()
        if "sensitive" in self.index:
            other = ids[~torch.isin(ids, self.index["sensitive"])]
            if len(other):
                raise DataError(
                    f"the log was kept for {len(self.index['sensitive'])} chosen samples, and "
                    f"{int(other[0])} is not among them; its batches were not stored"
                )
        owner = torch.repeat_interleave(torch.arange(len(self)), self.index["counts"])
        return owner[torch.isin(self.index["members"], ids)].unique()

    def total(self, ids: Tensor) -> Iterator[tuple[str, Tensor]]:
        r"""Add up \(\sum_{b:\, b \cap \text{ids} \ne \emptyset} \Delta_b\), a parameter at a time.

        Args:
            ids: stable ids of samples.

        Yields:
            Name and sum, float64 with the parameter's shape, of each parameter.

        Raises:
            DataError: see `touching`.
            StoreError: a file cannot be read.
        """
        chosen = self.touching(ids)
        with contextlib.ExitStack() as stack:
            shards = [_opened(stack, shard) for shard in self.shards]
            starts = [0, *torch.tensor(self._lengths()).cumsum(0).tolist()]
            for key, end in self.index.items():
                kind, _, name = key.partition("/")
                if kind != "end":
                    continue
                total = torch.zeros(end.shape, dtype=torch.float64)
                for shard, first, last in zip(shards, starts[:-1], starts[1:], strict=True):
                    for row in (chosen[(chosen >= first) & (chosen < last)] - first).tolist():
                        _add(total, shard, name, row)
                yield name, total

    def _lengths(self) -> list[int]:
        """Number of updates in each shard."""
        lengths = []
        for shard in self.shards:
            if isinstance(shard, Path):
                with safe_open(shard, "pt") as file:
                    lengths.append(file.get_slice(next(iter(file.keys()))).get_shape()[0])
            else:
                lengths.append(len(next(iter(shard.values()))))
        return lengths


def _packed(name: str, delta: Tensor, storage: Storage) -> dict[str, Tensor]:
    """One update in the form it is stored in."""
    if storage == "float32":
        return {f"update/{name}": delta}
    scale = delta.abs().max() if delta.numel() else delta.new_ones(())
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    return {f"update/{name}": (delta / scale).half(), f"scale/{name}": scale}


def _add(total: Tensor, shard: Any, name: str, row: int) -> None:
    """Add one stored update of one parameter to `total`; nothing if it did not move then."""
    if f"update/{name}" not in shard.keys():  # noqa: SIM118  (a file has keys, but no `in`)
        return
    read = shard.__getitem__ if isinstance(shard, dict) else shard.get_slice
    update = read(f"update/{name}")[row : row + 1][0].double()
    if f"scale/{name}" in shard.keys():  # noqa: SIM118
        update *= read(f"scale/{name}")[row : row + 1][0].double()
    total += update


def _opened(stack: contextlib.ExitStack, shard: Shard) -> Any:
    if isinstance(shard, dict):
        return shard
    try:
        return stack.enter_context(safe_open(shard, "pt"))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{shard} cannot be read ({error})") from error


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be written ({error})") from error

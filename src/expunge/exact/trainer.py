"""Trains the stages of shards; what an interrupted training had finished is not trained again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.core.errors import DataError
from expunge.core.hashing import content_key
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.exact.chains import prefixes
from expunge.exact.folder import Folder
from expunge.exact.index import Index
from expunge.exact.manifest import CARRIES, versions
from expunge.exact.settings import WHOLE, Settings
from expunge.exact.slots import Slots
from expunge.exact.stages import Tensors, score, train_stage


class Trainer:
    """What the stages of one training have in common."""

    def __init__(
        self,
        folder: Folder,
        base: nn.Module,
        base_hash: str,
        problem: Problem,
        settings: Settings,
        slots: Slots,
        seed: int,
        runtime: Runtime,
        samples: Mapping[int, str],
    ) -> None:
        """Keep what is needed.

        Args:
            folder: where stages go.
            base: what training starts from.
            base_hash: of its weights.
            problem: data and loss.
            settings: of the training.
            slots: where adapters sit.
            seed: of the whole training.
            runtime: device and progress.
            samples: digest of every sample by id.
        """
        self._folder, self._base, self._problem = folder, base, problem
        self._settings, self._slots, self._runtime, self._samples = (
            settings,
            slots,
            runtime,
            samples,
        )
        self._root = Runtime(seed=seed)
        self._valid = None if problem.valid is None else problem.valid.fingerprint()
        self._common = [
            settings.of_stage(), slots.to_dict(), base_hash, problem.kind, seed, versions(),
            runtime.device, runtime.precision, problem.fingerprint()["functions"],
        ]  # fmt: skip

    def total(self, shards: int) -> int:
        """Number of stages of so many shards."""
        return shards * len(prefixes(self._settings.chosen()))

    def shard(
        self,
        number: int,
        generation: int,
        index: Index,
        deleted: np.ndarray,
        known: Mapping[str, Mapping[str, Any]],
        advance: Any,
    ) -> dict[str, Any]:
        """Train a shard.

        Args:
            number: of the shard.
            generation: how many times it was sliced before.
            index: where samples lie.
            deleted: which of them are deleted [N].
            known: stages that exist, by key; they are taken over.
            advance: called after every stage.

        Returns:
            Its entry in the manifest.

        Raises:
            DataError: a stage would learn nothing, since all its samples are deleted.
        """
        sequences = self._settings.chosen()
        members = [index.members(number, j, deleted) for j in range(self._settings.slices)]
        pieces = [
            {
                "samples": len(ids),
                "ids": index.commit(ids.tolist()),
                "data": index.commit([self._samples[i] for i in ids.tolist()]),
            }
            for ids in members
        ]
        tensors: dict[tuple[int, ...], Tensors] = {}
        stages: dict[tuple[int, ...], dict[str, Any]] = {}
        for prefix in prefixes(sequences):
            saw = prefix if self._settings.data == "cumulative" else prefix[-1:]
            ids = torch.cat([members[j] for j in saw])
            if not len(ids):
                raise DataError(
                    f"slice {prefix[-1]} of shard {number} has no samples left; retrain it with new slices"
                )
            parent = stages[prefix[:-1]]["tensors"] if len(prefix) > 1 else None
            seed = self._root.seed_for("exact", number, generation, *prefix)
            commits = [pieces[j]["data"] for j in saw]
            key = content_key([self._common, seed, prefix, commits, parent])
            noted = content_key([key, self._valid])  # with another score it is another's
            found = known.get(key) or self._folder.noted(noted)
            if found is None:
                whole = self._settings.adapter == WHOLE
                names = [prefix[:k] for k in range(len(prefix) - 1 if whole else 1, len(prefix))]
                before = [self._of(p, stages, tensors) for p in names if p]
                name, start = f"stage-{key[:16]}", time.perf_counter()
                new, model = train_stage(
                    self._base, self._problem, self._settings, self._slots, before, ids, seed,
                    self._runtime, name,
                )  # fmt: skip
                seconds = time.perf_counter() - start
                digest, file = self._folder.put(new)
                found = {
                    "prefix": prefix, "parent": parent, "tensors": digest, "file": file, "key": key,
                    "seed": seed, "saw": [pieces[j]["ids"] for j in saw], "samples": len(ids),
                    "seconds": seconds, "score": score(self._problem, model), "carries": CARRIES,
                }  # fmt: skip
                self._folder.note(noted, found)
                if self._runtime.checkpoint is not None:  # a copy that no deletion would erase
                    (self._runtime.checkpoint / f"{name}.pt").unlink(missing_ok=True)
            stages[prefix] = dict(found)
            advance()
        return {
            "generation": generation,
            "sequences": [list(s) for s in sequences],
            "slices": pieces,
            "stages": [stages[p] for p in stages],
        }

    def _of(
        self,
        prefix: tuple[int, ...],
        stages: Mapping[tuple[int, ...], Mapping[str, Any]],
        tensors: dict[tuple[int, ...], Tensors],
    ) -> Tensors:
        """Tensors of a stage before, from disk as a resumed training would have them."""
        if self._settings.adapter == WHOLE:
            tensors.clear()  # whole models are large, and only the parent's is asked for
        if prefix not in tensors:
            tensors[prefix] = self._folder.get(stages[prefix]["tensors"])
        return tensors[prefix]

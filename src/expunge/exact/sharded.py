"""Sharded: a model trained in shards and slices, from which samples are deleted without training.

    sharded = xp.Sharded.train(problem, shards=3, slices=4, orders=4, folder="model")
    sharded.plan(xp.forget(ids=[17]))       # what it would cost
    sharded.forget(xp.forget(ids=[17]))     # milliseconds
    sharded.predict(x)

S3T (Bhardwaj et al. 2024): slice groups of adapters on a frozen backbone, several slice orders a shard.
SISA (Bourtoule et al. 2021): `adapter="whole", orders=1`.
"""

from __future__ import annotations

import copy
import functools
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.data import Inputs, map_inputs
from expunge.core.errors import ModelError, NeedsError, SettingError, StoreError
from expunge.core.hashing import hash_model
from expunge.core.problem import Problem
from expunge.core.runtime import Budget, Runtime
from expunge.exact import manifest as manifests
from expunge.exact.asked import Asked, resolve
from expunge.exact.ensemble import Ensemble
from expunge.exact.folder import Folder, Live
from expunge.exact.hazards import inspect
from expunge.exact.index import Index, digests
from expunge.exact.plan import Deleted, Plan, State, Status, plan, remaining_of
from expunge.exact.settings import Settings
from expunge.exact.slots import Slots, slots_of
from expunge.exact.stages import served
from expunge.exact.trainer import Trainer
from expunge.exact.verify import verify_folder


@dataclass(frozen=True)
class _Now:
    """One consistent state; a deletion replaces it as a whole."""

    live: Live
    stamp: tuple[int, ...]
    manifest: Mapping[str, Any]
    index: Index
    state: State

    @functools.cached_property
    def weights(self) -> str:
        return manifests.weights_hash(self.manifest, self.state)

    @functools.cached_property
    def digests(self) -> dict[tuple[int, tuple[int, ...]], str]:
        return manifests.digests_of(self.manifest)


class Sharded:
    """A sharded model on disk, with what it takes to serve it and to delete from it.

    Deletions are exact with respect to the training data: what is served afterwards was trained without
    the slices that samples were deleted from. Several processes may use one folder.
    """

    def __init__(self, folder: str | Path, base: nn.Module, problem: Problem | None) -> None:
        """Open a folder; use `train` or `load`.

        Args:
            folder: of the model.
            base: what its stages build on.
            problem: gives the data where requests speak of more than ids, and for retraining.
        """
        self._folder, self._problem = Folder(folder), problem
        self._base = copy.deepcopy(base).requires_grad_(False).eval()
        self._lock = threading.RLock()
        self._members: dict[tuple[str, ...], nn.Module] = {}
        self._now = self._read()

    # ------------------------------------------------------------------ training

    @classmethod
    def train(
        cls,
        problem: Problem,
        *,
        folder: str | Path,
        seed: int | None = None,
        runtime: Runtime | None = None,
        fitted: Mapping[str, str] | None = None,
        accept: Collection[str] = (),
        **settings: Any,
    ) -> Sharded:
        """Train all stages. Started again after an interruption, it goes on with those that are missing.

        Args:
            problem: its model is the frozen backbone and must never have seen the training data. Its
                validation data, which is not subject to deletion, decides between equally long prefixes.
            folder: where the model is written; new, or that of an interrupted training.
            seed: of slices, initialisation and batches; the runtime's if None.
            runtime: device and progress.
            fitted: what the tokenizer, normaliser, … were fitted on: `public` or `data` (`hazards.KNOWN`).
            accept: names of what breaks exactness and is to be put up with.
            **settings: see `Settings`: shards, slices, orders, adapter, sequences, epochs, lr, …

        Returns:
            The model, with all stages alive.

        Raises:
            SettingError: a setting is wrong, or the folder holds a model.
            NeedsError: something breaks exactness and is not accepted.
            ExpungeError: a stage did not train to its end.
        """
        how, outer = Settings.create(settings), runtime or Runtime()
        seed = outer.seed if seed is None else seed
        if outer.budget != Budget():
            raise SettingError("a sharded training has no budget: where it stopped would be chance")
        at = Folder(folder)
        with at.locked("training", 1.0):
            if at.exists():
                raise SettingError(
                    f"{at.path} holds a sharded model; load it or choose another folder"
                )
            problem.check()
            base, backbone = _start(problem, how, seed, at)
            slots = slots_of(problem, base, how)
            index = _index(problem, how, seed, at)
            samples = digests(problem.train)
            held_out = set() if problem.valid is None else set(digests(problem.valid).values())
            found = inspect(problem, how, fitted=fitted or {}, accept=accept, samples=samples, held_out=held_out, index=index)  # fmt: skip
            for sentence in found.warnings:
                outer.reporter.say(sentence)
            trainer = Trainer(at, base, backbone["hash"], problem, how, slots, seed, outer, samples)
            nothing = np.zeros(len(index.ids), dtype=bool)
            with outer.task("sharded training", trainer.total(how.shards)) as task:
                shards = [
                    trainer.shard(s, 0, index, nothing, {}, task.advance) for s in range(how.shards)
                ]
            tensors, file = at.put(index.tensors())
            made = {
                "format": manifests.FORMAT, "created": manifests.now(), "packages": manifests.versions(),
                "runtime": outer.describe(), "problem": {"kind": problem.kind, "name": problem.name},
                "backbone": backbone, "settings": how.in_force(), "slots": slots.to_dict(),
                "seed": seed, "index": {"tensors": tensors, "file": file}, "shards": shards,
                "exactness": {"breaks": found.breaks, "warnings": list(found.warnings), "fitted": dict(fitted or {})},
                "previous": None, "superseded": [],
            }  # fmt: skip
            at.commit(made, nothing, 0)
            at.forget_notes()
        return cls(at.path, base, problem)

    @classmethod
    def load(cls, folder: str | Path, backbone: nn.Module | Problem) -> Sharded:
        """Open a trained model.

        Args:
            folder: of `train` or `save`.
            backbone: the network that training started from (of one that started fresh, any of the same
                architecture), or the problem; that also gives data for requests by label or condition,
                for requests by name, and for retraining.

        Returns:
            The model as the last deletion left it.

        Raises:
            StoreError: there is none, or a file was altered.
            ModelError: it was trained on another backbone.
        """
        problem = backbone if isinstance(backbone, Problem) else None
        base = copy.deepcopy(problem.model if isinstance(backbone, Problem) else backbone)
        at = Folder(folder)
        named = at.manifest(at.live().manifest)["backbone"]
        if named["stored"]:
            try:
                base.load_state_dict(at.get(named["stored"]["tensors"]))
            except RuntimeError as error:
                raise ModelError("the model in the folder has another architecture") from error
        if hash_model(base) != named["hash"]:
            raise ModelError("the model in the folder was trained on another backbone")
        found = cls(folder, base, problem)
        found._sweep()
        return found

    def save(self, folder: str | Path) -> Path:
        """Copy the model to another folder, without what is deleted.

        Raises:
            SettingError: the folder holds a model.
        """
        other = Folder(folder)
        if other.exists():
            raise SettingError(f"{other.path} holds a sharded model; choose another folder")
        with self._lock, self._folder.locked():
            now = self._refresh()
            dead = manifests.dead_digests(now.manifest, now.state)
            other.stages.mkdir(parents=True, exist_ok=True)
            for digest in manifests.files_of(now.manifest) - dead:
                shutil.copyfile(self._folder.file(digest), other.file(digest))
            other.commit(now.manifest, now.live.deleted, now.live.number)
        return other.path

    # ------------------------------------------------------------------ deletion

    def plan(self, asked: Asked) -> Plan:
        """Say what deleting would do; nothing is changed.

        Args:
            asked: a request, ids, or outside names.

        Returns:
            The plan.

        Raises:
            RequestError: a request by label, condition or share covers nothing or everything.
            NeedsError: such a request on a model that was loaded without its problem.
        """
        return self._planned(self._now, asked)[0]

    def forget(self, asked: Asked) -> Deleted:
        """Delete samples: switch off what saw them, on disk first and in one step, and erase it.

        What was deleted before is not deleted again; unknown ids change nothing. Files of stages that
        are switched off are erased.

        Args:
            asked: as in `plan`.

        Returns:
            The plan that was carried out, with the hash of the weights served before and after.
        """
        start = time.perf_counter()
        with self._lock, self._folder.locked():
            now = self._refresh()
            found, state, places = self._planned(now, asked)
            after = now
            if len(places):
                deleted = now.live.deleted.copy()
                deleted[places] = True
                live = Live(now.live.manifest, deleted, now.live.number + 1)
                self._folder.put_live(live)
                after = _Now(live, self._folder.stamp(), now.manifest, now.index, state)
                self._now = after
                if found.off:
                    for digest in manifests.dead_digests(now.manifest, state):
                        self._folder.erase(digest)
        return Deleted(
            plan=found,
            weights_before=now.weights,
            weights_after=after.weights,
            manifest=after.live.manifest,
            seconds=time.perf_counter() - start,
            changed=after is not now,
        )

    def status(self) -> Status:
        """Say what is served and how long it is expected to last."""
        now = self._refreshed()
        samples = sum(sum(s.counts) for s in now.state)
        return Status(
            served=tuple(s.served for s in now.state),
            live=tuple(s.live for s in now.state),
            remaining=remaining_of(now.state),
            deleted=int(now.live.deleted.sum()),
            samples=samples,
            collateral=samples - sum(s.used for s in now.state),
            weights=now.weights,
            manifest=now.live.manifest,
        )

    def retrain(
        self,
        shards: Collection[int] | None = None,
        *,
        keep_slices: bool = False,
        runtime: Runtime | None = None,
    ) -> Status:
        """Train shards anew on their samples that are not deleted; the others go on serving.

        Args:
            shards: which; the dead ones if None.
            keep_slices: leave samples in their slices and train only stages that are dead, as SISA does;
                otherwise the shard is sliced anew and all its stages are trained.
            runtime: device and progress.

        Returns:
            The status afterwards. What was deleted during the training is deleted in it.

        Raises:
            NeedsError: the model was loaded without its problem.
            DataError: a shard has fewer samples left than slices.
        """
        if self._problem is None:
            raise NeedsError("retraining needs the data; load the model with its problem")
        outer = runtime or Runtime()
        with self._folder.locked("training", 1.0):
            now = self._refreshed()
            how, slots = self.settings, self._slots
            wanted = sorted(set(self.status().dead if shards is None else shards))
            if not set(wanted) <= set(range(how.shards)):
                raise SettingError(f"shards are numbered 0 to {how.shards - 1}, not {max(wanted)}")
            samples = digests(self._problem.train)
            index, entries = now.index, [dict(s) for s in now.manifest["shards"]]
            seed, deleted = int(now.manifest["seed"]), now.live.deleted
            known = {
                stage["key"]: stage
                for s, prefix, stage in manifests.stages(now.manifest)
                if now.state[s].dead.isdisjoint(prefix)
            }
            trainer = Trainer(self._folder, self._base, now.manifest["backbone"]["hash"], self._problem, how, slots, seed, outer, samples)  # fmt: skip
            with outer.task("sharded training", trainer.total(len(wanted))) as task:
                for s in wanted:
                    generation = entries[s]["generation"] + (not keep_slices)
                    generator = Runtime(seed=seed).generator("slices", s, generation)
                    index = index.resliced(
                        s, how.slices, deleted, None if keep_slices else generator
                    )
                    entries[s] = trainer.shard(s, generation, index, deleted, known, task.advance)
            with self._lock, self._folder.locked():
                now = self._refresh()
                tensors, file = self._folder.put(index.tensors())
                made = dict(now.manifest) | {
                    "created": manifests.now(), "packages": manifests.versions(), "shards": entries,
                    "index": {"tensors": tensors, "file": file}, "previous": now.live.manifest,
                }  # fmt: skip
                made["superseded"] = sorted(
                    {*now.digests.values(), now.manifest["index"]["tensors"]}
                    - {*manifests.digests_of(made).values(), tensors}
                )
                self._folder.commit(made, now.live.deleted, now.live.number + 1)
                self._now = self._read()
            self._folder.forget_notes()
            self._sweep()
            self._folder.collect(manifests.files_of(self._now.manifest))
        return self.status()

    # ------------------------------------------------------------------ serving

    def module(self) -> Ensemble:
        """The live ensemble. It stays as it is: after a deletion, ask for the new one.

        Raises:
            ExpungeError: no shard is alive.
        """
        with self._lock:
            for attempt in (0, 1):
                now = self._refreshed()
                chains = [tuple(d) for _, d in manifests.served_digests(now.manifest, now.state)]
                try:
                    members = {c: self._members.get(c) or self._member(c, now) for c in chains}
                except StoreError:
                    if attempt:
                        raise
                    continue  # another process deleted from it a moment ago
                self._members = members
                break
        return Ensemble([members[c] for c in chains], self.settings.aggregate)

    @torch.no_grad()
    def predict(self, x: Inputs, batch_size: int = 256) -> Tensor:
        """What the live ensemble says, on the CPU: mean logits [B, …, C], or their log probabilities.

        Args:
            x: inputs [B, …], or a mapping of them.
            batch_size: samples at a time.
        """
        model = self.module()
        size = len(x if isinstance(x, Tensor) else next(iter(x.values())))
        outputs = []
        for start in range(0, size, batch_size):
            part = map_inputs(x, lambda t: t[start : start + batch_size])  # noqa: B023
            outputs.append(model(part) if isinstance(x, Tensor) else model(**part))
        return torch.cat(outputs)

    # ------------------------------------------------------------------ what is known of it

    @property
    def folder(self) -> Path:
        """Where the model lies."""
        return self._folder.path

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest in force."""
        return self._now.manifest

    @property
    def settings(self) -> Settings:
        """Settings it was trained with."""
        return Settings.create(self._now.manifest["settings"])

    @property
    def exact(self) -> bool:
        """Whether nothing that breaks exactness was accepted when it was trained."""
        return not self._now.manifest["exactness"]["breaks"]

    def weights_hash(self) -> str:
        """Hash of the weights that are served; see `manifest.weights_hash`."""
        return self._refreshed().weights

    def verify(self) -> list[str]:
        """Compare every file with the manifest, and the backbone with its hash; see `verify_folder`."""
        said = verify_folder(self._folder.path)
        if hash_model(self._base) != self._now.manifest["backbone"]["hash"]:
            said.append("the backbone in memory is not the one the manifest names")
        return said

    # ------------------------------------------------------------------ within

    @property
    def _slots(self) -> Slots:
        return Slots.read(self._now.manifest["slots"])

    def _member(self, chain: tuple[str, ...], now: _Now) -> nn.Module:
        how = Settings.create(now.manifest["settings"])
        stages = [self._folder.get(d) for d in chain]
        return served(self._base, how, Slots.read(now.manifest["slots"]), stages)

    def _planned(self, now: _Now, asked: Asked) -> tuple[Plan, State, np.ndarray]:
        found = resolve(asked, now.index, now.live.deleted, self._problem)
        made, state = plan(
            now.state,
            found.located,
            already=found.already,
            unknown=found.unknown,
            outside=found.outside,
        )
        return made, state, found.places

    def _read(self) -> _Now:
        stamp = self._folder.stamp()
        live = self._folder.live()
        manifest = manifests.check(self._folder.manifest(live.manifest))
        index = Index.read(self._folder.get(manifest["index"]["tensors"]))
        state = manifests.state_of(manifest, index, live.deleted)
        return _Now(live, stamp, manifest, index, state)

    def _refresh(self) -> _Now:
        """Read what another process has changed; call inside the locks."""
        if self._folder.stamp() != self._now.stamp:
            self._now = self._read()
        return self._now

    def _refreshed(self) -> _Now:
        with self._lock:
            if self._folder.stamp() == self._now.stamp:
                return self._now
            with self._folder.locked():
                return self._refresh()

    def _sweep(self) -> None:
        """Erase what an interruption left of stages that saw deleted samples."""
        with self._lock, self._folder.locked():
            now = self._refresh()
            self._folder.settle(now.live.manifest)
            for digest in manifests.dead_digests(now.manifest, now.state):
                self._folder.erase(digest)


def _start(
    problem: Problem, how: Settings, seed: int, folder: Folder
) -> tuple[nn.Module, dict[str, Any]]:
    """What training starts from, and what the manifest says of it."""
    if how.start == "model":
        base = copy.deepcopy(problem.model)
        return base, {"start": "model", "hash": hash_model(base), "stored": None}
    base = problem.fresh(Runtime(seed=seed).seed_for("start"))
    tensors, file = folder.put(base.state_dict())
    return base, {"start": "fresh", "hash": hash_model(base), "stored": {"tensors": tensors, "file": file}}  # fmt: skip


def _index(problem: Problem, how: Settings, seed: int, folder: Folder) -> Index:
    """Slices of the samples; those of an interrupted training with the same ones, whose salt is kept."""
    generator = Runtime(seed=seed).generator("slices")
    made = Index.of(problem.train.ids, how.shards, how.slices, generator)
    noted = folder.noted("index")
    if noted is not None:
        old = Index.read(folder.get(noted["tensors"]))
        same = all(
            np.array_equal(getattr(old, n), getattr(made, n)) for n in ("ids", "shard", "piece")
        )
        if same:
            return old
    tensors, file = folder.put(made.tensors())
    folder.note("index", {"tensors": tensors, "file": file})
    return made

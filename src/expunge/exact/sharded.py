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
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.data import Inputs, map_inputs
from expunge.core.errors import ExpungeError, NeedsError, SettingError, StoreError
from expunge.core.hashing import hash_model
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.exact import manifest as manifests
from expunge.exact.asked import Asked, resolve
from expunge.exact.backbone import backbone_for
from expunge.exact.change import outcome_of
from expunge.exact.ensemble import Ensemble
from expunge.exact.folder import Folder, Live
from expunge.exact.index import digests
from expunge.exact.now import Now
from expunge.exact.plan import Deleted, Plan, State, Status, plan, remaining_of
from expunge.exact.settings import Settings
from expunge.exact.slots import Slots
from expunge.exact.stages import served
from expunge.exact.training import train_again, train_all
from expunge.exact.verify import verify_folder


class Sharded:
    """A sharded model on disk, with what it takes to serve it and to delete from it.

    Deletions are exact with respect to the training data: what is served afterwards was trained without
    the slices that samples were deleted from. Several processes may use one folder.
    """

    def __init__(self, folder: str | Path, base: nn.Module | None, problem: Problem | None) -> None:
        """Open a folder; use `train` or `load`.

        Args:
            folder: of the model.
            base: what its stages build on; None if it is not to be served.
            problem: gives the data where requests speak of more than ids, and for retraining.
        """
        self._folder, self._problem = Folder(folder), problem
        if base is not None:
            base = copy.deepcopy(base).cpu().requires_grad_(False).eval()
        self._base = base
        self._lock = threading.RLock()
        self._samples: dict[int, str] = {}  # digests of the data, once they are asked for
        self._members: dict[tuple[str, ...], nn.Module] = {}
        self._now = Now.read(self._folder)

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
        base = train_all(
            problem, Folder(folder), Settings.create(settings), seed, runtime or Runtime(),
            fitted=fitted or {}, accept=accept,
        )  # fmt: skip
        return cls(folder, base, problem)

    @classmethod
    def load(cls, folder: str | Path, backbone: nn.Module | Problem | None = None) -> Sharded:
        """Open a trained model.

        Args:
            folder: of `train` or `save`.
            backbone: the network that training started from (of one that started fresh, any of the same
                architecture), or the problem; that also gives data for requests by label, condition or
                name, and for retraining. None serves nothing, but deletes by ids.

        Returns:
            The model as the last deletion left it.

        Raises:
            StoreError: there is none, or a file was altered.
            ModelError: it was trained on another backbone.
        """
        problem = backbone if isinstance(backbone, Problem) else None
        found = cls(folder, backbone_for(Folder(folder), backbone), problem)
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
        return self._planned(self._refreshed(), asked)[0]

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
                after = replace(now, live=live, stamp=self._folder.stamp(), state=state)
                self._now = after
                gone = {now.digests[s, p] for s, prefixes in found.off.items() for p in prefixes}
                gone = gone - after.alive if gone else gone
                for digest in gone:
                    self._folder.erase(digest)
                self._drop_outdated(after)
        return Deleted(
            plan=found, weights_before=now.weights, weights_after=after.weights,
            manifest=after.live.manifest, seconds=time.perf_counter() - start,
            changed=after is not now,
        )  # fmt: skip

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
        if self._problem is None or self._base is None:
            raise NeedsError("retraining needs the data; load the model with its problem")
        with self._folder.locked("training", 1.0):
            now = self._refreshed()
            dead = [s for s, shard in enumerate(now.state) if shard.served is None]
            wanted = sorted(set(dead if shards is None else shards))
            self._samples = self._samples or digests(self._problem.train)
            made = train_again(
                self._problem, self._folder, self._base, now, self._samples, wanted, keep_slices,
                runtime or Runtime(),
            )  # fmt: skip
            with self._lock, self._folder.locked():
                now = self._refresh()
                self._folder.commit(made, now.live.deleted, now.live.number + 1)
                self._now = Now.read(self._folder)
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
        return self._ensemble().apart()

    def outcome(self, request: Request, done: Deleted | None = None) -> Outcome:
        """What is served now as the outcome of a request: to audit, compare, `save` and `xp.load`.

        Args:
            request: what was asked to be forgotten; all of it that is in the model must be deleted.
            done: of `forget`, for the record and the cost.
        """
        return outcome_of(self, request, done)

    def _ensemble(self) -> Ensemble:
        with self._lock:
            for attempt in (0, 1):
                now = self._refreshed()
                chains = [tuple(d) for _, d in now.served]
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
        model = self._ensemble()
        size = len(x if isinstance(x, Tensor) else next(iter(x.values())))
        outputs = []
        for start in range(0, max(size, 1), batch_size):
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
        """Hash of the weights that are served; see `now.Now.weights`."""
        return self._refreshed().weights

    def verify(self) -> list[str]:
        """Compare every file with the manifest, and the backbone with its hash; see `verify_folder`."""
        said = verify_folder(self._folder.path)
        named = self._now.manifest["backbone"]["hash"]
        if self._base is not None and hash_model(self._base) != named:
            said.append("the backbone in memory is not the one the manifest names")
        return said

    # ------------------------------------------------------------------ within

    @property
    def _slots(self) -> Slots:
        return Slots.read(self._now.manifest["slots"])

    def _member(self, chain: tuple[str, ...], now: Now) -> nn.Module:
        if self._base is None:
            raise NeedsError("serving needs the backbone; load the model with it")
        how = Settings.create(now.manifest["settings"])
        stages = [self._folder.get(d) for d in chain]
        return served(self._base, how, Slots.read(now.manifest["slots"]), stages)

    def _planned(self, now: Now, asked: Asked) -> tuple[Plan, State, np.ndarray]:
        found = resolve(
            asked, now.index, now.live.deleted, self._problem, now.manifest.get("named", False)
        )
        made, state = plan(
            now.state, found.located, already=found.already, unknown=found.unknown, outside=found.outside
        )  # fmt: skip
        return made, state, found.places

    def _refresh(self) -> Now:
        """Read what another process has changed; call inside the locks."""
        if self._folder.stamp() != self._now.stamp:
            self._now = Now.read(self._folder)
        return self._now

    def _refreshed(self) -> Now:
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
            self._drop_outdated(now)

    def _drop_outdated(self, now: Now) -> None:
        """Erase stages of an interrupted retraining, which may have seen what was deleted since."""
        if self._folder.began() in (None, now.live.number):
            return
        # one that is under way collects at its end; if it never comes there, the next call does
        with suppress(ExpungeError), self._folder.locked("training", 0.0):
            self._folder.forget_notes()
            self._folder.collect(manifests.files_of(now.manifest))

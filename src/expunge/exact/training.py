"""Trains a sharded model, or shards of one anew, and writes what the manifest says of it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from expunge.core.errors import DataError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.problem import Problem
from expunge.core.runtime import Budget, Runtime
from expunge.exact import manifest as manifests
from expunge.exact.folder import BEGAN, Folder
from expunge.exact.hazards import inspect, inspect_again
from expunge.exact.index import Index, digests
from expunge.exact.now import Now
from expunge.exact.settings import Settings
from expunge.exact.slots import Slots, slots_of
from expunge.exact.trainer import Trainer


def train_all(
    problem: Problem,
    folder: Folder,
    how: Settings,
    seed: int | None,
    runtime: Runtime,
    *,
    fitted: Mapping[str, str],
    accept: Collection[str],
) -> nn.Module:
    """Train all stages and commit the manifest; see `Sharded.train`.

    Returns:
        What the stages build on.
    """
    seed = runtime.seed if seed is None else seed
    if runtime.budget != Budget():
        raise SettingError("a sharded training has no budget: where it stopped would be chance")
    if how.aggregate == "probabilities" and problem.kind == "regression":
        raise SettingError(
            "a regression has no probabilities; use aggregate='logits', the plain mean"
        )
    with folder.locked("training", 1.0):
        if folder.exists():
            raise SettingError(
                f"{folder.path} holds a sharded model; load it or choose another folder"
            )
        problem.check()
        base, backbone = _start(problem, how, seed, folder)
        slots = slots_of(problem, base, how)
        index = _index(problem, how, seed, folder)
        samples = digests(problem.train)
        held_out = set() if problem.valid is None else set(digests(problem.valid).values())
        found = inspect(
            problem, how, fitted=fitted, accept=accept, samples=samples, held_out=held_out, index=index
        )  # fmt: skip
        for sentence in found.warnings:
            runtime.reporter.say(sentence)
        trainer = Trainer(
            folder, base, backbone["hash"], problem, how, slots, seed, runtime, samples
        )
        nothing = np.zeros(len(index.ids), dtype=bool)
        with runtime.task("sharded training", trainer.total(how.shards)) as task:
            shards = [
                trainer.shard(s, 0, index, nothing, {}, task.advance) for s in range(how.shards)
            ]
        tensors, file = folder.put(index.tensors())
        made = {
            "format": manifests.FORMAT, "created": manifests.now(), "packages": manifests.versions(),
            "runtime": runtime.describe(), "problem": {"kind": problem.kind, "name": problem.name, "source": _source(problem)},
            "backbone": backbone, "settings": how.in_force(), "slots": slots.to_dict(), "seed": seed,
            "index": {"tensors": tensors, "file": file}, "shards": shards, "previous": None,
            "named": problem.train.names is not None,
            "superseded": [], "exactness": {
                "breaks": found.breaks, "warnings": list(found.warnings), "fitted": dict(fitted)
            },
        }  # fmt: skip
        folder.commit(made, nothing, 0)
        folder.forget_notes()
        folder.collect(manifests.files_of(made))  # an interrupted training may have had other data
    return base


def train_again(
    problem: Problem,
    folder: Folder,
    base: nn.Module,
    now: Now,
    samples: Mapping[int, str],
    shards: Sequence[int],
    keep_slices: bool,
    runtime: Runtime,
) -> dict[str, Any]:
    """Train shards on their samples that are not deleted; stages that are alive are taken over.

    Returns:
        The manifest to put in force; its files are written.

    Raises:
        SettingError: there is no such shard.
        DataError: the data lacks samples of it, or a shard has fewer samples left than slices.
        NeedsError: validation data are training data too.
    """
    how, slots = Settings.create(now.manifest["settings"]), Slots.read(now.manifest["slots"])
    if not set(shards) <= set(range(how.shards)):
        raise SettingError(f"shards are numbered 0 to {how.shards - 1}, not {max(shards)}")
    seed, deleted = int(now.manifest["seed"]), now.live.deleted
    wanted = now.index.ids[np.isin(now.index.shard, list(shards)) & ~deleted].tolist()
    absent = [i for i in wanted if i not in samples]
    if absent:
        raise DataError(
            f"the problem's data lacks {len(absent)} samples that are not deleted, such as {absent[0]}; "
            "forget them first, or load the model with all of its data"
        )
    held_out = set() if problem.valid is None else set(digests(problem.valid).values())
    inspect_again(now.manifest["exactness"]["breaks"], samples, held_out)
    known = {
        stage["key"]: stage
        for s, prefix, stage in manifests.stages(now.manifest)
        if now.state[s].dead.isdisjoint(prefix)
    }
    trainer = Trainer(
        folder, base, now.manifest["backbone"]["hash"], problem, how, slots, seed, runtime, samples
    )  # fmt: skip
    folder.note(BEGAN, {"number": now.live.number})
    index, entries = now.index, list(now.manifest["shards"])
    with runtime.task("sharded training", trainer.total(len(shards))) as task:
        for s in shards:
            generation = entries[s]["generation"] + (not keep_slices)
            drawn = Runtime(seed=seed).generator("slices", s, generation)
            index = index.resliced(s, how.slices, deleted, None if keep_slices else drawn)
            entries[s] = trainer.shard(s, generation, index, deleted, known, task.advance)
    tensors, file = folder.put(index.tensors())
    made = dict(now.manifest) | {
        "created": manifests.now(), "packages": manifests.versions(), "shards": entries,
        "index": {"tensors": tensors, "file": file}, "previous": now.live.manifest,
    }  # fmt: skip
    made["superseded"] = sorted(manifests.files_of(now.manifest) - manifests.files_of(made))
    return made


def _start(
    problem: Problem, how: Settings, seed: int, folder: Folder
) -> tuple[nn.Module, dict[str, Any]]:
    """What training starts from, and what the manifest says of it."""
    if how.start == "model":
        base = copy.deepcopy(problem.model).cpu()
        return base, {"start": "model", "hash": hash_model(base), "stored": None}
    base = problem.fresh(Runtime(seed=seed).seed_for("start"))
    tensors, file = folder.put(base.state_dict())
    stored = {"tensors": tensors, "file": file}
    return base, {"start": "fresh", "hash": hash_model(base), "stored": stored}


def _source(problem: Problem) -> dict[str, Any] | None:
    """How to make a bundled problem again; paths of somebody's machine do not go into a manifest."""
    known = problem.source.get("kind") == "workload"
    return {k: problem.source[k] for k in ("kind", "workload")} if known else None


def _index(problem: Problem, how: Settings, seed: int, folder: Folder) -> Index:
    """Slices of the samples; those of an interrupted training with the same ones, whose salt is kept."""
    generator = Runtime(seed=seed).generator("slices")
    made = Index.of(problem.train.ids, how.shards, how.slices, generator)
    noted = folder.noted("index")
    if noted is not None:
        old = Index.read(folder.get(noted["tensors"]))
        if all(
            np.array_equal(getattr(old, n), getattr(made, n)) for n in ("ids", "shard", "piece")
        ):
            return old
    tensors, file = folder.put(made.tensors())
    folder.note("index", {"tensors": tensors, "file": file})
    return made

"""The provenance manifest: which stages there are, from what and how each was trained."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expunge.core.errors import StoreError
from expunge.exact.index import Index
from expunge.exact.plan import Shard, State
from expunge.exact.sequences import Order

FORMAT = 1
CARRIES: tuple[str, ...] = ()
"""What goes from one stage to the next besides stored tensors: no optimiser state, no schedule."""


def versions() -> dict[str, str]:
    """Versions of what a training's bits depend on."""
    names = ["expunge", "torch", "numpy", "safetensors"]
    names += [n for n in ("transformers", "accelerate") if n in sys.modules]
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from its sources
            found[name] = getattr(sys.modules.get(name), "__version__", "unknown")
    return found


def now() -> str:
    """The present time, UTC."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def check(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a manifest of a format that is known here.

    Raises:
        StoreError: it is of another.
    """
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"the manifest has format {manifest.get('format')}; this version reads {FORMAT}"
        )
    return manifest


def stages(manifest: Mapping[str, Any]) -> Iterator[tuple[int, Order, Mapping[str, Any]]]:
    """Every stage with its shard and prefix."""
    for number, shard in enumerate(manifest["shards"]):
        for stage in shard["stages"]:
            yield number, tuple(stage["prefix"]), stage


def digests_of(manifest: Mapping[str, Any]) -> dict[tuple[int, Order], str]:
    """Content hash of every stage by shard and prefix."""
    return {(s, prefix): stage["tensors"] for s, prefix, stage in stages(manifest)}


def files_of(manifest: Mapping[str, Any]) -> set[str]:
    """Content hashes of all files a manifest names, those of dead stages included."""
    stored = manifest["backbone"]["stored"]
    other = [manifest["index"], *([stored] if stored else [])]
    return {*digests_of(manifest).values(), *(one["tensors"] for one in other)}


def state_of(manifest: Mapping[str, Any], index: Index, deleted: np.ndarray) -> State:
    """The shards as the deletions so far have left them."""
    found = []
    for number, shard in enumerate(manifest["shards"]):
        own = (index.shard == number) & (index.piece >= 0)
        slices = len(shard["slices"])
        counts = np.bincount(index.piece[own & ~deleted], minlength=slices)
        found.append(
            Shard(
                sequences=tuple(tuple(s) for s in shard["sequences"]),
                counts=tuple(map(int, counts)),
                dead=frozenset(map(int, np.unique(index.piece[own & deleted]))),
                scores={tuple(s["prefix"]): _finite(s["score"]) for s in shard["stages"]},
                seconds=float(sum(s["seconds"] for s in shard["stages"])),
            )
        )
    return tuple(found)


def dead_digests(manifest: Mapping[str, Any], state: State) -> set[str]:
    """Content hashes of stages that saw something deleted since, or that were replaced."""
    kept = {
        digest
        for (s, prefix), digest in digests_of(manifest).items()
        if state[s].dead.isdisjoint(prefix)
    }
    return ({*digests_of(manifest).values()} | {*manifest["superseded"]}) - kept


def _finite(score: Sequence[float | None]) -> list[float]:
    """A score as it is compared: JSON has no infinite loss, and what is none is the worst."""
    return [-math.inf if value is None else value for value in score]

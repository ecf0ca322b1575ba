"""One consistent state of a sharded model, as its folder has it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expunge.core.errors import StoreError
from expunge.exact import manifest as manifests
from expunge.exact.folder import Folder, Live
from expunge.exact.index import Index
from expunge.exact.plan import State
from expunge.exact.sequences import Order


@dataclass(frozen=True)
class Now:
    """A state; a deletion replaces it as a whole.

    Attributes:
        live: what `live.json` holds.
        stamp: tells whether that file is still the same.
        manifest: in force.
        index: where samples lie.
        state: of the shards.
        digests: content hash of every stage by shard and prefix.
    """

    live: Live
    stamp: tuple[int, ...]
    manifest: Mapping[str, Any]
    index: Index
    state: State
    digests: Mapping[tuple[int, Order], str]

    @classmethod
    def read(cls, folder: Folder) -> Now:
        """Read a folder.

        Raises:
            StoreError: there is no model, or a file was altered.
        """
        stamp = folder.stamp()
        try:
            return cls._read(folder, stamp)
        except StoreError:
            if folder.stamp() == stamp:
                raise
        return cls.read(folder)  # another process put the next state in force meanwhile

    @classmethod
    def _read(cls, folder: Folder, stamp: tuple[int, ...]) -> Now:
        live = folder.live()
        manifest = manifests.check(folder.manifest(live.manifest))
        index = Index.read(folder.get(manifest["index"]["tensors"]))
        state = manifests.state_of(manifest, index, live.deleted)
        return cls(live, stamp, manifest, index, state, manifests.digests_of(manifest))

    @functools.cached_property
    def served(self) -> list[tuple[int, list[str]]]:
        """Content hashes of the stages that each live shard serves, first to last."""
        return [
            (s, [self.digests[s, shard.served[:k]] for k in range(1, len(shard.served) + 1)])
            for s, shard in enumerate(self.state)
            if shard.served
        ]

    @functools.cached_property
    def alive(self) -> set[str]:
        """Content hashes of the stages that saw nothing deleted."""
        return {d for (s, p), d in self.digests.items() if self.state[s].dead.isdisjoint(p)}

    @functools.cached_property
    def weights(self) -> str:
        """SHA-256 over the backbone's hash and the content hashes of the stages that are served.

        Equal if and only if the same tensors are served (up to collisions); no tensor has to be read.
        """
        lines = [
            f"backbone {self.manifest['backbone']['hash']}",
            self.manifest["settings"]["aggregate"],
        ]
        lines += [" ".join([f"shard {s}", *stages]) for s, stages in self.served]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

"""One consistent state of a sharded model, as its folder has it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expunge.exact import manifest as manifests
from expunge.exact.folder import Folder, Live
from expunge.exact.index import Index
from expunge.exact.plan import State


@dataclass(frozen=True)
class Now:
    """A state; a deletion replaces it as a whole.

    Attributes:
        live: what `live.json` holds.
        stamp: tells whether that file is still the same.
        manifest: in force.
        index: where samples lie.
        state: of the shards.
    """

    live: Live
    stamp: tuple[int, ...]
    manifest: Mapping[str, Any]
    index: Index
    state: State

    @classmethod
    def read(cls, folder: Folder) -> Now:
        """Read a folder.

        Raises:
            StoreError: there is no model, or a file was altered.
        """
        stamp = folder.stamp()
        live = folder.live()
        manifest = manifests.check(folder.manifest(live.manifest))
        index = Index.read(folder.get(manifest["index"]["tensors"]))
        return cls(live, stamp, manifest, index, manifests.state_of(manifest, index, live.deleted))

    @functools.cached_property
    def weights(self) -> str:
        """Hash of the weights that are served."""
        return manifests.weights_hash(self.manifest, self.state)

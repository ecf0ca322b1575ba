"""Compare every file of a sharded model with its manifest."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError, StoreError
from expunge.exact.folder import LIVE, MANIFEST, Folder, file_hash
from expunge.exact.index import Index
from expunge.exact.manifest import check, dead_digests, stages, state_of


def verify_folder(path: str | Path) -> list[str]:
    """Say what is wrong with the files of a sharded model.

    Args:
        path: its folder.

    Returns:
        One sentence a fault; empty if every file is what the manifest in force says.
    """
    folder = Folder(path)
    said = _faults(folder)
    if said and folder.exists():
        # what another process is just changing is no fault; a folder that cannot be locked is still
        with suppress(ExpungeError), folder.locked():
            return _faults(folder)
    return said


def _faults(folder: Folder) -> list[str]:
    # changes nothing: a manifest that is not yet in force is somebody's who is about to commit it
    try:
        live = folder.live()
        manifest = check(folder.manifest(live.manifest))
    except StoreError as error:
        missing = not (folder.path / MANIFEST).exists() and folder.exists()
        return [f"{MANIFEST} is missing" if missing else str(error)]
    said: list[str] = []
    index = _file(folder, manifest["index"], "the index of samples", said)
    if manifest["backbone"]["stored"]:
        _file(folder, manifest["backbone"]["stored"], "the stored backbone", said)
    if index is None:
        return said
    if len(live.deleted) != len(index["ids"]):
        return [
            *said,
            f"{LIVE} speaks of {len(live.deleted)} samples, the index of {len(index['ids'])}",
        ]
    state = state_of(manifest, Index.read(index), live.deleted)
    dead = dead_digests(manifest, state)
    for shard, prefix, stage in stages(manifest):
        if stage["tensors"] not in dead:
            name = f"the stage of shard {shard} that learned slices {', '.join(map(str, prefix))}"
            _file(folder, stage, name, said)
    left = sorted(d for d in dead if folder.file(d).exists())
    said += [f"stages/{d}.safetensors saw deleted samples and was not erased" for d in left]
    return said


def _file(folder: Folder, named: Any, name: str, said: list[str]) -> Any:
    """Tensors of a file that is what it should be; else None, and a sentence more."""
    path = folder.file(named["tensors"])
    where = f"{name} (stages/{path.name})"
    try:
        if file_hash(path) != named["file"]:
            said.append(f"{where} was altered: its bytes have another hash than the manifest says")
            return None
        return folder.get(named["tensors"])
    except OSError:
        said.append(f"{where} is missing")
    except StoreError as error:
        said.append(f"{where}: {error}")
    return None

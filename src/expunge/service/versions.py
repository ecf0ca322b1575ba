"""Versions of a model on disk: each a folder that appears whole or not at all.

A deletion writes into a folder that nobody looks at, which is then renamed to the name of its batch. Which
version is in force stands in the database alone, so that files and requests cannot disagree.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError
from expunge.core.hashing import canonical

RECORD = "expunge-version.json"
"""What a deletion said of itself, beside its files."""


def folder_of(root: Path, model: str) -> Path:
    """Folder of the versions of a model."""
    return root / "models" / model


def make(parent: Path, name: str, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Let `write` fill a version, unless it was made before.

    Args:
        parent: folder of the versions of a model.
        name: of the version; the same name is the same deletion.
        write: fills an empty folder and returns its record.

    Returns:
        The record.
    """
    done = parent / name
    if (record := read(done)) is not None:
        return record
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(f".{name}.*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    draft = parent / f".{name}.{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        record = write(draft)
        (draft / RECORD).write_bytes(canonical(record))
        _sync(draft)
        try:
            draft.rename(done)
        except OSError as error:  # somebody else made it meanwhile; both would be the same
            if (other := read(done)) is None:
                raise ExpungeError(f"cannot make the version {done}: {error.strerror}") from error
            return other
        _sync_folder(parent)
        return record
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read(version: Path) -> dict[str, Any] | None:
    """The record of a version; None if there is no such version."""
    try:
        return dict(json.loads((version / RECORD).read_text()))
    except (OSError, ValueError):
        return None


def clean(parent: Path, keep: Callable[[], Collection[str]]) -> list[str]:
    """Remove all versions but some: superseded weights still hold what was deleted since.

    Drafts of them that a killed process left go too. What appears while this runs is left alone: `keep`
    is asked after the folder was read, so that a process that stood still harms nobody's new version.

    Args:
        parent: folder of the versions of a model.
        keep: names those to keep, with their drafts.

    Returns:
        Names of what was removed.
    """
    there = [p for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    wanted = frozenset(keep())
    gone = []
    for folder in there:
        draft = folder.name.startswith(".")
        name = folder.name[1:].rpartition(".")[0] if draft else folder.name
        if name not in wanted:
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder.name)
    return sorted(gone)


def _sync(folder: Path) -> None:
    """Put all files on disk before the rename that makes them count."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            _sync_folder(file)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

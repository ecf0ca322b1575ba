"""The folder of a sharded model: files that appear whole or not at all.

`manifest.json` names every stage by the hash of its content, `live.json` says which manifest is in force
and what has been deleted, `stages/` holds the tensors. Whatever is interrupted, `live.json` decides: it
is replaced in one step.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from expunge.core.errors import ExpungeError, StoreError
from expunge.core.hashing import canonical, hash_tensors
from expunge.store.blobs import read_verified
from expunge.store.ids import new_id

MANIFEST, NEXT, LIVE = "manifest.json", "manifest.next.json", "live.json"
BEGAN = "began"
"""Note of an interrupted retraining: the number of changes it began after."""


@dataclass(frozen=True)
class Live:
    """What changes with every deletion.

    Attributes:
        manifest: SHA-256 of the manifest in force.
        deleted: whether each sample of the index is deleted [N].
        number: changes so far.
    """

    manifest: str
    deleted: np.ndarray
    number: int

    def write(self) -> bytes:
        """As it stands on disk, with a checksum against accidents."""
        bits = base64.b64encode(np.packbits(self.deleted).tobytes()).decode()
        body = {"deleted": bits, "manifest": self.manifest, "number": self.number, "samples": len(self.deleted)}  # fmt: skip
        return canonical(body | {"check": hashlib.sha256(canonical(body)).hexdigest()})

    @classmethod
    def read(cls, raw: bytes) -> Live:
        """Undo `write`.

        Raises:
            StoreError: it was altered.
        """
        try:
            body = json.loads(raw)
            check = body.pop("check")
            bits = np.frombuffer(base64.b64decode(body["deleted"], validate=True), dtype=np.uint8)
            deleted = np.unpackbits(bits, count=body["samples"]).astype(bool)
            same = check == hashlib.sha256(canonical(body)).hexdigest()
            found = cls(body["manifest"], deleted, body["number"])
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            binascii.Error,
            RecursionError,
        ) as error:
            raise StoreError(f"{LIVE} was altered and cannot be read ({error})") from error
        if not same or found.write() != raw:
            raise StoreError(f"{LIVE} was altered: its checksum is another")
        return found


class Folder:
    """Reads and writes the files of one sharded model."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.stages = self.path / "stages"
        self.records = self.path / "records"

    def exists(self) -> bool:
        """Whether a finished model is there."""
        return (self.path / LIVE).exists()

    @contextmanager
    def locked(self, what: str = "change", wait: float = 60.0) -> Iterator[None]:
        """Keep other processes from doing the same; freed however a process ends.

        Args:
            what: `change` for an instant, or `training` for as long as that takes.
            wait: seconds.

        Raises:
            ExpungeError: the folder cannot be written, or somebody else kept the lock all the time.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = sqlite3.connect(self.path / f".{what}.lock", timeout=wait, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ExpungeError(f"cannot write in {self.path}: {error}") from error
        try:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error as error:
                busy = "training in" if what == "training" else "changing"
                raise ExpungeError(f"another process is {busy} {self.path}; try again") from error
            yield
        finally:
            lock.close()

    # ------------------------------------------------------------------ the two small files

    def stamp(self) -> tuple[int, ...]:
        """Tells one `live.json` from another without reading it."""
        try:
            found = (self.path / LIVE).stat()
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_ino, found.st_size)

    def live(self) -> Live:
        """Read what is in force.

        Raises:
            StoreError: there is no model, or the file was altered.
        """
        try:
            return Live.read((self.path / LIVE).read_bytes())
        except FileNotFoundError as error:
            again = self.records.exists()
            raise StoreError(
                f"{self.path} holds no sharded model"
                + ("; its training was interrupted: start it again to go on" if again else "")
            ) from error

    def put_live(self, live: Live) -> None:
        """Replace `live.json` in one step."""
        self._replace(LIVE, live.write())

    def manifest(self, digest: str) -> dict[str, Any]:
        """Read the manifest in force; finishes its replacement if that was interrupted.

        Raises:
            StoreError: it is missing or was altered.
        """
        for name in (MANIFEST, NEXT):
            with suppress(OSError):
                raw = (self.path / name).read_bytes()
                if hashlib.sha256(raw).hexdigest() == digest:
                    return json.loads(raw)
        raise StoreError(f"{MANIFEST} was altered: its hash is not the one that {LIVE} names")

    def commit(self, manifest: Mapping[str, Any], deleted: np.ndarray, number: int) -> Live:
        """Put a new manifest in force, in one step."""
        raw = canonical(manifest)
        live = Live(hashlib.sha256(raw).hexdigest(), deleted, number)
        self._replace(NEXT, raw)
        self.put_live(live)  # from here on the new one counts
        self.settle(live.manifest)
        return live

    def settle(self, digest: str) -> None:
        """Give the manifest in force its name, after an interruption too."""
        following = self.path / NEXT
        with suppress(OSError):
            if hashlib.sha256(following.read_bytes()).hexdigest() == digest:
                os.replace(following, self.path / MANIFEST)
            else:
                following.unlink()

    def _replace(self, name: str, raw: bytes) -> None:
        temporary = self.path / f"{name}.{os.getpid()}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
            sync(self.path)
        except OSError as error:
            raise ExpungeError(f"cannot write {self.path / name}: {error}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    # ------------------------------------------------------------------ tensors, by content

    def file(self, digest: str) -> Path:
        """Where tensors lie."""
        return self.stages / f"{digest}.safetensors"

    def put(self, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
        """Write tensors and return the hash of their content and that of the file."""
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        digest = hash_tensors(own)
        temporary = self.stages / f"{new_id()}.tmp"
        try:
            self.stages.mkdir(parents=True, exist_ok=True)
            save_file(own, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.file(digest))
            sync(self.stages)
        except OSError as error:
            raise ExpungeError(f"cannot write in {self.stages}: {error}") from error
        return digest, file_hash(self.file(digest))

    def get(self, digest: str) -> dict[str, Tensor]:
        """Read tensors.

        Raises:
            StoreError: the file is missing, truncated or altered.
        """
        return read_verified(self.file(digest), digest)

    def erase(self, digest: str) -> None:
        """Remove tensors that nothing refers to any more."""
        with suppress(OSError):
            self.file(digest).unlink(missing_ok=True)

    def collect(self, kept: set[str]) -> None:
        """Remove what trainings that were given up have left; call while none is under way."""
        for path in self.stages.glob("*.safetensors"):
            if path.stem not in kept:
                path.unlink(missing_ok=True)

    # ------------------------------------------------------------------ stages of a training that is not done

    def note(self, key: str, record: Mapping[str, Any]) -> None:
        """Remember a stage that is trained, until the manifest names it."""
        self.records.mkdir(parents=True, exist_ok=True)
        temporary = self.records / f"{new_id()}.tmp"
        temporary.write_bytes(canonical(record))
        os.replace(temporary, self.records / f"{key}.json")

    def noted(self, key: str) -> dict[str, Any] | None:
        """A stage that was trained before an interruption and whose file is whole; None if there is none."""
        with suppress(OSError, ValueError, StoreError, KeyError):
            record = json.loads((self.records / f"{key}.json").read_bytes())
            if record["file"] == file_hash(self.file(record["tensors"])):
                return record
        return None

    def began(self) -> int | None:
        """Changes of the model before the retraining that left notes; None if there is none."""
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads((self.records / f"{BEGAN}.json").read_bytes())["number"])
        return None

    def forget_notes(self) -> None:
        """Remove all notes."""
        for path in [*self.records.glob("*"), *self.stages.glob("*.tmp")]:
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.records.rmdir()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(folder: Path) -> None:
    """Make renames in a folder last; elsewhere than on POSIX a folder cannot be opened, nor need it be."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

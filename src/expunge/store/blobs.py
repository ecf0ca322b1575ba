"""Tensors on disk: one safetensors file a content, named by its hash, verified when read.

Layout inside a store: `blobs/ab/<hash>.safetensors`, with `tmp/` for files being written and
`.lock` for keeping the collection of garbage and writing apart.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from expunge.core.errors import ExpungeError, StoreError
from expunge.core.hashing import hash_tensors
from expunge.store.database import BUSY_SECONDS, cannot_write
from expunge.store.ids import new_id

_HASH = re.compile(r"[0-9a-f]{64}")


def is_hash(text: object) -> bool:
    """Whether something has the form of a content hash."""
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


class Blobs:
    """The blob files of one store."""

    def __init__(self, folder: Path) -> None:
        """Remember the store's folder; nothing is opened."""
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where a blob lies."""
        return self.folder / "blobs" / digest[:2] / f"{digest}.safetensors"

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors unless they are there already, and return their content hash.

        The file appears under its name only when it is complete. Call inside `writing()`.

        Raises:
            ExpungeError: the tensors have no safetensors form, or the disk refuses them.
        """
        try:
            own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            digest = hash_tensors(own)
        except RuntimeError as error:  # sparse and other tensors that are not one block of memory
            raise ExpungeError(f"the tensors cannot be stored: {error}") from error
        if not self._intact(digest):
            temporary = self.folder / "tmp" / f"{new_id()}.safetensors"
            try:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                save_file(own, temporary)
                self._place(temporary, digest)
            except OSError as error:
                raise cannot_write(self.folder, error) from error
            except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
                raise ExpungeError(f"the tensors cannot be stored: {error}") from error
            finally:
                _unlink(temporary)
        return digest

    def put_stream(self, chunks: Iterator[bytes], digest: str) -> None:
        """Write a blob from the bytes of its file and check that it is what it is called.

        Raises:
            StoreError: the content has another hash.
            ExpungeError: the disk refuses it.
        """
        if self._intact(digest):
            return
        temporary = self.folder / "tmp" / f"{new_id()}.safetensors"
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            read_verified(temporary, digest)
            self._place(temporary, digest)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        finally:
            _unlink(temporary)

    def load(self, digest: str) -> dict[str, Tensor]:
        """Read a blob.

        Raises:
            StoreError: it is missing, truncated or altered.
        """
        return read_verified(self.path(digest), digest)

    def collect(self, referenced: set[str], dry_run: bool) -> list[str]:
        """Remove blobs that are not referenced and leftovers of processes that died.

        Only files that this class names are touched. Call inside `alone()`.

        Returns:
            Paths relative to the folder, sorted.
        """
        blobs = [p for p in self.folder.glob("blobs/??/*.safetensors") if is_hash(p.stem)]
        garbage = [p for p in blobs if p.stem not in referenced and p == self.path(p.stem)]
        garbage += self.folder.glob("tmp/*.safetensors")
        try:
            for path in [] if dry_run else garbage:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return sorted(str(p.relative_to(self.folder)) for p in garbage)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep garbage collection away until the row that refers to a new blob is committed."""
        # Reading takes SQLite's shared lock, which lasts until the transaction ends.
        with self._lock("BEGIN", "SELECT name FROM sqlite_master"):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody is between writing a blob and committing its row."""
        with self._lock("BEGIN EXCLUSIVE"):
            yield

    @contextmanager
    def _lock(self, *statements: str) -> Iterator[None]:
        """Lock `.lock`, an empty database: the same everywhere, and freed however a process ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = sqlite3.connect(
                self.folder / ".lock", timeout=BUSY_SECONDS, isolation_level=None
            )
        except (OSError, sqlite3.Error) as error:
            raise cannot_write(self.folder, error) from error
        try:
            try:
                for statement in statements:
                    lock.execute(statement).fetchall()
            except sqlite3.Error as error:
                if "locked" not in str(error):
                    raise cannot_write(self.folder, error) from error
                message = f"another process is using the store {self.folder}; try again"
                raise ExpungeError(message) from error
            yield
        finally:
            lock.close()

    def _intact(self, digest: str) -> bool:
        """Whether the blob is there and unharmed; a damaged one is written again."""
        try:
            self.load(digest)
        except StoreError:
            return False
        return True

    def _place(self, temporary: Path, digest: str) -> None:
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        target = self.path(digest)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, target)
        if os.name == "posix":  # elsewhere a directory cannot be opened, nor need it be
            directory = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def read_verified(path: Path, digest: str) -> dict[str, Tensor]:
    """Read a safetensors file and compare its content with the hash it should have.

    Raises:
        StoreError: it is missing, truncated or altered.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise StoreError(f"the blob {digest[:12]}… is missing from the store") from error
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise StoreError(f"the blob {digest[:12]}… is truncated or altered ({error})") from error
    if hash_tensors(tensors) != digest:
        raise StoreError(f"the blob {digest[:12]}… was altered: its content has another hash")
    return tensors


def _unlink(path: Path) -> None:
    with suppress(OSError):  # what cannot be removed now goes with the next collection of garbage
        path.unlink(missing_ok=True)

"""Runs as one .tar file: written in a fixed order, and read with distrust.

Members: `expunge-runs.json` (format and SHA-256 of every run's file), `runs/<id>.json`, and
`blobs/<hash>.safetensors`. Nothing is ever extracted by the name a member gives itself.
"""

from __future__ import annotations

import graphlib
import hashlib
import io
import json
import math
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from expunge.core.errors import ExpungeError, StoreError
from expunge.store.blobs import is_hash, read_verified
from expunge.store.ids import is_id, new_id
from expunge.store.rows import NUMBERS, Run

FORMAT = 1
MANIFEST = "expunge-runs.json"
_CHUNK = 1 << 20

Entry = tuple[Run, list[dict[str, Any]]]
"""A run and the rows of its findings."""


def write(path: Path, entries: Sequence[Entry], blob: Callable[[str], Path]) -> None:
    """Write runs and their blobs; the same runs give the same bytes.

    Args:
        path: the file; replaced as a whole if it exists.
        entries: runs with their findings.
        blob: where the blob of a hash lies.

    Raises:
        ExpungeError: the file cannot be written.
    """
    entries = sorted(entries, key=lambda entry: entry[0].id)
    texts = {run.id: _dump(_to_json(run, rows)) for run, rows in entries}
    sums = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    temporary = path.with_name(f".{path.name}.{new_id()}")
    try:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            _add(tar, MANIFEST, _dump({"format": FORMAT, "runs": sums}))
            for name, text in texts.items():
                _add(tar, f"runs/{name}.json", text)
            for digest in sorted({run.blob for run, _ in entries if run.blob}):
                with blob(digest).open("rb") as file:
                    info = tarfile.TarInfo(f"blobs/{digest}.safetensors")
                    info.size = os.fstat(file.fileno()).st_size
                    tar.addfile(info, file)
        os.replace(temporary, path)
    except OSError as error:
        raise ExpungeError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class Archive:
    """An opened export whose every part was checked; use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open and check a file.

        Raises:
            StoreError: it cannot be read, holds anything unexpected, or was altered.
        """
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115
            self._members = self._check_members()
            self.entries = self._check_entries()
            self._check_blobs()
        except OSError as error:
            self._file.close()
            raise ExpungeError(f"cannot check {path}: {error.strerror or error}") from error
        except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
            self._file.close()
            raise StoreError(f"{path} is not a readable export ({error})") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        self._file.close()

    @property
    def blobs(self) -> list[str]:
        """Hashes of the blobs inside."""
        return sorted({run.blob for run, _ in self.entries if run.blob})

    def chunks(self, digest: str) -> Iterator[bytes]:
        """Bytes of a blob's file, piece by piece."""
        with self._open(f"blobs/{digest}.safetensors") as file:
            while piece := file.read(_CHUNK):
                yield piece

    def _open(self, name: str) -> IO[bytes]:
        file = self._tar.extractfile(self._members[name])
        assert file is not None  # only regular files were let through
        return file

    def _refuse(self, why: str) -> StoreError:
        return StoreError(f"{self.path} is refused: {why}")

    def _check_members(self) -> dict[str, tarfile.TarInfo]:
        size = os.fstat(self._file.fileno()).st_size
        members: dict[str, tarfile.TarInfo] = {}
        for member in self._tar:
            shown = repr(member.name[:80])
            if not _expected(member.name):
                raise self._refuse(f"it holds {shown}, which no export contains")
            if not member.isreg() or member.issparse():
                raise self._refuse(f"{shown} is not a plain file")
            if member.offset_data + member.size > size:
                raise self._refuse(f"{shown} is truncated")
            if member.name in members:
                raise self._refuse(f"it holds {shown} twice")
            members[member.name] = member
        return members

    def _json(self, name: str) -> tuple[Any, str]:
        if name not in self._members:
            raise self._refuse(f"{name} is missing")
        with self._open(name) as file:
            text = file.read()
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise self._refuse(f"{name} is not valid JSON ({error})") from error
        return value, hashlib.sha256(text).hexdigest()

    def _check_entries(self) -> list[Entry]:
        manifest, _ = self._json(MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise self._refuse(f"it is not of format {FORMAT}; upgrade expunge if it is newer")
        sums = manifest.get("runs")
        present = {n[5:-5] for n in self._members if n.startswith("runs/")}
        if not isinstance(sums, dict) or not sums or set(sums) != present:
            raise self._refuse("the runs it lists are not the runs it holds")
        entries = []
        for name in sorted(sums):
            value, digest = self._json(f"runs/{name}.json")
            if digest != sums[name]:
                raise self._refuse(f"the record of run {name} was altered")
            try:
                entry = _from_json(value)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._refuse(f"run {name} is malformed ({error})") from error
            if entry[0].id != name:
                raise self._refuse(f"run {name} calls itself {entry[0].id}")
            entries.append(entry)
        try:
            graphlib.TopologicalSorter({run.id: run.parents for run, _ in entries}).prepare()
        except graphlib.CycleError as error:
            raise self._refuse("a run is its own ancestor") from error
        return entries

    def _check_blobs(self) -> None:
        present = {n[6:-12] for n in self._members if n.startswith("blobs/")}
        if present != set(self.blobs):
            raise self._refuse("the blobs it holds are not those its runs refer to")
        with tempfile.TemporaryDirectory() as folder:
            for digest in self.blobs:
                copy = Path(folder) / "blob.safetensors"
                with copy.open("wb") as file:
                    file.writelines(self.chunks(digest))
                try:
                    tensors = read_verified(copy, digest)
                except StoreError as error:
                    raise self._refuse(str(error)) from error
                for run, rows in self.entries:
                    labels = {v for row in rows for v in row["arrays"].values()}
                    if run.blob == digest and not labels <= set(tensors):
                        raise self._refuse(f"arrays of the findings of {run.id} are missing")


def _expected(name: str) -> bool:
    if name == MANIFEST:
        return True
    if name.startswith("runs/") and name.endswith(".json"):
        return is_id(name[5:-5])
    return name.startswith("blobs/") and name.endswith(".safetensors") and is_hash(name[6:-12])


def _dump(value: Any) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_TEXTS = ("id", "kind", "key", "created", "status")


def _to_json(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # JSON has no infinity; an unbounded end of an interval is written as a word.
    findings = [
        {
            k: str(v) if isinstance(v, float) and math.isinf(v) else v
            for k, v in row.items()
            if k not in ("run_id", "position")
        }
        for row in rows
    ]
    return {
        **{name: getattr(run, name) for name in _TEXTS},
        "blob": run.blob,
        "parents": list(run.parents),
        "record": run.record,
        "findings": findings,
    }


def _from_json(value: dict[str, Any]) -> Entry:
    run = Run.make(
        **{name: _text(value[name]) for name in _TEXTS},
        record=_mapping(value["record"]),
        parents=[_checked(p, is_id) for p in value["parents"]],
        blob=None if value["blob"] is None else _checked(value["blob"], is_hash),
    )
    if len(set(run.parents)) != len(run.parents):
        raise ValueError("a parent is named twice")
    for field in (run.problem, run.method, run.weights):
        _text(field or "-")
    rows = []
    for position, finding in enumerate(value["findings"]):
        row: dict[str, Any] = {"position": position, "name": _text(finding["name"])}
        row["direction"] = _checked(finding["direction"], ("reference", "up", "down").__contains__)
        row |= {k: None if finding[k] is None else float(finding[k]) for k in NUMBERS}
        row["reason"] = None if finding["reason"] is None else _text(finding["reason"])
        row["arrays"] = {_text(k): _text(v) for k, v in _mapping(finding["arrays"]).items()}
        row["detail"] = _mapping(finding["detail"])
        if row["arrays"] and run.blob is None:
            raise ValueError("findings have arrays but the run has no blob")
        rows.append(row)
    return run, rows


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{str(value)[:40]!r} is not a text")
    value.encode()  # half a surrogate pair has no place in a database
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} is not an object")
    return value


def _checked(value: Any, test: Callable[[Any], bool]) -> Any:
    if not test(value):
        raise ValueError(f"{str(value)[:40]!r} is not allowed here")
    return value

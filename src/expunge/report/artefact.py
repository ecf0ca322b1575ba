"""What was released, on disk: named by its hashes, and compared with what a certificate names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expunge.core.errors import UserError
from expunge.core.hashing import hash_tensors
from expunge.report.statement import TENSORS, weights_subject

HOLDS_WEIGHTS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf", ".onnx", ".npz", ".pkl"}
"""Endings of files that a model could be loaded from."""
_CHUNK = 1 << 20


def describe(path: str | Path) -> list[dict[str, Any]]:
    """Subjects for a file, or for every file of a folder, and for the tensors in them.

    Args:
        path: a file (best a .safetensors), or a folder.

    Returns:
        One subject a file with its SHA-256, and `weights` with the hash of all tensors, where the
        files are safetensors.

    Raises:
        UserError: there is nothing, or it cannot be read.
    """
    path = Path(path)
    files = _files(path)
    if not files:
        raise UserError(f"{path} holds no file")
    subjects = [{"name": name, "digest": {"sha256": _sha256(file)}} for name, file in files.items()]
    tensors = tensors_hash(path)
    return subjects if tensors is None else [*subjects, weights_subject(tensors)]


def compare(path: str | Path, subjects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say in what a file or folder differs from what a certificate names.

    Args:
        path: what is at hand.
        subjects: of the certificate's statement.

    Returns:
        Sentences that name the file; empty if it is what was released.

    Raises:
        UserError: there is nothing at the path, or it cannot be read.
    """
    path = Path(path)
    files = _files(path)
    named = {s["name"]: s["digest"]["sha256"] for s in subjects if "sha256" in s["digest"]}
    if not named:
        return _compare_tensors(path, subjects)
    if path.is_file():
        digest = _sha256(path)
        if digest in named.values():
            return []
        if path.name in {Path(n).name for n in named}:
            return [f"{path.name} was changed: it is not the file of this name that was released"]
        return [f"{path.name} is none of the files that the certificate names"]
    said = []
    for name, digest in named.items():
        if name not in files:
            said.append(f"{name} is missing in {path}")
        elif _sha256(files[name]) != digest:
            said.append(f"{name} was changed: it is not the file that was released")
    extra = [n for n in files if n not in named and Path(n).suffix.lower() in HOLDS_WEIGHTS]
    return said + [f"{n} could hold weights, but the certificate does not name it" for n in extra]


def tensors_hash(path: str | Path) -> str | None:
    """Hash of all tensors in the safetensors files of a path; None if there are none.

    Raises:
        UserError: a file cannot be read, or two of them hold a tensor of one name.
    """
    files = [f for f in _files(Path(path)).values() if f.suffix == ".safetensors"]
    if not files:
        return None
    try:
        return hash_tensors(_OnDisk(files))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} holds no safetensors that can be read ({error})") from error


def _compare_tensors(path: Path, subjects: Sequence[Mapping[str, Any]]) -> list[str]:
    wanted = {s["digest"][TENSORS] for s in subjects if TENSORS in s["digest"]}
    if not wanted:
        return ["the certificate names nothing that files could be compared with"]
    try:
        found = tensors_hash(path)
    except UserError as error:
        return [f"{path.name} was changed: {error}"]
    if found is None:
        return [f"{path.name} holds no safetensors; the certificate names tensors only"]
    if found in wanted:
        return []
    return [f"{path.name} was changed: its tensors are not those that were released"]


class _OnDisk(Mapping[str, Tensor]):
    """Tensors of several files, read one at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Note which file holds which tensor."""
        self._where: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    if name in self._where:
                        raise UserError(f"{self._where[name]} and {file} both hold {name!r}")
                    self._where[name] = file

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _files(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise UserError(f"there is no {path}")
    found = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(path).as_posix(): p for p in found}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()

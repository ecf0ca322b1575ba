"""Runs and findings as rows of the database and as JSON, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.audit import Finding
from expunge.core.errors import StoreError
from expunge.core.hashing import plain

NUMBERS = ("value", "low", "high", "reference", "floor", "original")
"""The numeric columns of a finding."""


@dataclass(frozen=True)
class Run:
    """One entry of a store.

    Attributes:
        id: sortable identifier, unique everywhere.
        kind: original, reference, prepare, unlearn, audit, or of a fleet: fleet, shadow,
            checkpoint, outputs.
        key: content key of everything the run rests on.
        created: when it was stored (ISO 8601, UTC).
        status: done, or how else it ended.
        problem: name of the problem.
        method: name of the method.
        seed: seed of the run.
        weights: SHA-256 of the run's weights.
        record: settings, seeds, versions, hashes, cost and results, as JSON types.
        parents: ids of the runs it was made from.
        blob: content hash of its tensors, if it has any.
    """

    id: str
    kind: str
    key: str
    created: str
    status: str
    problem: str | None
    method: str | None
    seed: int | None
    weights: str | None
    record: dict[str, Any]
    parents: tuple[str, ...] = ()
    blob: str | None = None

    @classmethod
    def make(
        cls,
        *,
        id: str,
        kind: str,
        key: str,
        created: str,
        status: str,
        record: dict[str, Any],
        parents: Sequence[str] = (),
        blob: str | None = None,
    ) -> Run:
        """Build a run; problem, method, seed and weights are taken from the record."""
        runtime = record.get("runtime")
        seed = runtime.get("seed") if isinstance(runtime, Mapping) else None
        if seed is None:
            seed = record.get("seed")
        weights = record.get("weights")
        return cls(
            id=id,
            kind=kind,
            key=key,
            created=created,
            status=status,
            problem=_name(record.get("problem")),
            method=_name(record.get("method")),
            seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
            weights=weights if isinstance(weights, str) else None,
            record=record,
            parents=tuple(parents),
            blob=blob,
        )

    def to_row(self) -> dict[str, Any]:
        """Values of the columns of `runs`."""
        row = {k: v for k, v in vars(self).items() if k != "parents"}
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            row["seed"] = None  # SQLite's integers end there; the record keeps the number
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any], parents: Sequence[str]) -> Run:
        """Rebuild a run from its row and its parents in order."""
        names = ("id", "kind", "key", "created", "status", "record", "blob")
        return cls.make(**{k: row[k] for k in names}, parents=parents)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {**asdict(self), "parents": list(self.parents)}


def json_form(value: Any, what: str) -> Any:
    """Turn a value into JSON types.

    Raises:
        StoreError: part of it has no JSON form.
    """
    try:
        return plain(value)
    except (TypeError, RecursionError) as error:
        raise StoreError(f"the {what} cannot be stored: {error}") from error


def to_rows(findings: Sequence[Finding]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Split findings into rows and the tensors of their per-sample arrays.

    Returns:
        One row a finding, without `run_id`, and tensors named `NAME/array`.

    Raises:
        StoreError: an array is not numeric, or a detail has no JSON form.
    """
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for position, finding in enumerate(findings):
        arrays: dict[str, str] = {}
        for name, array in finding.per_sample.items():
            label = f"{finding.name}/{name}"
            # Two findings of one name are allowed: an audit may run with two settings.
            if label in tensors:
                label = f"{label}#{position}"
            tensors[label] = _tensor(array, label)
            arrays[name] = label
        numbers = {k: _number(getattr(finding, k)) for k in NUMBERS}
        undefined = finding.value is not None and numbers["value"] is None
        rows.append({
            "position": position,
            "name": finding.name,
            "direction": finding.direction,
            **numbers,
            "reason": "the value is not a number"
            if undefined and finding.reason is None
            else finding.reason,
            "arrays": arrays,
            "detail": json_form(finding.detail, f"detail of {finding.name}"),
        })
    return rows, tensors


def to_finding(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Finding:
    """Rebuild a finding from its row and the tensors of its run."""
    return Finding(
        name=row["name"],
        direction=row["direction"],
        **{k: row[k] for k in NUMBERS},
        reason=row["reason"],
        per_sample={name: tensors[label].numpy() for name, label in row["arrays"].items()},
        detail=row["detail"],
    )


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Findings without their arrays and details, for the record of an audit."""
    names = ("name", *NUMBERS, "direction", "reason")
    return [plain({k: row[k] for k in names}) for row in rows]


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _tensor(array: Any, label: str) -> Tensor:
    # A copy in native byte order: torch takes no other, and warns about read-only memory.
    values = np.array(array, order="C")
    try:
        return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
    except TypeError as error:
        raise StoreError(f"the array {label} of {values.dtype} cannot be stored") from error


def _name(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("name")
    return value if isinstance(value, str) else None

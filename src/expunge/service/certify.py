"""Certificates of released requests: what the deletion's record says, signed with the service's key."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expunge.core.errors import ExpungeError, UserError
from expunge.report.artefact import HOLDS_WEIGHTS
from expunge.report.certificate import fingerprint, issue
from expunge.report.keys import Key, Keys
from expunge.report.statement import Evidence, Exact, weights_subject
from expunge.service import ledger
from expunge.service.deleter import Json
from expunge.service.logs import logger
from expunge.service.requests import Row
from expunge.service.tables import requests

if TYPE_CHECKING:
    from expunge.service.service import Service

NOT_TESTED = ("No audit was run on this result.",)
EARLIER = (
    "No audit was run for this request: its records had been left out before it came; what was done and "
    "measured then stands with the earlier request.",
)


class CannotSign(ExpungeError):
    """No key can sign now; what needs a certificate waits until one can."""


def signing_key(folder: Path) -> Key:
    """The key that signs now; the first one is made here.

    Raises:
        UserError: the folder cannot be written, or all keys are out of use.
    """
    keys = Keys(folder)
    if keys.public.keys:
        return keys.signer()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write the signing keys to {folder}: {error.strerror}") from error
    with lock:  # two workers that start at once make one key
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not keys.public.keys:
            keys.create("deletion service")
        return keys.signer()


def signer(folder: Path) -> Key:
    """The key that signs now.

    Raises:
        CannotSign: no key is in use, or the one in use cannot be read.
    """
    try:
        return signing_key(folder)
    except UserError as error:
        logger().warning("no key to sign with; requests wait", why=str(error))
        raise CannotSign(
            "waits for a key to sign its certificate with; expunge certificate key create makes one"
        ) from error


def certificates(
    service: Service,
    model: str,
    covered: Mapping[str, Sequence[int]],
    record: Mapping[str, Any],
    folder: Path | None,
    predecessor: Row | None,
    *,
    earlier: bool = False,
) -> dict[str, Json]:
    """Sign a certificate for each request that a deletion answered.

    Args:
        service: whose key signs and whose ledger is named.
        model: name of the model.
        covered: sample ids by request.
        record: of the deletion.
        folder: of the released version; None for the model as it was trained.
        predecessor: the version before; None for the model as it was trained.
        earlier: an earlier deletion covered the samples, and nothing was done for these requests. What
            the record says of steps and audits is about the samples of others then.

    Returns:
        Envelopes by request.

    Raises:
        CannotSign: no key is in use, or the one in use cannot be read.
    """
    if not covered:
        return {}
    key = signer(service.keys)
    common = evidence(model, about_others(record) if earlier else record, folder, predecessor)
    alone = len(covered) == 1

    def read(connection: sa.Connection) -> tuple[ledger.Head, dict[str, tuple[Any, str | None]]]:
        query = sa.select(requests.c.id, requests.c.form, requests.c.created).where(
            requests.c.id.in_(list(covered))
        )
        found = {
            row.id: (row, ledger.salt_of(connection, row.id)) for row in connection.execute(query)
        }
        return ledger.head(connection), found

    end, found = service.database.read(read)
    made = {}
    for identifier, ids in covered.items():
        row, salt = found[identifier]
        one = replace(
            common,
            request={
                "id": identifier, "form": row.form, "records": len(ids), "received": row.created,
                **({"earlier": True} if earlier else {}),
            },
            untested=[*common.untested, *shared(record, len(ids), alone, common)],
            commitments=ledger.commitments(salt, ids) if salt else [],
            ledger=vars(end),
        )  # fmt: skip
        made[identifier] = issue(one, key)
    return made


def about_others(record: Mapping[str, Any]) -> Json:
    """What a record supports about samples that it was not made for: the weights and their class."""
    exact, weights = record.get("exact"), record["weights"]
    nothing: Json = {"switched_off": [], "died": [], "retrained": [], "collateral": None}
    return {
        **record,
        "weights_before": weights, "findings": [], "verdict": None, "references": [],
        "untested": EARLIER,
        "exact": None if exact is None else {**exact, **nothing, "before": weights},
    }  # fmt: skip


def shared(record: Mapping[str, Any], records: int, alone: bool, common: Evidence) -> list[str]:
    """A sentence where audits looked at more, or other, records than those of a request."""
    looked = record.get("samples", records)
    if not common.findings or (alone and looked == records):
        return []
    return [
        f"This request's records by themselves: the audits looked at {looked} at once, those of all "
        "requests that were carried out together."
    ]


def evidence(
    model: str, record: Mapping[str, Any], folder: Path | None, predecessor: Row | None
) -> Evidence:
    """Everything a certificate says that is common to the requests of a batch."""
    exact = record.get("exact")
    findings = record.get("findings") or []
    return Evidence(
        kind=record.get("evidence", "empirical"),
        subjects=subjects(folder, record["weights"]),
        method={
            "name": record.get("method", "none"),
            **{k: record[k] for k in ("settings", "seed", "link") if k in record},
        },
        problem=model,
        findings=[{"label": f["name"], "reason": None, **f} for f in findings],
        verdict=record.get("verdict"),
        untested=record.get("untested") or (() if findings else NOT_TESTED),
        references=record.get("references") or (),
        exact=None if exact is None else Exact(**exact),
        predecessor=None if predecessor is None else predecessor["record"].get("certificate"),
        packages=record.get("packages") or {},
        runs={"batch": record["batch"]} if "batch" in record else {},
    )  # fmt: skip


def subjects(folder: Path | None, weights: str) -> list[Json]:
    """What was released: the files with weights of a version, and the hash of its weights."""
    if folder is None:
        return [weights_subject(weights)]
    # no hash of a file that lists records: whoever has a guess could test it
    named = [
        {"name": file.relative_to(folder).as_posix(), "digest": {"sha256": _sha256(file)}}
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in HOLDS_WEIGHTS
    ]
    return [*named, weights_subject(weights)]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def first_fingerprint(signed: Mapping[str, Json]) -> str | None:
    """What the certificates of the next version name as their predecessor."""
    return fingerprint(signed[min(signed)]) if signed else None

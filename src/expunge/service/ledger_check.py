"""Checking a ledger, in its database or in an exported file, in sentences that name the place."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from expunge.core.errors import ExpungeError, UserError
from expunge.service.ledger import (
    CHECKPOINT,
    PURGED,
    Entry,
    Head,
    canonical,
    commitment,
)
from expunge.service.ledger_tables import ZERO, heads, rows, selectors

FIELDS = {"seq": int, "time": str, "kind": str, "request": str, "previous": str, "hash": str}
MOST = 20
"""Sentences after which the rest is only counted: one change breaks every later row's place."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00")


def verify(
    source: sa.Engine | str | Path, *, named: Sequence[Head] = (), keys: Any = None
) -> list[str]:
    """Check every row, the order, the head, and that what others name is there.

    Args:
        source: an engine, or the path of an exported file.
        named: heads that certificates name; each must be a row of the chain, so that a ledger
            that was cut off before them is noticed.
        keys: trusted keys (`expunge.report.keys.KeySet`) for the signature under an export's
            head; without them a signature is not looked at.

    Returns:
        Sentences about what is wrong, naming file and row; empty if all is well.

    Raises:
        UserError: there is no such file, or the database cannot be reached.
    """
    if isinstance(source, sa.Engine):
        return _brief(_of_database(source, named))
    path = Path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return _brief(_of_export(data, path.name, named, keys))


def read_export(path: str | Path) -> list[Entry]:
    """The rows of an exported file; check it first."""
    lines = Path(path).read_bytes().splitlines()
    return [entry for line in lines if (entry := _entry(line)) is not None]


class _Chain:
    """Walks rows in order, remembers hashes that somebody names and requests' commitments."""

    def __init__(self, where: str, named: Iterable[Head]) -> None:
        """Start before the first row."""
        self.where = where
        self.last = Head(0, ZERO)
        self.asked = list(named)
        self.hashes: dict[int, str] = {0: ZERO}
        self.selectors: dict[str, str] = {}
        self.purged: dict[str, str] = {}
        self.salts: dict[str, str] = {}

    def step(self, entry: Entry) -> Iterator[str]:
        """Complain about one row and move on, as if it were right, to find the next fault."""
        place = f"{self.where}: row {entry.seq}"
        if entry.seq != self.last.seq + 1:
            yield (
                f"{place} stands where row {self.last.seq + 1} should: "
                "rows are missing, doubled or in another order"
            )
        if entry.previous != self.last.hash:
            yield f"{place} does not follow the row before it: one of the two was changed"
        try:
            fits = entry.digest() == entry.hash and canonical(entry.content) == entry.body.encode()
        except (ExpungeError, ValueError, TypeError, AttributeError, RecursionError):
            fits = False
        if not fits or not _TIME.fullmatch(entry.time):
            yield f"{place} was changed: its content does not have the hash it carries"
        else:
            self._remember(entry)
        self.last = Head(entry.seq, entry.hash)
        if any(h.seq == entry.seq for h in self.asked):
            self.hashes[entry.seq] = entry.hash

    def _remember(self, entry: Entry) -> None:
        body = entry.content
        if isinstance(body, dict) and isinstance(body.get("selectors"), str):
            self.selectors[entry.request] = body["selectors"]
        if entry.kind == PURGED:
            self.purged[entry.request] = str(body.get("salt"))
            if isinstance(body.get("check"), str):
                self.salts[entry.request] = body["check"]

    def end(self, stated: Head) -> Iterator[str]:
        """Compare the last row with the head that is stated, and with those that others name."""
        if self.last != stated:
            yield (
                f"{self.where} ends with row {self.last.seq}, but its head names row {stated.seq} "
                f"({stated.hash[:12]}…): rows were cut off or added, or the head was changed"
            )
        for head in self.asked:
            if head.seq > self.last.seq:
                yield (
                    f"{self.where} ends with row {self.last.seq}, but row {head.seq} was there when "
                    "a certificate or checkpoint named it: rows were cut off"
                )
            elif self.hashes.get(head.seq) != head.hash:
                yield (
                    f"{self.where}: row {head.seq} is not the one that a certificate or checkpoint "
                    "named: the ledger was written anew, or belongs to somebody else"
                )


def _of_database(engine: sa.Engine, named: Sequence[Head]) -> Iterator[str]:
    where = "table ledger"
    chain = _Chain(where, named)
    # head and rows in one statement: one snapshot, whoever else is writing
    both = sa.select(
        heads.c.id, heads.c.seq, heads.c.hash, *(c.label(f"row_{c.name}") for c in rows.c)
    )
    query = both.select_from(heads.outerjoin(rows, sa.true())).order_by(rows.c.seq)
    stated: list[Head] = []
    try:
        with engine.connect() as connection:
            for row in connection.execution_options(yield_per=1000).execute(query).mappings():
                stated = stated or [Head(row["seq"], row["hash"])]
                if row["row_seq"] is None and row["row_hash"] is None:
                    continue
                values = {c.name: row[f"row_{c.name}"] for c in rows.c}
                wrong = [k for k, v in values.items() if not isinstance(v, FIELDS.get(k, str))]
                if wrong:
                    yield f"{where}: row {values['seq']!r} was changed: its {wrong[0]} has another type"
                    continue
                yield from chain.step(Entry(**values))
            if not stated:
                yield "table ledger_head is empty: the end of the ledger is not known"
            yield from chain.end(stated[0] if stated else chain.last)
            beside = list(connection.execute(sa.select(selectors)).mappings())
    except sa.exc.DatabaseError as error:
        text = str(error.orig)
        if "no such table" in text or "does not exist" in text:
            raise UserError(f"the database holds no ledger ({engine.url})") from error
        if isinstance(error, sa.exc.OperationalError):
            raise UserError(f"cannot read the ledger's database: {text}") from error
        yield f"the database cannot be read: {text}"
        return
    yield from _beside(chain, {row["request"]: row for row in beside})


def _beside(chain: _Chain, table: dict[str, Any]) -> Iterator[str]:
    """Selectors are what the chain committed to, or purged, and then the chain says so."""
    for request, wanted in chain.selectors.items():
        row = table.pop(request, None)
        if row is None:
            yield f"table ledger_selectors has no row of request {request}, which the ledger names"
            continue
        text, salt, said = row["selectors"], row["salt"], chain.purged.get(request)
        if text is None and said is None:
            yield f"the selectors of request {request} are gone, but no entry says they were purged"
        elif text is not None and said is not None:
            yield f"the selectors of request {request} were purged, but something stands there"
        if salt is None and said != "destroyed":
            yield f"the salt of request {request} is gone, but no entry says so"
        elif salt is not None and said == "destroyed":
            yield f"the salt of request {request} was destroyed, but something stands there"
        if text is None and salt is not None and not _checked(salt, chain.salts.get(request)):
            yield f"the salt of request {request} is not the one it came with"
        if text is not None and salt is not None and not _committed(salt, text, wanted):
            yield f"the selectors or the salt of request {request} are not those it came with"
    for request in table:
        yield f"table ledger_selectors has a row of request {request!r}, which no entry names"


def _committed(salt: Any, text: Any, wanted: str) -> bool:
    try:
        return salt == salt.lower() and len(salt) == 64 and commitment(salt, text) == wanted
    except (ValueError, TypeError, AttributeError):
        return False


def _checked(salt: Any, wanted: str | None) -> bool:
    text = str(salt).encode(errors="replace")
    return wanted is None or hashlib.sha256(text).hexdigest() == wanted


def _of_export(data: bytes, name: str, named: Sequence[Head], keys: Any) -> Iterator[str]:
    lines = data.split(b"\n")
    if lines[-1] != b"" or len(lines) < 2:
        yield f"{name} does not end with a whole line: it was cut off or changed at its end"
        return
    stated = _stated(lines[-2])
    if stated is None:
        yield f"{name}: the last line does not name the head: rows were cut off, or it was changed"
        lines = lines[:-1]
    else:
        lines = lines[:-2]
    heads_named, checkpoint = list(named), None if stated is None else stated[1]
    chain = _Chain(name, heads_named)
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None:
            yield f"{name}: line {number} was changed: it is no row as it is written by an export"
            continue
        yield from chain.step(entry)
    yield from chain.end(stated[0] if stated else chain.last)
    if checkpoint is not None and keys is not None:
        yield from _signed(checkpoint, chain.last, name, keys)
    elif checkpoint is None and stated is not None and keys is not None and chain.last not in named:
        yield (
            f"{name} carries no signature under its head and no certificate names its last row: rows "
            "cut off at the end cannot be noticed"
        )


def _signed(envelope: Any, last: Head, name: str, keys: Any) -> Iterator[str]:
    from expunge.report.envelope import opened

    try:
        content = opened(envelope, CHECKPOINT, keys)
        if Head(content["seq"], content["hash"]) != last:
            yield f"{name}: the signed head names row {content['seq']}, not the last one: it was cut off"
    except (ExpungeError, KeyError, TypeError) as error:
        yield f"{name}: the signature under the head does not hold: {error}"


def _stated(line: bytes) -> tuple[Head, Any] | None:
    value = _canonical_json(line)
    if not isinstance(value, dict) or set(value) != {"head", "checkpoint"}:
        return None
    head = value["head"]
    if not isinstance(head, dict) or set(head) != {"seq", "hash"}:
        return None
    if type(head["seq"]) is not int or not isinstance(head["hash"], str):
        return None
    return Head(head["seq"], head["hash"]), value["checkpoint"]


def _entry(line: bytes) -> Entry | None:
    value = _canonical_json(line)
    if not isinstance(value, dict) or set(value) != {*FIELDS, "body"}:
        return None
    if any(type(value[k]) is not kind for k, kind in FIELDS.items()):
        return None
    return Entry(**(value | {"body": canonical(value["body"]).decode()}))


def _canonical_json(line: bytes) -> Any:
    """The value of a line that is exactly its canonical text; None otherwise."""
    try:
        value = json.loads(line)
        return value if canonical(value) == line else None
    except (ValueError, RecursionError, ExpungeError):
        return None


def _brief(sentences: Iterable[str]) -> list[str]:
    said = list(sentences)
    more = len(said) - MOST
    return said if more <= 0 else [*said[:MOST], f"and {more} more faults after these"]

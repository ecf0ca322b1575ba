r"""The ledger: append-only, hash-chained rows in the service's database, checkable offline.

A row is `seq, time, kind, request, body, previous, hash`, with
`hash = SHA-256("expunge-ledger-v1\n" + canonical JSON of the other six)` in the form of RFC 8785
and `previous` the hash of the row before (64 zeros for the first). Whoever changes, swaps or takes
out a row breaks the chain. Rows cut off at the *end* leave a shorter chain that is whole in
itself: they are missed as soon as something outside names the head: the row `ledger_head` of the
same database, a signed checkpoint of an export, or any later certificate.

What is personal stays out of the chain. Selectors (ids, users, predicates) lie in a table beside
it; the chain holds salted commitments, `HMAC-SHA-256(salt of the request, text)`. `purge` takes
away the selectors, and the salt with them unless it is to be kept: then nobody can test guesses.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import json
import random
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from expunge.core.errors import ExpungeError, UserError
from expunge.core.hashing import plain
from expunge.service.ledger_tables import ZERO, create, heads, metadata, rows, selectors

__all__ = [
    "ZERO", "Entry", "Head", "append", "checkpoint", "commitment", "commitments", "create",
    "entries", "export", "head", "keep", "kept", "locate", "metadata", "open_engine", "promised",
    "purge", "record", "salt_of", "scrub", "verify",
]  # fmt: skip

PREFIX = b"expunge-ledger-v1\n"
EXACT = 2**53 - 1
"""The largest whole number that every reader of JSON keeps."""
WORD = re.compile(r"[a-z][a-z0-9._-]{0,63}")
NAME = re.compile(r"[!-~]{0,200}")
BUSY_SECONDS = 60.0
PURGED = "purged"
"""Kind of the entry that says that selectors were taken away."""


@dataclass(frozen=True)
class Head:
    """The end of a ledger: what a certificate names, so that nothing before it can go missing."""

    seq: int
    hash: str


@dataclass(frozen=True)
class Entry:
    """One row. `body` is the JSON text as it was hashed."""

    seq: int
    time: str
    kind: str
    request: str
    body: str
    previous: str
    hash: str

    @property
    def content(self) -> Any:
        """The body as JSON types."""
        return json.loads(self.body)

    def digest(self) -> str:
        """Hash that the fields ask for; differs from `hash` where something was changed."""
        fields = {k: v for k, v in vars(self).items() if k not in ("hash", "body")}
        return hashlib.sha256(PREFIX + canonical(fields | {"body": self.content})).hexdigest()

    def line(self) -> bytes:
        """The row in an export: canonical JSON with the body as a value."""
        return canonical(vars(self) | {"body": self.content}) + b"\n"


def canonical(value: Any) -> bytes:
    """The one JSON text of a value by RFC 8785; whole numbers beyond 2^53 become texts.

    Raises:
        UserError: the value has no JSON form, or `rfc8785` is not installed.
    """
    try:
        import rfc8785
    except ImportError as error:
        raise UserError("the ledger needs the extra serve: pip install 'expunge[serve]'") from error
    try:
        return rfc8785.dumps(_portable(plain(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the ledger cannot hold this as JSON: {error}") from error


def open_engine(where: str | Path) -> sa.Engine:
    """Open the database of a ledger by URL, or an SQLite file by its path.

    Args:
        where: `sqlite:///…`, `postgresql://…` (psycopg is used) or a path.

    Returns:
        An engine; on SQLite in write-ahead mode, waiting for others, zeroing what is taken away.
    """
    text = str(where)
    url = sa.make_url(text if "://" in text else f"sqlite:///{Path(text).absolute()}")
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def _settings(connection: Any, _: object) -> None:
        for setting in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            connection.execute(f"PRAGMA {setting}")

    return engine


def locate(where: str | Path) -> sa.Engine | Path:
    """An exported file as a path; a URL or an SQLite file as an engine.

    Raises:
        UserError: there is no such file.
    """
    text = str(where)
    if "://" in text:
        return open_engine(text)
    try:
        with Path(text).open("rb") as file:
            database = file.read(16) == b"SQLite format 3\0"
    except OSError as error:
        raise UserError(f"cannot read {text}: {error.strerror or error}") from error
    return open_engine(text) if database else Path(text)


def append(
    connection: sa.Connection, kind: str, request: str, body: Mapping[str, Any] | None = None
) -> Entry:
    """Add a row within the caller's transaction, which decides whether it stays.

    The first thing done is a write to the one row of `ledger_head`: writers queue there until the
    one before has committed. Call it before reading anything else in a transaction on SQLite, which
    otherwise refuses (`record` tries again by itself).

    Args:
        connection: in a transaction.
        kind: what happened, e.g. `received`.
        request: id of the request, empty for what concerns none.
        body: details without anything personal: JSON types.

    Returns:
        The row.

    Raises:
        UserError: kind, request or body have a form that the ledger does not take.
        ExpungeError: the ledger's tables are not there.
    """
    if not WORD.fullmatch(kind):
        raise UserError(f"a ledger entry needs a kind like received, not {kind!r}")
    if not NAME.fullmatch(request):
        raise UserError(f"{request!r} is no id of a request: up to 200 printable ASCII characters")
    text = canonical(dict(body or {})).decode()
    bumped = connection.execute(sa.update(heads).where(heads.c.id == 1).values(seq=heads.c.seq + 1))
    found = connection.execute(sa.select(heads.c.seq, heads.c.hash)).first()
    if bumped.rowcount != 1 or found is None:
        raise ExpungeError("the database holds no ledger; create it first")
    entry = Entry(found.seq, now(), kind, request, text, found.hash, "")
    entry = Entry(**(vars(entry) | {"hash": entry.digest()}))
    connection.execute(sa.insert(rows).values(**vars(entry)))
    connection.execute(sa.update(heads).where(heads.c.id == 1).values(hash=entry.hash))
    return entry


def record(
    engine: sa.Engine, kind: str, request: str, body: Mapping[str, Any] | None = None
) -> Entry:
    """Add a row in a transaction of its own, again with pauses while others are in the way.

    Raises:
        ExpungeError: others were in the way for longer than a minute.
    """
    deadline, pause = time.monotonic() + BUSY_SECONDS, 0.005
    while True:
        try:
            with engine.begin() as connection:
                return append(connection, kind, request, body)
        except sa.exc.IntegrityError as error:
            # writers queue at the head, so two rows can only collide after somebody's change
            raise ExpungeError(
                f"the ledger contradicts its head; verify it: {error.orig}"
            ) from error
        except sa.exc.OperationalError as error:
            # locked, not serialisable, deadlock, lost connection: all of them undo everything
            if time.monotonic() > deadline:
                raise ExpungeError(f"the ledger cannot be written: {error.orig}") from error
        time.sleep(pause * (1 + random.random()))
        pause = min(2 * pause, 0.5)


def head(connection: sa.Connection) -> Head:
    """Where the ledger ends now; `Head(0, ZERO)` if it is empty."""
    found = connection.execute(sa.select(heads.c.seq, heads.c.hash)).first()
    return Head(0, ZERO) if found is None else Head(found.seq, found.hash)


def entries(connection: sa.Connection, request: str | None = None) -> Iterator[Entry]:
    """Rows in order, of one request or all."""
    query = sa.select(rows).order_by(rows.c.seq)
    if request is not None:
        query = query.where(rows.c.request == request)
    for row in connection.execution_options(yield_per=1000).execute(query):
        yield Entry(**row._mapping)


def keep(connection: sa.Connection, request: str, wanted: Any) -> str:
    """Lay the selectors of a request beside the chain, under a new salt.

    Args:
        connection: in a transaction, the one in which `received` is appended.
        request: its id.
        wanted: whom or what it names, JSON types.

    Returns:
        Their commitment, for the entry's body under the name `selectors`.
    """
    salt, text = secrets.token_hex(32), canonical(wanted).decode()
    connection.execute(sa.insert(selectors).values(request=request, selectors=text, salt=salt))
    return commitment(salt, text)


def kept(connection: sa.Connection, request: str) -> Any:
    """The selectors of a request; None if they were purged or never kept."""
    text = connection.scalar(sa.select(selectors.c.selectors).where(selectors.c.request == request))
    return None if text is None else json.loads(text)


def promised(connection: sa.Connection, request: str) -> str | None:
    """The commitment to a request's selectors that its first entry holds; it outlives them."""
    text = connection.scalar(
        sa.select(rows.c.body).where(rows.c.request == request).order_by(rows.c.seq).limit(1)
    )
    return None if text is None else json.loads(text).get("selectors")


def salt_of(connection: sa.Connection, request: str) -> str | None:
    """The salt of a request's commitments (hex); None once destroyed."""
    return connection.scalar(sa.select(selectors.c.salt).where(selectors.c.request == request))


def commitment(salt: str, text: str) -> str:
    """`HMAC-SHA-256(salt, text)` in hex: says nothing without the salt, binds with it."""
    return hmac.new(bytes.fromhex(salt), text.encode(), hashlib.sha256).hexdigest()


def commitments(salt: str, ids: Iterable[int | str]) -> list[str]:
    """Commitments to record ids, sorted, so that their order says nothing either."""
    return sorted(commitment(salt, f"record:{name}") for name in ids)


def purge(connection: sa.Connection, request: str, *, keep_salt: bool = False) -> Entry | None:
    """Take away the selectors of a request and say so in the chain; the commitments stay.

    Args:
        connection: in a transaction.
        request: its id.
        keep_salt: leave the salt, so that somebody who knows a record's id can still be shown that
            it was covered. Without it nothing can be shown, and nothing guessed.

    Returns:
        The entry, or None if there was nothing left to take away. On disk see `scrub`.
    """
    connection.execute(sa.update(heads).values(seq=heads.c.seq))  # queue before reading
    found = connection.execute(sa.select(selectors).where(selectors.c.request == request)).first()
    if found is None or (found.selectors is None and (keep_salt or found.salt is None)):
        return None
    salt = "kept" if keep_salt and found.salt is not None else "destroyed"
    said = {"salt": salt}
    if salt == "kept":  # of 32 random bytes: a hash tells nothing, but a change of them shows
        said["check"] = hashlib.sha256(found.salt.encode()).hexdigest()
    entry = append(connection, PURGED, request, said)
    gone: dict[str, Any] = {"selectors": None} | ({} if salt == "kept" else {"salt": None})
    connection.execute(sa.update(selectors).where(selectors.c.request == request).values(**gone))
    return entry


def scrub(engine: sa.Engine) -> None:
    """Take what was purged out of the database's files too: write-ahead log, dead rows.

    Backups and a Postgres server's own archived logs are beyond its reach.
    """
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        elif connection.dialect.name == "postgresql":
            connection.exec_driver_sql("VACUUM FULL ledger_selectors")


def export(engine: sa.Engine, path: str | Path, *, sign: Any = None, force: bool = False) -> Head:
    """Write the chain as JSON lines that `verify` checks without the database.

    Args:
        engine: of the database.
        path: of the file; its last line names the head.
        sign: a key (`expunge.report.keys.Key`) that signs the head, so that a shortened file is
            noticed without any certificate.
        force: replace a file that is there.

    Returns:
        The head.

    Raises:
        UserError: the file is there, or cannot be written.
    """
    path, end = Path(path), Head(0, ZERO)
    if path.exists() and not force:
        raise UserError(f"{path} exists; pass --force to replace it")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file, engine.connect() as connection:
            for entry in entries(connection):
                file.write(entry.line())
                end = Head(entry.seq, entry.hash)
            file.write(canonical({"head": vars(end), "checkpoint": checkpoint(end, sign)}) + b"\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return end


CHECKPOINT = "application/vnd.expunge.ledger-head+json"
"""Payload type of a signed head."""


def checkpoint(end: Head, sign: Any) -> dict[str, Any] | None:
    """A signed statement of where a ledger ends at this moment; None without a key."""
    if sign is None:
        return None
    from expunge.report.envelope import seal

    return seal(canonical({**vars(end), "issued": now()}), CHECKPOINT, [sign])


def verify(
    source: sa.Engine | str | Path, *, named: Sequence[Head] = (), keys: Any = None
) -> list[str]:
    """Check a ledger: see `expunge.service.ledger_check.verify`."""
    from expunge.service.ledger_check import verify as check

    return check(source, named=named, keys=keys)


def now() -> str:
    """Return the present time as ledgers and certificates hold it: ISO 8601, UTC, milliseconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > EXACT:
        return str(value)
    if isinstance(value, float) and EXACT < abs(value) < 1e21:  # written like a whole number
        return str(int(value))
    return value

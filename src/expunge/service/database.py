"""The service's database: one engine for SQLite or Postgres, transactions that outlive a restart of it."""

from __future__ import annotations

import datetime as dt
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa

from expunge.core.errors import ExpungeError, UserError
from expunge.service.tables import metadata

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds that a transaction waits for a database that is away or busy."""


class DatabaseAway(ExpungeError):
    """The database did not answer within the patience of whoever asked."""


def now() -> str:
    """The present time as ISO 8601 in UTC, to the millisecond."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def database_url(text: str, folder: Path = Path()) -> str:
    """Normalise a database's address.

    Args:
        text: `sqlite:///FILE`, `postgresql://…`, or the name of a file.
        folder: what a relative file name starts from.

    Raises:
        UserError: neither SQLite nor Postgres.
    """
    if "://" not in text:
        text = f"sqlite:///{text}"
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError as error:
        raise UserError(f"{text!r} is not the address of a database") from error
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise UserError("the service needs a database on disk, such as sqlite:///service.db")
        path = (folder / Path(url.database).expanduser()).resolve()
        return f"sqlite:///{path}"
    if url.get_backend_name() in ("postgresql", "postgres"):
        return url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    raise UserError(f"the service keeps its requests in SQLite or Postgres, not {url.drivername}")


class Database:
    """Engines over one database; `read` and `write` run a function in a transaction."""

    def __init__(self, url: str, *, patience: float = PATIENCE) -> None:
        """Remember the address; nothing is opened.

        Args:
            url: from `database_url`.
            patience: seconds to go on trying while the database is away.
        """
        self.url = url
        self.patience = patience
        self.sqlite = url.startswith("sqlite")
        if self.sqlite:
            self.engine = _sqlite(url, "BEGIN IMMEDIATE")
            self._reader = _sqlite(url, "BEGIN")
        else:
            self.engine = self._reader = sa.create_engine(
                url, pool_pre_ping=True, pool_size=10, max_overflow=20, pool_timeout=30
            )

    def create(self) -> None:
        """Create what tables are missing, those of the durable workflows too.

        Raises:
            ExpungeError: the database cannot be used.
        """
        from dbos import DBOS

        from expunge.service.logs import quiet_dbos

        quiet_dbos()
        if self.sqlite:
            file = Path(str(sa.make_url(self.url).database))
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ExpungeError(f"cannot make {file.parent}: {error.strerror}") from error
        try:
            self.write(self._make)
            self.patiently(self._ledger)
            self.patiently(lambda: DBOS.migrate(self.url))
        except sa.exc.SQLAlchemyError as error:
            raise ExpungeError(f"the service's database cannot be used: {_plain(error)}") from error

    def _make(self, connection: sa.Connection) -> None:
        if not self.sqlite:  # two processes that start at once would both create
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7239105)"))
        metadata.create_all(connection)

    def _ledger(self) -> None:
        from expunge.service import ledger

        engine = ledger.open_engine(self.url)
        try:
            ledger.create(engine)
        finally:
            engine.dispose()

    def write(self, work: Callable[[sa.Connection], T], *, patience: float | None = None) -> T:
        """Run `work` in a transaction, again if the database went away or someone was faster.

        Args:
            work: takes a connection; it may run several times and must not mind.
            patience: as that of the database if None.

        Raises:
            DatabaseAway: the database did not come back in time.
        """
        return self.patiently(lambda: _inside(self.engine, work), patience)

    def read(self, work: Callable[[sa.Connection], T], *, patience: float | None = None) -> T:
        """The same for a transaction that changes nothing."""
        return self.patiently(lambda: _inside(self._reader, work), patience)

    def patiently(self, work: Callable[[], T], patience: float | None = None) -> T:
        """Run anything that uses the database, again while that is away or busy.

        Raises:
            DatabaseAway: the database did not come back in time.
        """
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        pause = 0.05
        while True:
            try:
                return work()
            except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
                if not _passing(error):
                    raise
                if time.monotonic() > deadline:
                    raise DatabaseAway(f"the database does not answer: {_plain(error)}") from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 1.0)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        self._reader.dispose()


def _inside(engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    with engine.begin() as connection:
        return work(connection)


def _passing(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether trying again can help: connection lost, locked, deadlock, serialisation."""
    if isinstance(error, sa.exc.TimeoutError):
        return True
    if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
        return True
    original = getattr(error, "orig", None)
    state = str(getattr(original, "sqlstate", "") or "")
    if state[:2] in ("08", "40", "53", "57") or state == "55P03":
        return True
    words = str(original).lower()
    if "locked" in words or "busy" in words:
        return True
    # a server that is starting or gone gives no code
    return (
        isinstance(error, sa.exc.OperationalError)
        and not state
        and "sqlite" not in type(original).__module__
    )


def _plain(error: Exception) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]


def _sqlite(url: str, begin: str) -> sa.Engine:
    engine = sa.create_engine(
        url, poolclass=sa.pool.QueuePool, pool_size=10, max_overflow=40, pool_timeout=30,
        connect_args={"check_same_thread": False, "timeout": 30},
    )  # fmt: skip

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA busy_timeout = 30000")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # what is purged is zeroed

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine

"""The store's SQLite file: connections, transactions, migrations, and errors in plain words."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.pool import NullPool

from expunge.core.errors import ExpungeError, StoreError
from expunge.store.schema import REVISION

BUSY_SECONDS = 60.0
"""How long to wait for another process that is writing."""


class Database:
    """One SQLite file in write-ahead mode. No connection outlives a transaction."""

    def __init__(self, path: Path) -> None:
        """Remember the path; nothing is opened."""
        self.path = path
        self._writer = self._engine(self._connect_to_write, "BEGIN IMMEDIATE")
        self._reader = self._engine(self._connect_to_read, "BEGIN")

    @contextmanager
    def read(self) -> Iterator[sa.Connection | None]:
        """Open a consistent snapshot.

        Yields:
            The connection, or None while nothing has been written.

        Raises:
            StoreError: the file is no store, is damaged, or was written by a newer version.
            ExpungeError: the file cannot be opened.
        """
        with _in_words(self.path):
            if not self.path.exists():
                yield None
                return
            with self._reader.connect() as connection, connection.begin():
                revision = self._revision(connection)
                if revision in (None, REVISION):
                    yield None if revision is None else connection
                    return
            # An older schema is brought up to date; the queries know only the newest.
            with self.write() as connection:
                yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that no other process can write beside; create what is missing.

        Yields:
            The connection; the transaction is undone if an error passes through.

        Raises:
            StoreError: the file is no store, is damaged, or was written by a newer version.
            ExpungeError: the folder cannot be written, the disk is full, or another process
                kept writing for longer than `BUSY_SECONDS`.
        """
        with _in_words(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._writer.connect() as connection, connection.begin():
                if self._revision(connection) != REVISION:
                    _migrate(connection)
                yield connection

    def _revision(self, connection: sa.Connection) -> str | None:
        """Revision of the schema, or None for an empty file."""
        listed = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")
        tables = {name for name in listed.scalars() if not name.startswith("sqlite_")}
        if not tables:
            return None
        if "alembic_version" not in tables:
            raise StoreError(f"{self.path} is a database, but not a store of expunge")
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if found is None and tables == {"alembic_version"}:
            return None
        if found != REVISION and found not in _known_revisions():
            raise StoreError(
                f"the store {self.path.parent} was written by a newer version of expunge "
                f"(schema {found}, this version knows {REVISION}); upgrade expunge to open it"
            )
        return str(found)

    @staticmethod
    def _engine(connect: object, begin: str) -> sa.Engine:
        engine = sa.create_engine("sqlite://", creator=connect, poolclass=NullPool)

        # The driver is told to leave transactions alone, so that tables are created inside them.
        @sa.event.listens_for(engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    def _connect(self, options: str) -> sqlite3.Connection:
        address = f"{self.path.absolute().as_uri()}?{options}"
        connection = sqlite3.connect(
            address, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA foreign_keys = ON")
        return connection

    def _connect_to_read(self) -> sqlite3.Connection:
        folder, log = self.path.parent, self.path.with_name(self.path.name + "-wal")
        # Reading in write-ahead mode needs a scratch file, which a read-only folder cannot get.
        if not os.access(folder, os.W_OK) and not log.exists():
            return self._connect("mode=ro&immutable=1")
        return self._connect("mode=rw")

    def _connect_to_write(self) -> sqlite3.Connection:
        new = not self.path.exists() or not self.path.stat().st_size
        connection = self._connect("mode=rwc")
        try:
            if new:
                _write_ahead(connection)
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch a new file to write-ahead mode; SQLite does not wait for others by itself here."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _scripts(connection: sa.Connection | None = None) -> object:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "expunge.store:migrations")
    config.attributes["connection"] = connection
    return config


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(_scripts())  # type: ignore[arg-type]
    return {script.revision for script in scripts.walk_revisions()}


def _migrate(connection: sa.Connection) -> None:
    from alembic import command

    command.upgrade(_scripts(connection), "head")  # type: ignore[arg-type]


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Turn errors of the file system and of SQLite into sentences."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExpungeError(f"cannot use the store {path.parent}: {reason}") from error
    except sa.exc.OperationalError as error:
        text = str(error.orig)
        if "locked" in text or "busy" in text:
            message = f"another process has been writing to {path} for too long; try again"
        elif "readonly" in text:
            message = f"cannot write to the store {path.parent}: it is read-only"
        elif "full" in text:
            message = f"cannot write to the store {path.parent}: the disk is full"
        else:
            message = f"cannot use the store {path.parent}: {text}"
        raise ExpungeError(message) from error
    except sa.exc.IntegrityError as error:
        raise ExpungeError(f"the store {path.parent} refused a row: {error.orig}") from error
    except sa.exc.DatabaseError as error:
        raise StoreError(f"{path} is not a store, or is damaged ({error.orig})") from error


def cannot_write(where: Path, error: BaseException) -> ExpungeError:
    """Say that a file could not be written, and why."""
    reason = getattr(error, "strerror", None) or str(error)
    return ExpungeError(f"cannot write to the store {where}: {reason}")

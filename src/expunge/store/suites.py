"""Suites and the append-only log of their jobs."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from expunge.store import queries, rows, schema
from expunge.store.database import Database
from expunge.store.ids import new_id


class SuiteLog:
    """The part of a store that remembers which jobs of which suite were run, and when."""

    _database: Database

    def start_suite(self, name: str, spec: dict[str, Any]) -> str:
        """Add a suite and return its id.

        Raises:
            StoreError: the specification has no JSON form.
            ExpungeError: the store cannot be written.
        """
        row = {"name": name, "created": queries.now(), "spec": rows.json_form(spec, "suite")}
        with self._database.write() as connection:
            # Drawn under the lock, so that ids sort in the order of the rows.
            suite = new_id()
            connection.execute(sa.insert(schema.suites), {**row, "id": suite})
        return suite

    def suites(self) -> list[dict[str, Any]]:
        """All suites (id, name, created, spec), newest first."""
        query = sa.select(schema.suites).order_by(schema.suites.c.id.desc())
        with self._database.read() as connection:
            return queries.fetch(connection, query)

    def suite(self, id_or_prefix: str) -> dict[str, Any]:
        """Return a suite (id, name, created, spec) by its id or the beginning of it.

        Raises:
            StoreError: there is none, or several begin so.
        """
        table = schema.suites
        with self._database.read() as connection:
            found = queries.resolve(connection, table, id_or_prefix, "suite")
            return queries.fetch(connection, sa.select(table).where(table.c.id == found))[0]

    def log_job(self, suite: str, key: str, status: str, run: str | None) -> None:
        """Append one line to a suite's log.

        Args:
            suite: the suite's id or the beginning of it.
            key: content key of the job.
            status: started, done, failed, skipped, …
            run: the run it made or found, if any.

        Raises:
            StoreError: there is no such suite or run.
            ExpungeError: the store cannot be written.
        """
        with self._database.read() as connection:
            suite_id = queries.resolve(connection, schema.suites, suite, "suite")
            run_id = None if run is None else queries.resolve(connection, schema.runs, run, "run")
        row = {"suite_id": suite_id, "key": key, "status": status, "run_id": run_id}
        with self._database.write() as connection:
            connection.execute(sa.insert(schema.jobs), {**row, "time": queries.now()})

    def jobs(self, suite: str) -> list[dict[str, Any]]:
        """Log of a suite in order, one dict a line: number, key, status, run, time.

        Raises:
            StoreError: there is no such suite.
        """
        table = schema.jobs
        columns = (table.c.number, table.c.key, table.c.status, table.c.run_id.label("run"))
        with self._database.read() as connection:
            suite_id = queries.resolve(connection, schema.suites, suite, "suite")
            query = sa.select(*columns, table.c.time).where(table.c.suite_id == suite_id)
            return queries.fetch(connection, query.order_by(table.c.number))

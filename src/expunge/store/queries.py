"""Queries of the store; every one takes None for a store that nothing was written to."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from expunge.core.errors import StoreError
from expunge.store import schema
from expunge.store.rows import Run

Entry = tuple[Run, Sequence[Mapping[str, Any]]]
"""A run and the rows of its findings."""


def now() -> str:
    """Return the present time as the tables hold it: ISO 8601, UTC, milliseconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def fetch(connection: sa.Connection | None, query: sa.Select[Any]) -> list[dict[str, Any]]:
    """Rows of a query as dicts."""
    if connection is None:
        return []
    return [dict(row) for row in connection.execute(query).mappings()]


def resolve(connection: sa.Connection | None, table: sa.Table, prefix: str, noun: str) -> str:
    """Return the one id of a table that begins with `prefix`.

    Raises:
        StoreError: there is none, or there are several; some of them are named.
    """
    column, start = table.c.id, prefix.strip().lower()
    if not start:
        raise StoreError(f"say which {noun}: its id or the beginning of it")
    found = []
    if connection is not None:
        query = sa.select(column).where(column.startswith(start, autoescape=True))
        found = list(connection.scalars(query.order_by(column).limit(6)))
    if not found:
        raise StoreError(f"no {noun} in the store has an id that begins with {prefix!r}")
    if len(found) > 1:
        more = ", …" if len(found) > 5 else ""
        raise StoreError(
            f"{prefix!r} is the beginning of several {noun}s: {', '.join(found[:5])}{more}"
        )
    return str(found[0])


def known(connection: sa.Connection | None, wanted: Iterable[str]) -> set[str]:
    """Which of some ids are ids of runs."""
    ids, column = list(wanted), schema.runs.c.id
    if connection is None or not ids:
        return set()
    return set(connection.scalars(sa.select(column).where(column.in_(ids))))


def done(connection: sa.Connection | None, kind: str, key: str) -> str | None:
    """Id of the finished run of a kind and key; the oldest, since imports may add others."""
    if connection is None:
        return None
    run = schema.runs.c
    same = (run.kind == kind) & (run.key == key) & (run.status == "done")
    return connection.scalar(sa.select(sa.func.min(run.id)).where(same))


def runs(
    connection: sa.Connection | None, *where: sa.ColumnElement[bool], limit: int | None = None
) -> list[Run]:
    """Runs that satisfy all conditions, newest first."""
    if connection is None:
        return []
    run, parent = schema.runs, schema.parents
    order = run.c.id.desc()
    chosen = sa.select(run.c.id).where(*where).order_by(order).limit(limit)
    lines = sa.select(parent).where(parent.c.run_id.in_(chosen)).order_by(parent.c.position)
    parents: dict[str, list[str]] = {}
    for line in fetch(connection, lines):
        parents.setdefault(line["run_id"], []).append(line["parent_id"])
    found = fetch(connection, sa.select(run).where(*where).order_by(order).limit(limit))
    return [Run.from_row(row, parents.get(row["id"], ())) for row in found]


def findings(connection: sa.Connection | None, run: str) -> list[dict[str, Any]]:
    """Rows of the findings of an audit in order, without `run_id`."""
    table = schema.findings
    columns = [column for column in table.c if column.name != "run_id"]
    query = sa.select(*columns).where(table.c.run_id == run).order_by(table.c.position)
    return fetch(connection, query)


def insert(connection: sa.Connection, entries: Sequence[Entry]) -> None:
    """Add runs, then what refers to runs, so that any order of entries will do."""
    parents = [
        {"run_id": run.id, "position": position, "parent_id": parent}
        for run, _ in entries
        for position, parent in enumerate(run.parents)
    ]
    found = [{**row, "run_id": run.id} for run, rows in entries for row in rows]
    values = (
        (schema.runs, [run.to_row() for run, _ in entries]),
        (schema.parents, parents),
        (schema.findings, found),
    )
    for table, lines in values:
        if lines:
            connection.execute(sa.insert(table), lines)

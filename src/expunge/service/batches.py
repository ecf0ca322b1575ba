"""Batches: one deletion for all requests of a model that are ready; claimed, released or given back as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from expunge.service import states
from expunge.service.database import now
from expunge.service.requests import READY, Enqueue, Row, ensure_batch, lock_model, move
from expunge.service.tables import batches, models, requests, samples, versions


def claim(connection: sa.Connection, batch: str, enqueue: Enqueue, most: int) -> list[str]:
    """Take all requests of a model that are ready, under the batch's name.

    Args:
        connection: of the transaction.
        batch: identifier of the batch, that of its workflow; claiming twice gives the same.
        enqueue: starts the next batch for what does not fit.
        most: largest number of requests.

    Returns:
        The requests, in order of their identifiers.
    """
    row = connection.execute(sa.select(batches).where(batches.c.id == batch)).mappings().one()
    lock_model(connection, row["model"])
    state = connection.execute(sa.select(batches.c.state).where(batches.c.id == batch)).scalar()
    if state == "waiting":
        ready = connection.execute(
            sa
            .select(requests.c.id, requests.c.alone)
            .where(requests.c.model == row["model"], READY, requests.c.batch.is_(None))
            .order_by(requests.c.id)
        ).all()
        together = [one.id for one in ready if not one.alone][:most]
        chosen = together or [one.id for one in ready][:1]
        moved = move(
            connection, chosen, (states.PLANNED, states.APPROVED), states.RUNNING,
            {"batch": batch, "together": len(chosen)}, batch=batch, error=None,
        )  # fmt: skip
        set_state(
            connection, batch, "running" if moved else "done"
        )  # all may be withdrawn meanwhile
        if len(ready) > len(chosen):
            ensure_batch(connection, row["model"], enqueue)
    return members(connection, batch)


def ready(connection: sa.Connection, batch: str) -> list[str]:
    """Requests that a batch would claim now."""
    query = sa.select(requests.c.id).where(
        requests.c.model == model_of(connection, batch), READY, requests.c.batch.is_(None)
    )
    return list(connection.execute(query).scalars())


def members(connection: sa.Connection, batch: str) -> list[str]:
    """Requests that a batch holds."""
    query = sa.select(requests.c.id).where(requests.c.batch == batch).order_by(requests.c.id)
    return list(connection.execute(query).scalars())


def ids_of(connection: sa.Connection, identifiers: Sequence[str]) -> list[int]:
    """Sample ids of several requests, sorted, each once."""
    found = connection.execute(
        sa.select(samples.c.ids).where(samples.c.request.in_(identifiers))
    ).scalars()
    return sorted({int(one) for ids in found for one in ids or ()})


def current(connection: sa.Connection, model: str) -> Row | None:
    """The version of a model that is in force; None while it is the original."""
    row = connection.execute(
        sa.select(versions)
        .join(models, sa.and_(models.c.name == versions.c.model, models.c.version == versions.c.version))
        .where(models.c.name == model)
    ).mappings().first()  # fmt: skip
    return None if row is None else dict(row)


def version(connection: sa.Connection, model: str, number: int) -> Row | None:
    """One version of a model."""
    row = connection.execute(
        sa.select(versions).where(versions.c.model == model, versions.c.version == number)
    ).mappings().first()  # fmt: skip
    return None if row is None else dict(row)


def release(
    connection: sa.Connection,
    batch: str,
    model: str,
    folder: str | None,
    weights: str,
    record: Mapping[str, Any],
    certificates: Mapping[str, Any],
    predecessor: int,
) -> bool:
    """Put a version into force and release its requests, all at once.

    Args:
        connection: of the transaction.
        batch: whose deletion it is.
        model: name of the model.
        folder: of the new version; None if there was nothing left to delete.
        weights: hash of the weights in force from now on.
        record: of the deletion, without ids.
        certificates: signed envelope by request.
        predecessor: version that was in force when the deletion began.

    Returns:
        False if another version came into force meanwhile, and nothing was changed.
    """
    lock_model(connection, model)
    state = connection.execute(sa.select(batches.c.state).where(batches.c.id == batch)).scalar()
    if state == "done":
        return True
    force = connection.execute(sa.select(models.c.version).where(models.c.name == model)).scalar()
    if force != predecessor:
        return False
    if folder is not None:
        connection.execute(
            sa.insert(versions),
            {
                "model": model, "version": predecessor + 1, "batch": batch, "folder": folder,
                "weights": weights, "created": now(), "record": dict(record),
            },
        )  # fmt: skip
        connection.execute(
            sa.update(models).where(models.c.name == model).values(version=predecessor + 1)
        )
    held = members(connection, batch)
    move(connection, held, states.RUNNING, states.AUDITED, {"findings": len(record["findings"])})
    note = {
        "version": predecessor + (folder is not None),
        "weights": weights,
        "outcome": "deleted" if folder is not None else "already-deleted",
    }
    for one in held:
        connection.execute(
            sa
            .update(requests)
            .where(requests.c.id == one)
            .values(certificate=certificates.get(one))
        )
    move(
        connection, held, states.AUDITED, states.RELEASED, note, result={**record, **note}, error=None
    )  # fmt: skip
    set_state(connection, batch, "done")
    return True


def give_back(
    connection: sa.Connection, batch: str, model: str, enqueue: Enqueue, why: str
) -> list[str]:
    """Let the requests of a batch that failed be carried out one by one.

    Returns:
        The requests, which now wait again, each for a batch of its own.
    """
    lock_model(connection, model)
    held = members(connection, batch)
    moved: list[str] = []
    for hold, state in ((False, states.PLANNED), (True, states.APPROVED)):
        some = list(
            connection.execute(
                sa.select(requests.c.id).where(
                    requests.c.id.in_(held), requests.c.hold.is_(hold),
                    requests.c.state == states.RUNNING,
                )
            ).scalars()
        )  # fmt: skip
        if some:
            connection.execute(
                sa
                .update(requests)
                .where(requests.c.id.in_(some))
                .values(attempt=requests.c.attempt + 1)
            )
            moved += move(
                connection, some, states.RUNNING, state, {"again": "alone", "why": why},
                alone=True, batch=None,
            )  # fmt: skip
    set_state(connection, batch, "failed")
    if moved:
        ensure_batch(connection, model, enqueue)
    return moved


def end(
    connection: sa.Connection,
    batch: str,
    after: str,
    why: str,
    note: Mapping[str, Any] | None = None,
) -> None:
    """End all requests of a batch as failed or rejected."""
    move(
        connection, members(connection, batch), (states.RUNNING, states.AUDITED), after,
        {"why": why, **(note or {})}, error=why,
    )  # fmt: skip
    set_state(connection, batch, "failed")


def set_state(connection: sa.Connection, batch: str, state: str) -> None:
    """Set the state of a batch."""
    connection.execute(sa.update(batches).where(batches.c.id == batch).values(state=state))


def model_of(connection: sa.Connection, batch: str) -> str:
    """Name of the model a batch changes."""
    return str(
        connection.execute(sa.select(batches.c.model).where(batches.c.id == batch)).scalar_one()
    )


def contents(connection: sa.Connection, batch: str) -> tuple[str, list[str], list[int]]:
    """Model, requests and sample ids of a batch."""
    held = members(connection, batch)
    return model_of(connection, batch), held, ids_of(connection, held)


def ids_by_request(connection: sa.Connection, identifiers: Sequence[str]) -> dict[str, list[int]]:
    """Sample ids of each of several requests."""
    query = sa.select(samples.c.request, samples.c.ids).where(samples.c.request.in_(identifiers))
    return {row.request: list(row.ids) for row in connection.execute(query)}


def open_batches(connection: sa.Connection, model: str) -> list[str]:
    """Batches of a model that have not ended; what they have written may still be released."""
    query = sa.select(batches.c.id).where(
        batches.c.model == model, batches.c.state.in_(("waiting", "running"))
    )
    return list(connection.execute(query).scalars())


def state_of(connection: sa.Connection, batch: str) -> str:
    """State of a batch."""
    return str(
        connection.execute(sa.select(batches.c.state).where(batches.c.id == batch)).scalar_one()
    )


def kept_folders(connection: sa.Connection, model: str, count: int) -> list[str]:
    """Folders of the newest versions of a model."""
    query = (
        sa
        .select(versions.c.folder)
        .where(versions.c.model == model)
        .order_by(versions.c.version.desc())
        .limit(count)
    )
    return list(connection.execute(query).scalars())

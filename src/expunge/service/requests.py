"""Requests: what comes in, every move of their states, and what may be asked about them.

All functions take a connection and belong into one transaction of `Database.write`; a move that was made
before changes nothing, so that a replay adds no history and no entry of the ledger.

Locks are taken in one order everywhere (model, requests by id, ledger), so that no two wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import sqlalchemy as sa

from expunge.core.errors import RequestError
from expunge.core.hashing import plain
from expunge.core.request import Request
from expunge.service import ledger, states
from expunge.service.database import now
from expunge.service.errors import Conflict, NotFound, Reused
from expunge.service.tables import batches, history, models, requests, samples
from expunge.store.ids import new_id

Row = Mapping[str, Any]
Enqueue = Callable[..., None]
"""`enqueue(connection, workflow, id, partition=None, delay=0.0)` in the caller's transaction."""

REQUEST_FLOW = "expunge-request"
BATCH_FLOW = "expunge-batch"
READY = sa.or_(
    requests.c.state == states.APPROVED,
    sa.and_(requests.c.state == states.PLANNED, requests.c.hold.is_(False)),
)
"""Requests that a batch may claim."""
LENGTH = 26
"""Characters of an identifier."""
_ONE = sa.select(requests).where(requests.c.id == sa.bindparam("id"))
LONGEST_SELECTOR = 200_000
"""Characters of a request as JSON."""


def submit(
    connection: sa.Connection,
    identifier: str,
    model: str,
    request: Request,
    enqueue: Enqueue,
    *,
    key: str | None = None,
) -> tuple[Row, bool]:
    """Write a request down, with the workflow that will carry it.

    Args:
        connection: of the transaction.
        identifier: a new one, drawn before the transaction so that it may be repeated.
        model: name of the model.
        request: what to forget.
        enqueue: starts the workflow in the same transaction.
        key: idempotency key; the same key and content give the request that was submitted first.

    Returns:
        The request, and whether it is new.

    Raises:
        Reused: the key came before with another content.
        RequestError: the selector is too long.
    """
    found = connection.execute(
        sa.select(requests).where(
            sa.or_(requests.c.id == identifier, requests.c.key == key)
            if key is not None
            else requests.c.id == identifier
        )
    ).mappings().first()  # fmt: skip
    asked = plain({k: v for k, v in request.to_dict().items() if k not in ("time", "reason")})
    if found is not None:
        if found["model"] != model or not _same(connection, found["id"], asked):
            raise Reused("this idempotency key was used for another request; take a new one")
        return dict(found), False
    if len(json.dumps(asked)) > LONGEST_SELECTOR:
        raise RequestError("the request names too much; split it")
    if any(abs(int(label)) > ledger.EXACT for label in request.label or ()):
        raise RequestError("no class has a number of that size")
    if "\0" in request.reason:
        raise RequestError("the reason holds a character that is no text")
    time = now()
    row: dict[str, Any] = {
        "id": identifier, "model": model, "state": states.RECEIVED, "attempt": 1, "key": key,
        "form": request.form, "reason": request.reason, "created": time, "updated": time,
        "hold": False, "alone": False, "batch": None, "count": None, "plan": None, "result": None,
        "error": None, "certificate": None,
    }  # fmt: skip
    connection.execute(sa.insert(requests), row)
    connection.execute(
        sa.insert(history),
        {"request": identifier, "number": 1, "state": states.RECEIVED, "time": time, "note": {}},
    )
    commitment = ledger.keep(connection, identifier, asked)
    ledger.append(
        connection, states.RECEIVED, identifier,
        {"attempt": 1, "model": model, "form": request.form, "selectors": commitment},
    )  # fmt: skip
    enqueue(connection, REQUEST_FLOW, identifier)
    return row, True


def _same(connection: sa.Connection, identifier: str, asked: Mapping[str, Any]) -> bool:
    """Whether a request asked for this; told by its commitment, as what it named may be deleted."""
    salt, promised = ledger.salt_of(connection, identifier), ledger.promised(connection, identifier)
    if salt is None or promised is None:  # nobody can tell any more; rather ask than lose one
        return False
    return ledger.commitment(salt, ledger.canonical(asked).decode()) == promised


def move(
    connection: sa.Connection,
    identifiers: str | Iterable[str],
    before: str | Collection[str],
    after: str,
    note: Mapping[str, Any] | None = None,
    aside: Mapping[str, Any] | None = None,
    **values: Any,
) -> list[str]:
    """Move requests to another state; those that are not in `before` stay as they are.

    Args:
        connection: of the transaction.
        identifiers: one or several requests.
        before: the state, or states, they have to be in.
        after: the state they enter.
        note: what is worth telling, for history and ledger; no ids of records, no words of people.
        aside: words of people, for the history alone: nothing can be taken out of the ledger.
        **values: further columns to set.

    Returns:
        The requests that moved.
    """
    wanted = [identifiers] if isinstance(identifiers, str) else sorted(identifiers)
    allowed = [before] if isinstance(before, str) else list(before)
    for state in allowed:
        if not states.may(state, after):
            raise AssertionError(f"no request goes from {state} to {after}")
    rows = connection.execute(
        sa
        .select(requests.c.id, requests.c.attempt)
        .where(requests.c.id.in_(wanted), requests.c.state.in_(allowed))
        .order_by(requests.c.id)
        .with_for_update()
    ).all()
    if not rows:
        return []
    time, moved = now(), [row.id for row in rows]
    connection.execute(
        sa
        .update(requests)
        .where(requests.c.id.in_(moved))
        .values(state=after, updated=time, **values)
    )
    last: dict[str, int] = dict(
        connection.execute(
            sa
            .select(history.c.request, sa.func.max(history.c.number))
            .where(history.c.request.in_(moved))
            .group_by(history.c.request)
        ).all()  # type: ignore[arg-type]
    )
    text = plain(dict(note or {}))
    connection.execute(
        sa.insert(history),
        [
            {
                "request": one,
                "number": last[one] + 1,
                "state": after,
                "time": time,
                "note": {**text, **(aside or {})},
            }
            for one in moved
        ],
    )
    for row in rows:
        ledger.append(connection, after, row.id, {"attempt": row.attempt, **text})
    if after in states.FINAL:
        forget_selectors(connection, moved)
    return moved


def say(connection: sa.Connection, identifiers: Iterable[str], why: str | None) -> None:
    """Say with requests why they wait; they stay in their state, and None takes it back.

    Those that have ended meanwhile, as by being withdrawn, wait for nothing.
    """
    connection.execute(
        sa
        .update(requests)
        .where(requests.c.id.in_(list(identifiers)), requests.c.state.not_in(states.FINAL))
        .values(error=why)
    )


def unheld(connection: sa.Connection, model: str, since: str) -> int:
    """Samples of a model's requests that went on since a time without anybody's approval.

    When they were submitted does not matter: workers that were down may find many old ones at once.
    """
    total = sa.select(sa.func.coalesce(sa.func.sum(requests.c.count), 0)).where(
        requests.c.model == model, requests.c.hold.is_(False), requests.c.updated >= since,
        requests.c.state.in_((states.PLANNED, states.RUNNING, states.AUDITED, states.RELEASED)),
    )  # fmt: skip
    return int(connection.execute(total).scalar_one())


def forget_selectors(connection: sa.Connection, identifiers: Iterable[str]) -> None:
    """Delete what names people or records, once a request has ended."""
    wanted = list(identifiers)
    connection.execute(sa.delete(samples).where(samples.c.request.in_(wanted)))
    connection.execute(sa.update(requests).where(requests.c.id.in_(wanted)).values(reason=""))
    for one in wanted:  # whoever knows a record's id can still be shown that it was covered
        ledger.purge(connection, one, keep_salt=True)


def get(connection: sa.Connection, prefix: str) -> Row:
    """Read one request by its identifier or the unique beginning of one.

    Raises:
        NotFound: there is none, or there are several.
    """
    if not prefix.isalnum() or len(prefix) > LENGTH:
        raise NotFound(f"{prefix[:40]!r} is no identifier of a request")
    if len(prefix) == 26:  # clients ask for states often
        row = connection.execute(_ONE, {"id": prefix.lower()}).mappings().first()
        if row is not None:
            return dict(row)
    found = (
        connection.execute(
            sa.select(requests).where(
                # no comparison of order: that is the database's, and depends on its language
                requests.c.id == prefix.lower() if len(prefix) == LENGTH
                else requests.c.id.startswith(prefix.lower(), autoescape=True)
            ).limit(2)
        ).mappings().all()
    )  # fmt: skip
    if len(found) != 1:
        what = "several requests begin" if found else "no request begins"
        raise NotFound(f"{what} with {prefix}")
    return dict(found[0])


def listed(
    connection: sa.Connection,
    *,
    model: str | None = None,
    state: str | None = None,
    limit: int = 100,
    before: str | None = None,
) -> list[Row]:
    """The newest requests, newest first.

    Args:
        connection: of the transaction.
        model: only those of a model.
        state: only those in a state.
        limit: at most so many.
        before: only those older than this identifier, for the next page.
    """
    query = sa.select(requests).order_by(requests.c.id.desc()).limit(limit)
    if model is not None:
        query = query.where(requests.c.model == model)
    if state is not None:
        query = query.where(requests.c.state == state)
    if before is not None:
        query = query.where(requests.c.id < before)
    return [dict(row) for row in connection.execute(query).mappings()]


def history_of(connection: sa.Connection, identifier: str, after: int = 0) -> list[Row]:
    """States a request went through, in order, from entry `after` on."""
    query = (
        sa
        .select(history.c.number, history.c.state, history.c.time, history.c.note)
        .where(history.c.request == identifier, history.c.number > after)
        .order_by(history.c.number)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def selector_of(connection: sa.Connection, identifier: str) -> Request:
    """What a request asks for.

    Raises:
        Conflict: it has ended, and its selector was deleted.
    """
    kept = ledger.kept(connection, identifier)
    if kept is None:
        raise Conflict(f"request {identifier} has ended; what it named was deleted with it")
    return Request.from_dict(kept)


def counts(connection: sa.Connection) -> dict[tuple[str, str], int]:
    """How many requests there are by model and state."""
    query = sa.select(requests.c.model, requests.c.state, sa.func.count()).group_by(
        requests.c.model, requests.c.state
    )
    return {(model, state): int(n) for model, state, n in connection.execute(query)}


def approve(connection: sa.Connection, identifier: str, enqueue: Enqueue, by: str = "") -> Row:
    """Let a request that waits for approval be carried out.

    Raises:
        Conflict: it does not wait for approval.
    """
    row = get(connection, identifier)
    lock_model(connection, row["model"])
    waits = row["hold"] and row["state"] == states.PLANNED
    if waits and move(connection, row["id"], states.PLANNED, states.APPROVED, {"by": by}):
        ensure_batch(connection, row["model"], enqueue)
    row = get(connection, row["id"])
    if not row["hold"] or row["state"] in (states.RECEIVED, states.RESOLVED, states.CANCELLED):
        raise Conflict(f"request {row['id']} is {row['state']} and does not wait for approval")
    return row


def cancel(connection: sa.Connection, identifier: str, why: str = "") -> Row:
    """Withdraw a request that no batch has begun to carry out.

    Raises:
        Conflict: it is being carried out, or has ended.
    """
    row = get(connection, identifier)
    said = {"why": why} if why else {}
    move(connection, row["id"], states.CANCELLABLE, states.CANCELLED, aside=said, error=None)
    row = get(connection, row["id"])
    if row["state"] != states.CANCELLED:
        raise Conflict(f"request {row['id']} is {row['state']} and cannot be cancelled any more")
    return row


def lock_model(connection: sa.Connection, model: str) -> None:
    """Let nobody else plan or claim for a model until the end of the transaction."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    connection.execute(insert(models).values(name=model, version=0).on_conflict_do_nothing())
    connection.execute(sa.select(models.c.name).where(models.c.name == model).with_for_update())


def ensure_batch(
    connection: sa.Connection, model: str, enqueue: Enqueue, delay: float = 0.0
) -> None:
    """See to it that a batch which has not begun will come to see all ready requests of a model.

    The caller holds the model's lock.
    """
    waiting = connection.execute(
        sa.select(batches.c.id).where(batches.c.model == model, batches.c.state == "waiting")
    ).first()
    if waiting is None:
        identifier = f"batch-{new_id()}"
        connection.execute(
            sa.insert(batches),
            {"id": identifier, "model": model, "state": "waiting", "created": now()},
        )
        enqueue(connection, BATCH_FLOW, identifier, partition=model, delay=delay)


def noted(connection: sa.Connection, identifiers: Iterable[str], word: str) -> bool:
    """Whether the last entry in the history of one of the requests has a note of that name."""
    for one in identifiers:
        found = history_of(connection, one)
        if found and word in found[-1]["note"]:
            return True
    return False

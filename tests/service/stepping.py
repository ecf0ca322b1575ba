"""Workflows without their engine: what waits is stepped through in this thread."""

from __future__ import annotations

import sqlalchemy as sa

from expunge.service import states, steps
from expunge.service.tables import batches, requests


def step_until_done(service) -> None:
    """Run the steps of everything that can go on, as the workflows do, until nothing moves."""
    while True:
        open_, waiting = service.database.read(_look)
        for one in open_:
            if steps.resolve(service, one):
                steps.plan(service, one)
        for batch in waiting:
            run_batch(service, batch)
        if not open_ and not waiting:
            return


def run_batch(service, batch) -> str:
    claimed = steps.claim(service, batch)
    if not claimed["requests"]:
        return "empty"
    try:
        for how in ("policy", "retrain"):
            made = steps.forget(service, batch, how)
            found = steps.audit(service, batch, how)
            if not found["broken"]:
                steps.release(service, batch, how, made, found)
                steps.clean(service, batch)
                return "released"
            if how == "retrain" or not found["escalate"]:
                break
            steps.escalate(service, batch, found)
        steps.reject(service, batch, found)
        return "rejected"
    except Exception as error:
        return steps.give_back(service, batch, str(error))


def _look(connection):
    open_ = connection.execute(
        sa.select(requests.c.id).where(requests.c.state.in_((states.RECEIVED, states.RESOLVED)))
    ).scalars().all()  # fmt: skip
    waiting = connection.execute(
        sa.select(batches.c.id).where(batches.c.state == "waiting")
    ).scalars().all()  # fmt: skip
    return open_, waiting

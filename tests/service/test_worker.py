"""Workers: take over from the dead, leave the living alone, and end what no workflow carries."""

from __future__ import annotations

import fcntl
import socket
import time

import pytest
import sqlalchemy as sa

import expunge as xp
from expunge.report.keys import Keys
from expunge.service import requests
from expunge.service import worker as module
from expunge.service.tables import workers
from expunge.service.worker import Worker


@pytest.fixture
def running(service):
    made = Worker(service)
    made.start()
    yield made
    made.stop()


def wait(service, one, seconds=60.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        row = service.get(one)
        if row["state"] in ("released", "rejected", "failed", "cancelled"):
            return row
        time.sleep(0.05)
    raise AssertionError(row["state"])


def names(service):
    return set(service.database.read(lambda c: c.execute(sa.select(workers.c.id)).scalars().all()))


def add(service, one, host=None, beat=None):
    row = {"id": one, "host": host or socket.gethostname(), "started": "", "beat": time.time() if beat is None else beat}  # fmt: skip
    service.database.write(lambda c: c.execute(sa.insert(workers), row))


def test_a_worker_carries_requests_out_and_looks_after_others(service, running, monkeypatch):
    """One worker for several looks: starting the engine takes a while."""
    one = service.submit("fake", xp.forget(ids=[1]))[0]["id"]
    assert wait(service, one)["state"] == "released"

    # without a key to sign with, requests wait; they go on as soon as there is one
    keys = Keys(service.keys)
    keys.revoke(keys.signer().id)
    one = service.submit("fake", xp.forget(ids=[77]))[0]["id"]
    deadline = time.monotonic() + 60
    while not service.get(one)["error"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert service.get(one)["state"] == "planned" and "waits" in service.get(one)["error"]
    keys.create()
    assert wait(service, one)["state"] == "released" and service.get(one)["error"] is None

    # of this machine: dead as soon as its lock is free, however fresh its last sign of life
    folder = service.policy.folder / "workers"
    lock = (folder / "other.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    add(service, "other")
    assert "other" not in running.dead()
    lock.close()
    deadline = time.monotonic() + 30
    while "other" in names(service) or (folder / "other.lock").exists():  # the lock goes last
        assert time.monotonic() < deadline
        time.sleep(0.05)

    # of another machine: by its silence alone
    add(service, "far", host="elsewhere")
    assert "far" not in running.dead()
    service.database.write(lambda c: c.execute(sa.update(workers).where(workers.c.id == "far").values(beat=time.time() - 31)))  # fmt: skip
    assert "far" in running.dead() or "far" not in names(service)

    # somebody took this one for dead; it says that it lives
    service.database.write(
        lambda c: c.execute(sa.delete(workers).where(workers.c.id == running.id))
    )
    deadline = time.monotonic() + 30
    while running.id not in names(service):
        assert time.monotonic() < deadline
        time.sleep(0.05)

    # a workflow that was cancelled from outside carries its request no more
    from dbos import DBOS

    monkeypatch.setattr(module, "GRACE_MS", 0)
    running.service.policy.models["fake"].__dict__["batch_seconds"] = 600.0
    two = service.submit("fake", xp.forget(ids=[2]))[0]["id"]
    while service.get(two)["state"] != "planned":
        time.sleep(0.05)
    from expunge.service.tables import batches

    batch = service.database.read(lambda c: c.execute(sa.select(batches.c.id).where(batches.c.state == "waiting")).scalar())  # fmt: skip
    running.service.policy.models["fake"].__dict__["batch_seconds"] = 0.0
    DBOS.cancel_workflow(batch)
    assert wait(service, two)["state"] == "released"  # by the batch that takes its place

    histories = [
        service.database.read(lambda c, i=i: requests.history_of(c, i)) for i in (one, two)
    ]
    assert [h[-1]["state"] for h in histories] == ["released", "released"]


def test_a_lock_that_is_held_is_never_taken(service, tmp_path):
    watching = Worker(service)
    folder = service.policy.folder / "workers"
    folder.mkdir(parents=True)
    with (folder / "x.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not watching._let_go("x", socket.gethostname())
        assert not watching._let_go("x", "elsewhere")
    assert watching._let_go("x", socket.gethostname())
    assert not watching._let_go("x", "elsewhere") and not watching._let_go(
        "none", socket.gethostname()
    )

"""A worker process: takes workflows from the queues, shows that it lives, takes over from workers that died.

A worker of the same machine is known to be dead as soon as the kernel has let go of its lock; one of
another machine when it has been silent for `dead_seconds`. Its unfinished workflows go back to their queue.
A worker that was only slow does no harm: steps can be run twice, and one of two results counts.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig

from expunge.core.errors import ExpungeError, UserError
from expunge.service import batches, states, workflow
from expunge.service.database import now
from expunge.service.logs import logger
from expunge.service.requests import ensure_batch, lock_model, move
from expunge.service.service import (
    APPLICATION,
    BATCHES,
    REQUESTS,
    VERSION,
    JsonSerializer,
    Service,
)
from expunge.service.tables import batches as batch_table
from expunge.service.tables import requests as request_table
from expunge.service.tables import workers

BEAT_SECONDS = 1.0
ENDED_BADLY = ("ERROR", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "CANCELLED")
GRACE_MS = 5_000
SCRUB_SECONDS = 60.0


class Worker:
    """One process' worker; there can only be one in a process."""

    def __init__(self, service: Service, *, requests: int = 4) -> None:
        """Prepare; nothing runs yet.

        Args:
            service: what to work for.
            requests: how many requests to plan at a time.
        """
        self.service = service
        self.id = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._requests = requests
        self._stop = threading.Event()
        self._lock: Any = None
        self._threads: list[threading.Thread] = []
        self._scrubbed = time.monotonic()

    def start(self) -> None:
        """Begin to work in the background.

        Raises:
            UserError: the lock of this worker cannot be written.
        """
        folder = self._folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / f"{self.id}.lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error
        workflow.bind(self.service)
        self.service.database.write(self._beat)
        self.service.database.patiently(self._launch)
        for work in (self._beats, self._watches):
            thread = threading.Thread(target=work, name=work.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)
        logger().info("worker started", worker=self.id)

    def _launch(self) -> None:
        config: DBOSConfig = {
            "name": APPLICATION,
            "system_database_url": self.service.policy.database,
            "application_version": VERSION,
            "executor_id": self.id,
            "serializer": JsonSerializer(),
            "log_level": "ERROR",
            "notification_listener_polling_interval_sec": 1.0,
        }
        DBOS(config=config)
        try:
            DBOS.launch()
            self._register()
        except BaseException:  # the database went away; the next attempt starts anew
            DBOS.destroy()
            raise

    def _register(self) -> None:
        poll = self.service.policy.service.poll_seconds
        DBOS.register_queue(REQUESTS, worker_concurrency=self._requests, polling_interval_sec=poll)
        # one at a time in a process: methods draw from torch's global generators
        DBOS.register_queue(
            BATCHES, worker_concurrency=1, partition_concurrency=1,
            polling_interval_sec=poll,
        )  # fmt: skip

    def run(self) -> None:
        """Work until `stop` is called from a signal's handler or another thread."""
        while not self._stop.wait(0.5):
            pass

    def ask_to_stop(self) -> None:
        """Let `run` return."""
        self._stop.set()

    def stop(self, patience: int = 0) -> None:
        """Stop working; steps in progress are taken up again by another worker.

        Args:
            patience: seconds to let running workflows end.
        """
        self._stop.set()
        DBOS.destroy(workflow_completion_timeout_sec=patience)
        for thread in self._threads:
            thread.join(timeout=5)
        if self._lock is not None:
            self._lock.close()
        logger().info("worker stopped", worker=self.id)

    # ------------------------------------------------------------------ signs of life

    def _folder(self) -> Path:
        return self.service.policy.folder / "workers"

    def _beat(self, connection: sa.Connection) -> None:
        beat = time.time()
        known = connection.execute(
            sa.update(workers).where(workers.c.id == self.id).values(beat=beat)
        ).rowcount
        if not known:  # the first time, or somebody took us for dead
            row = {"id": self.id, "host": socket.gethostname(), "started": now(), "beat": beat}
            connection.execute(sa.insert(workers), row)

    def _beats(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self.service.database.write(self._beat)
            except (ExpungeError, sa.exc.SQLAlchemyError) as error:
                logger().warning("no sign of life written", why=str(error)[:200])

    def _watches(self) -> None:
        while True:
            try:
                for dead in self.dead():
                    self.take_over(dead)
                self.settle()
                self._scrub()
            except Exception as error:  # a worker that cannot watch still works
                logger().warning("cannot look after others", why=str(error)[:200])
            if self._stop.wait(BEAT_SECONDS):
                return

    def dead(self) -> list[str]:
        """Workers that died, and names of workers that nobody knows but that hold workflows."""
        held = {w.executor_id for w in DBOS.list_workflows(status=["PENDING"], load_input=False)}
        rows = self.service.database.read(lambda c: c.execute(sa.select(workers)).all())
        silent = time.time() - self.service.policy.service.dead_seconds
        dead = {r.id for r in rows if self._let_go(r.id, r.host) or r.beat < silent}
        nobody = {one for one in held if one} - {r.id for r in rows}
        return sorted((dead | nobody) - {self.id})

    def _let_go(self, other: str, host: str) -> bool:
        file = self._folder() / f"{other}.lock"
        if other == self.id or host != socket.gethostname() or not file.exists():
            return False
        try:
            with file.open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def take_over(self, dead: str) -> None:
        """Put the unfinished workflows of a dead worker back into their queues."""
        found = DBOS._recover_pending_workflows([dead])
        self.service.database.write(
            lambda c: c.execute(sa.delete(workers).where(workers.c.id == dead))
        )
        (self._folder() / f"{dead}.lock").unlink(missing_ok=True)
        logger().info("took over", worker=dead, workflows=len(found))

    # ------------------------------------------------------------------ nothing stays behind

    def _scrub(self) -> None:
        """Take what was purged out of SQLite's log too, now and then."""
        if self.service.database.sqlite and time.monotonic() - self._scrubbed > SCRUB_SECONDS:
            self._scrubbed = time.monotonic()
            connection = self.service.database.engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()

    def settle(self) -> None:
        """End what no workflow carries any more: those that gave up, or were cancelled from outside."""
        waiting = (states.RECEIVED, states.RESOLVED)
        query = sa.select(request_table.c.id).where(request_table.c.state.in_(waiting)).limit(200)
        for one in self.service.database.read(lambda c: c.execute(query).scalars().all()):
            if why := _gave_up(one):
                self.service.database.write(
                    lambda c, one=one, why=why: move(c, one, waiting, states.FAILED, {"why": why}, error=why)  # type: ignore[misc]
                )  # fmt: skip
        unfinished = sa.select(batch_table).where(batch_table.c.state.in_(("waiting", "running")))
        for batch in self.service.database.read(lambda c: c.execute(unfinished).all()):
            if why := _gave_up(batch.id):
                self.service.database.write(
                    lambda c, batch=batch, why=why: self._end_batch(c, batch, why)  # type: ignore[misc]
                )

    def _end_batch(self, connection: sa.Connection, batch: Any, why: str) -> None:
        lock_model(connection, batch.model)
        batches.end(connection, batch.id, states.FAILED, why)
        if batch.state == "waiting":  # what it would have claimed still waits
            ensure_batch(connection, batch.model, self.service.enqueue)


def _gave_up(identifier: str) -> str | None:
    status = DBOS.get_workflow_status(identifier)
    if status is None or status.status not in ENDED_BADLY:
        return None
    if status.updated_at and time.time() * 1000 - status.updated_at < GRACE_MS:
        return None  # its last step may still be on the way
    return f"its workflow ended as {status.status.lower().replace('_', ' ')}"

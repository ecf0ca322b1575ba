"""Service: a policy, its database, its models; what commands, workers and the API have in common."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from dbos import DBOSClient
from dbos._serialization import Serializer

from expunge.core.errors import ExpungeError
from expunge.core.hashing import plain
from expunge.core.request import Request
from expunge.report.keys import LISTED
from expunge.service import batches, requests, versions
from expunge.service.database import Database
from expunge.service.deleter import Deleter
from expunge.service.logs import quiet_dbos
from expunge.service.policy import Policy, read_policy
from expunge.service.requests import BATCH_FLOW, Row
from expunge.store.ids import new_id

APPLICATION = "expunge"
VERSION = "1"
"""Of the workflows: steps recorded by one version are replayed by workers of the same version only."""
REQUESTS = "expunge-requests"
BATCHES = "expunge-batches"


class Recorded(ExpungeError):
    """An error that a step ended with, as the workflow's record tells it."""


class JsonSerializer(Serializer):
    """Workflow records as JSON: whoever can write to the database cannot make a worker run code."""

    def name(self) -> str:
        """Name in the records."""
        return "expunge_json"

    def serialize(self, data: Any) -> str:
        """Write a value; errors by their sentence."""
        if isinstance(data, BaseException):
            data = {"__error__": f"{type(data).__name__}: {data}"}
        return json.dumps(plain(data))

    def deserialize(self, serialized_data: str) -> Any:
        """Read a value back."""
        value = json.loads(serialized_data)
        if isinstance(value, dict) and "__error__" in value:
            return Recorded(value["__error__"])
        return value


class Service:
    """One policy file in use."""

    def __init__(self, policy: Policy | str | Path, *, patience: float | None = None) -> None:
        """Open the database and create what is missing; models are loaded when they are needed.

        Args:
            policy: the policy or its file.
            patience: seconds to wait for a database that is away.

        Raises:
            UserError: the policy is wrong.
            ExpungeError: the database cannot be used.
        """
        self.policy = policy if isinstance(policy, Policy) else read_policy(policy)
        more = {} if patience is None else {"patience": patience}
        self.database = Database(self.policy.database, **more)
        self.database.create()
        quiet_dbos()
        self._client = DBOSClient(
            system_database_url=self.policy.database, serializer=JsonSerializer(),
            application_name=APPLICATION, lazy=True,
        )  # fmt: skip
        self._deleters: dict[str, Deleter] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all connections."""
        self._client.destroy()
        self.database.close()

    # ------------------------------------------------------------------ models

    def deleter(self, model: str) -> Deleter:
        """The deleter of a model, loaded once.

        Raises:
            UserError: there is no such model, or it cannot be loaded.
        """
        with self._lock:
            if model not in self._deleters:
                from expunge.service.deleters import deleter_for

                self._deleters[model] = deleter_for(self.policy, model)
            return self._deleters[model]

    def versions(self, model: str) -> Path:
        """Folder of the versions of a model."""
        return versions.folder_of(self.policy.folder, model)

    def current(self, model: str) -> Row | None:
        """The version of a model in force; None while it is the original."""
        return self.database.read(lambda c: batches.current(c, model))

    def current_folder(self, row: Row | None) -> Path | None:
        """Folder of a version in force."""
        return None if row is None else self.versions(row["model"]) / row["folder"]

    # ------------------------------------------------------------------ keys

    @property
    def keys(self) -> Path:
        """Folder of the signing keys."""
        return self.policy.folder / "keys"

    def key(self) -> Any:
        """The key that signs now; one is made if there is none."""
        from expunge.service.certify import signing_key

        return signing_key(self.keys)

    def public_keys(self) -> dict[str, Any]:
        """What those who verify are given."""
        if not (self.keys / LISTED).exists():
            self.key()  # makes the first one
        return dict(json.loads((self.keys / LISTED).read_text()))

    # ------------------------------------------------------------------ requests

    def submit(self, model: str, request: Request, *, key: str | None = None, patience: float | None = None) -> tuple[Row, bool]:  # fmt: skip
        """Write a request down and start its workflow; see `requests.submit`."""
        self.policy.model(model)
        identifier = new_id()

        def write() -> tuple[Row, bool]:
            return self.database.write(
                lambda c: requests.submit(c, identifier, model, request, self.enqueue, key=key),
                patience=patience,
            )

        try:
            return write()
        except sa.exc.IntegrityError:  # somebody used the key between our look and our row
            return write()

    def get(self, identifier: str) -> Row:
        """Read one request, by its identifier or a unique beginning."""
        return self.database.read(lambda c: requests.get(c, identifier))

    def approve(self, identifier: str, by: str = "") -> Row:
        """Let a request that waits for approval be carried out."""
        return self.database.write(lambda c: requests.approve(c, identifier, self.enqueue, by))

    def cancel(self, identifier: str, why: str = "") -> Row:
        """Withdraw a request that is not yet carried out."""
        return self.database.write(lambda c: requests.cancel(c, identifier, why))

    def enqueue(
        self,
        connection: sa.Connection,
        workflow: str,
        identifier: str,
        *,
        partition: str | None = None,
        delay: float = 0.0,
    ) -> None:
        """Start a workflow in the caller's transaction; one that exists is left as it is."""
        options: dict[str, Any] = {
            "workflow_name": workflow,
            "queue_name": BATCHES if workflow == BATCH_FLOW else REQUESTS,
            "workflow_id": identifier,
            "app_version": VERSION,
        }
        if partition is not None:
            options["queue_partition_key"] = partition
        if delay > 0:
            options["delay_seconds"] = delay
        self._client.enqueue_in_transaction(connection, options, identifier)  # type: ignore[arg-type]

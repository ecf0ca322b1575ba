"""Progress of a request as server-sent events, read from its history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from expunge.service import requests, states
from expunge.service.service import Service

PAUSE = 0.3
MOST = 200
"""Streams that one process keeps open."""


class Streams:
    """Open streams of this process."""

    def __init__(self, service: Service) -> None:
        """Start with none."""
        self._service = service
        self.open = 0

    async def of(self, identifier: str, after: int) -> AsyncIterator[dict[str, str]]:
        """One event a state, from entry `after` of the history on; ends with the request."""
        self.open += 1
        try:
            while True:
                rows = await run_in_threadpool(self._read, identifier, after)
                for row in rows:
                    after = row["number"]
                    body = {k: row[k] for k in ("state", "time", "note")} | {"request": identifier}
                    yield {"event": "state", "id": str(after), "data": json.dumps(body)}
                    if row["state"] in states.FINAL:
                        return
                await asyncio.sleep(PAUSE)
        finally:
            self.open -= 1

    def _read(self, identifier: str, after: int) -> list[requests.Row]:
        return self._service.database.read(lambda c: requests.history_of(c, identifier, after))

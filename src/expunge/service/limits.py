"""What a caller may take: the size of a body, counted before and while it is read, and calls per second."""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expunge.service.auth import OPEN


class BodyLimit:
    """ASGI middleware that refuses large bodies by their declared length, or as soon as they exceed it."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        """Allow bodies of `most` bytes."""
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413 or 400 without reading, or pass on with a counting `receive`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        words = f"a body of more than {self.most} bytes is not taken"
        declared = Headers(scope=scope).get("content-length")
        if declared is not None:
            if not (declared.isascii() and declared.isdigit()):
                await JSONResponse({"detail": "content-length is no number"}, 400)(scope, receive, send)  # fmt: skip
                return
            if int(declared) > self.most:
                # what is still on its way is not read
                answer = JSONResponse({"detail": words}, 413, headers={"Connection": "close"})
                await answer(scope, receive, send)
                return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, words, headers={"Connection": "close"})
            return message

        await self.app(scope, counted, send)


class RateLimit:
    """ASGI middleware: a bucket of `burst` calls for each client, refilled `per_second`."""

    def __init__(
        self, app: ASGIApp, per_second: float, burst: int, most_clients: int = 10_000
    ) -> None:
        """Start with full buckets; those of clients long unseen are dropped when there are many."""
        self.app = app
        self._rate, self._burst, self._most = per_second, float(burst), most_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 429, or pass on."""
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        client = scope.get("client")
        wait = self.take(client[0] if client else "")
        if wait <= 0:
            await self.app(scope, receive, send)
            return
        answer = JSONResponse(
            {"detail": "too many calls; try again later"}, 429,
            headers={"Retry-After": str(math.ceil(wait))},
        )  # fmt: skip
        await answer(scope, receive, send)

    def take(self, client: str, at: float | None = None) -> float:
        """Take one call from a client's bucket.

        Returns:
            0 if it was there, else seconds until there is one.
        """
        at = time.monotonic() if at is None else at
        left, before = self._buckets.pop(client, (self._burst, at))
        left = min(self._burst, left + (at - before) * self._rate)
        taken = left >= 1
        self._buckets[client] = (left - 1 if taken else left, at)
        while len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - left) / self._rate

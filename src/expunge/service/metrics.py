"""Prometheus metrics: what the database says on each scrape, and what this process answered."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expunge.service import requests, states
from expunge.service.database import Database
from expunge.service.tables import models, workers
from expunge.service.tables import requests as table

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class FromDatabase:
    """Gauges of the whole service, whichever process is asked."""

    def __init__(self, database: Database, dead_seconds: float) -> None:
        """Remember where to look."""
        self._database, self._dead = database, dead_seconds

    def describe(self) -> list[Any]:
        """Nothing before the first scrape."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the database once."""
        counts, numbers, alive, oldest = self._database.read(self._look, patience=2)
        family = GaugeMetricFamily(
            "expunge_requests", "Requests by state", labels=("model", "state")
        )
        for (model, state), count in sorted(counts.items()):
            family.add_metric((model, state), count)
        yield family
        family = GaugeMetricFamily("expunge_model_version", "Version in force", labels=("model",))
        for model, number in numbers:
            family.add_metric((model,), number)
        yield family
        yield GaugeMetricFamily("expunge_workers", "Workers that showed signs of life", value=alive)
        yield GaugeMetricFamily(
            "expunge_oldest_open_seconds",
            "Age of the oldest request that has not ended",
            value=oldest,
        )

    def _look(self, connection: sa.Connection) -> tuple[Any, Any, int, float]:
        alive = connection.execute(
            sa.select(sa.func.count()).where(workers.c.beat > time.time() - self._dead)
        ).scalar_one()
        first = connection.execute(
            sa.select(sa.func.min(table.c.created)).where(table.c.state.not_in(states.FINAL))
        ).scalar()
        numbers = connection.execute(sa.select(models.c.name, models.c.version)).all()
        return requests.counts(connection), numbers, int(alive), _age(first)


def _age(time_text: str | None) -> float:
    import datetime as dt

    if time_text is None:
        return 0.0
    return (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(time_text)).total_seconds()


class Metrics:
    """The registry of one process."""

    def __init__(self, database: Database, dead_seconds: float) -> None:
        """Register everything."""
        self.registry = CollectorRegistry()
        self.registry.register(FromDatabase(database, dead_seconds))  # type: ignore[arg-type]
        self.answers = Counter(
            "expunge_http_requests", "Answers by route and status", ("method", "route", "status"),
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "expunge_http_seconds", "Seconds to the start of an answer", ("method", "route"),
            buckets=BUCKETS, registry=self.registry,
        )  # fmt: skip

    def text(self) -> tuple[bytes, str]:
        """The exposition and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class Measured:
    """ASGI middleware that counts answers by route, not by address: identifiers are no labels."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """Count into `metrics`."""
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and note status and time of the start of the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if route != "none" else "any"
                self.metrics.answers.labels(method, route, str(message["status"])).inc()
                self.metrics.seconds.labels(method, route).observe(time.perf_counter() - began)
            await send(message)

        await self.app(scope, receive, noted)

"""The HTTP interface: requests, plans, approvals, certificates, predictions, and how the service is."""

from __future__ import annotations

import tempfile
from pathlib import Path as File
from typing import Annotated, Any

import sqlalchemy as sa
from fastapi import Body, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from sse_starlette.sse import EventSourceResponse
from starlette.background import BackgroundTask

from expunge import __version__
from expunge.core.errors import ExpungeError, UserError
from expunge.service import events, ledger, pages, requests
from expunge.service.auth import TokenAuth
from expunge.service.bodies import (
    IDENTIFIER,
    PRINTABLE,
    Inputs,
    ModelOut,
    Outputs,
    PlanOut,
    Problem,
    RequestOut,
    State,
    Status,
    Submission,
    Withdrawal,
    shown,
)
from expunge.service.database import DatabaseAway
from expunge.service.errors import NotFound
from expunge.service.limits import BodyLimit, RateLimit
from expunge.service.logs import logger
from expunge.service.metrics import Measured, Metrics
from expunge.service.policy import NAME
from expunge.service.service import Service
from expunge.service.serving import Serving

Identifier = Annotated[
    str, Path(pattern=IDENTIFIER, description="identifier of a request, or its unique beginning")
]
PATIENCE = 5.0
"""Seconds a call waits for a database that is away."""
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": words}
    for status, words in {
        400: "the call cannot be read",
        401: "a bearer token is needed",
        403: "not from this address",
        404: "there is no such thing",
        409: "the request is not in a state for this",
        413: "the body is too large",
        422: "something in the call is not allowed",
        429: "too many calls",
        503: "the database or the model cannot be reached now",
    }.items()
}
UNMADE: dict[int | str, dict[str, Any]] = {
    406: {"model": Problem, "description": "this service makes no PDF"}
}


def create_app(service: Service, token: str | None = None) -> FastAPI:
    """Make the application of a service.

    Args:
        service: what it speaks for.
        token: bearer token; without one only loopback addresses are answered.
    """
    service.database.patience = min(service.database.patience, PATIENCE)
    app = FastAPI(
        title="expunge", version=__version__, responses=ANSWERS, docs_url=None, redoc_url=None,
        description="Deletion requests for trained models, with evidence.",
    )  # fmt: skip
    settings = service.policy.service
    metrics = Metrics(service.database, settings.dead_seconds)
    app.add_middleware(BodyLimit, most=settings.body_bytes)
    app.add_middleware(TokenAuth, token=token)
    app.add_middleware(RateLimit, per_second=settings.per_second, burst=settings.burst)
    app.add_middleware(Measured, metrics=metrics)
    _errors(app)
    _requests(app, service)
    _documents(app, service)
    _models(app, service)
    _health(app, service, metrics)
    return app


def _errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"] if p != "body")
        return JSONResponse({"detail": f"{where}: {first['msg']}" if where else first["msg"]}, 422)

    @app.exception_handler(ExpungeError)
    async def refused(request: Request, error: ExpungeError) -> JSONResponse:
        if isinstance(error, DatabaseAway):
            return JSONResponse({"detail": str(error)}, 503, headers={"Retry-After": "5"})
        if isinstance(error, UserError):
            return JSONResponse({"detail": str(error)}, getattr(error, "status", 422))
        logger().error("call failed", path=request.url.path, why=str(error))
        return JSONResponse({"detail": str(error)}, 503)

    @app.exception_handler(sa.exc.SQLAlchemyError)
    async def database(request: Request, error: sa.exc.SQLAlchemyError) -> JSONResponse:
        logger().error("database error", path=request.url.path, why=str(error)[:300])
        return JSONResponse({"detail": "the database refused; see the service's log"}, 503)


def _requests(app: FastAPI, service: Service) -> None:
    @app.post("/requests", status_code=202, response_model=RequestOut, tags=["requests"],
              responses={200: {"model": RequestOut, "description": "submitted before under the same key"}})  # fmt: skip
    def submit(
        body: Submission,
        response: Response,
        idempotency_key: Annotated[str | None, Header(pattern=PRINTABLE, description="the same key and body give the request that was submitted first")] = None,
    ) -> RequestOut:  # fmt: skip
        """Submit a request to delete; it is carried out in the background."""
        if body.model not in service.policy.models:
            raise NotFound(f"there is no model {body.model!r}")
        row, new = service.submit(body.model, body.request(), key=idempotency_key)
        response.status_code = 202 if new else 200
        response.headers["Location"] = f"/requests/{row['id']}"
        return shown(row)

    @app.get("/requests", response_model=list[RequestOut], tags=["requests"])
    def listed(
        model: Annotated[str | None, Query(pattern=f"^{NAME}$")] = None,
        state: State | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[str | None, Query(pattern=IDENTIFIER, description="older than this one")] = None,
    ) -> list[RequestOut]:  # fmt: skip
        """The newest requests, newest first."""
        rows = service.database.read(
            lambda c: requests.listed(c, model=model, state=state, limit=limit, before=before)
        )
        return [shown(row) for row in rows]

    @app.get("/requests/{identifier}", response_model=RequestOut, tags=["requests"])
    def one(identifier: Identifier) -> Response:
        """One request."""
        # the call that clients make most: checked and written once, not twice
        text = shown(service.get(identifier)).model_dump_json()
        return Response(text, media_type="application/json")

    @app.get("/requests/{identifier}/plan", response_model=PlanOut, tags=["requests"])
    def plan(identifier: Identifier) -> PlanOut:
        """What carrying it out takes; empty until it is planned."""
        row = service.get(identifier)
        return PlanOut(
            id=row["id"],
            state=row["state"],
            hold=row["hold"],
            samples=row["count"],
            plan=row["plan"],
        )

    @app.post("/requests/{identifier}/approve", response_model=RequestOut, tags=["requests"])
    def approve(identifier: Identifier) -> RequestOut:
        """Let a request that waits for approval be carried out; twice does no more."""
        return shown(service.approve(identifier, by="http"))

    @app.post("/requests/{identifier}/cancel", response_model=RequestOut, tags=["requests"])
    def cancel(
        identifier: Identifier, body: Annotated[Withdrawal | None, Body()] = None
    ) -> RequestOut:
        """Withdraw a request that is not yet carried out; twice does no more."""
        return shown(service.cancel(identifier, "" if body is None else body.reason))

    streams = events.Streams(service)

    @app.get("/requests/{identifier}/events", tags=["requests"], response_class=EventSourceResponse,
             responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}})  # fmt: skip
    def progress(
        identifier: Identifier,
        last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,9}$")] = None,
    ) -> Response:
        """Its states as server-sent events, from the first (or after Last-Event-ID) to the last."""
        row = service.get(identifier)
        if streams.open >= events.MOST:
            return JSONResponse({"detail": "too many streams are open; ask again later"}, 429, headers={"Retry-After": "5"})  # fmt: skip
        return EventSourceResponse(streams.of(row["id"], int(last_event_id or 0)), ping=15)


def _documents(app: FastAPI, service: Service) -> None:
    @app.get("/requests/{identifier}/certificate", tags=["evidence"], response_class=Response,
             responses={**UNMADE, 200: {"description": "a DSSE envelope, or a page drawn from it", "content": pages.CONTENT}})  # fmt: skip
    def certificate(identifier: Identifier, request: Request) -> Response:
        """The signed certificate of a released request: JSON, or a page or PDF where Accept asks for it."""
        row, signed = _certificate(service, identifier)
        accept = ",".join(request.headers.getlist("accept"))
        return pages.answer(signed, row["id"], pages.asked_for(accept))

    @app.get("/requests/{identifier}/certificate.html", tags=["evidence"], response_class=Response,
             responses={200: {"description": "a page without scripts", "content": {"text/html": pages.CONTENT["text/html"]}}})  # fmt: skip
    def page(identifier: Identifier) -> Response:
        """The certificate as a page for people; what counts is the JSON."""
        row, signed = _certificate(service, identifier)
        return pages.answer(signed, row["id"], "html")

    @app.get("/requests/{identifier}/certificate.pdf", tags=["evidence"], response_class=Response,
             responses={**UNMADE, 200: {"description": "A4 pages", "content": {"application/pdf": pages.CONTENT["application/pdf"]}}})  # fmt: skip
    def pdf(identifier: Identifier) -> Response:
        """The certificate as a PDF; what counts is the JSON."""
        row, signed = _certificate(service, identifier)
        return pages.answer(signed, row["id"], "pdf")

    @app.get("/ledger", tags=["evidence"], response_class=FileResponse,
             responses={200: {"description": "JSON lines, for expunge ledger verify", "content": {"application/jsonl": {}}}})  # fmt: skip
    def export() -> Response:
        """The whole ledger, verifiable offline."""
        with tempfile.NamedTemporaryFile(delete=False, suffix=".jsonl") as file:
            path = File(file.name)
        try:
            ledger.export(service.database.engine, path, sign=service.key(), force=True)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return FileResponse(
            path, media_type="application/jsonl", filename="ledger.jsonl",
            background=BackgroundTask(path.unlink, missing_ok=True),
        )  # fmt: skip

    @app.get("/keys", tags=["evidence"], response_model=dict[str, Any])
    def keys() -> Any:
        """The public keys that sign certificates; give them to those who verify by another way."""
        return service.public_keys()


def _certificate(service: Service, identifier: str) -> tuple[requests.Row, dict[str, Any]]:
    row = service.get(identifier)
    if row["certificate"] is None:
        raise NotFound(f"request {row['id']} is {row['state']}; it has no certificate")
    return row, row["certificate"]


def _models(app: FastAPI, service: Service) -> None:
    serving = Serving(service)

    @app.get("/models", response_model=list[ModelOut], tags=["models"])
    def models() -> list[ModelOut]:
        """The models of the policy and their versions in force."""
        rows = {name: service.current(name) for name in service.policy.models}
        return [
            ModelOut(
                name=name, kind=service.policy.models[name].kind,
                version=row["version"] if row else 0, weights=row["weights"] if row else None,
                created=row["created"] if row else None,
            )
            for name, row in rows.items()
        ]  # fmt: skip

    @app.post("/predict", response_model=Outputs, tags=["models"])
    def predict(body: Inputs) -> Any:
        """Outputs of the version in force; from the moment of a release, of the new one."""
        return serving.predict(body.model, body.inputs, body.kind)


def _health(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health", response_model=Status, tags=["operation"])
    async def health() -> Status:
        """Whether the process answers."""
        return Status(status="ok")

    @app.get("/ready", response_model=Status, tags=["operation"])
    def ready() -> Status:
        """Whether the database answers too."""
        service.database.read(lambda c: c.execute(sa.text("SELECT 1")).scalar(), patience=1.0)
        return Status(status="ready")

    @app.get("/metrics", tags=["operation"], response_class=Response,
             responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})  # fmt: skip
    def scrape() -> Response:
        """Prometheus metrics."""
        exposed, kind = metrics.text()
        return Response(exposed, media_type=kind)

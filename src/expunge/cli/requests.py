"""`expunge requests`: submit, list, show, plan, approve, cancel, in the service's database."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import Json, print_json, print_table

if TYPE_CHECKING:
    from expunge.core.request import Request
    from expunge.service.service import Service

app = typer.Typer(
    help="Deletion requests of the service: their states, plans and answers.", no_args_is_help=True
)
PolicyFile = Annotated[
    str,
    typer.Option("--policy", envvar="EXPUNGE_POLICY", help="Policy file of the service."),
]
Identifier = Annotated[
    str, typer.Argument(help="Identifier, or its unique beginning.", metavar="ID")
]
PATIENCE = 10.0


@contextmanager
def opened(policy: str) -> Iterator[Service]:
    """The service of a policy file.

    Raises:
        UserError: its packages are not installed, or the policy is wrong.
    """
    from expunge.core.errors import UserError

    try:
        from expunge.service.service import Service
    except ImportError as error:
        raise UserError(
            f"the service needs the extra serve ({error.name} is missing): pip install 'expunge[serve]'"
        ) from error
    service = Service(policy, patience=PATIENCE)
    try:
        yield service
    finally:
        service.close()


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="Model, by its name in the policy.")],
    ids: Annotated[
        str | None, typer.Option("--ids", help="Sample ids or names, with commas.")
    ] = None,
    label: Annotated[
        list[int] | None, typer.Option("--label", help="A whole class; repeatable.")
    ] = None,
    where: Annotated[str | None, typer.Option("--where", help="A condition on columns.")] = None,
    user: Annotated[
        list[str] | None, typer.Option("--user", help="All samples of a user; repeatable.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept until the request ends.")] = "",
    key: Annotated[
        str | None, typer.Option("--key", help="Idempotency key: the same key asks once.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option("--wait", help="Seconds to wait for its end; a worker has to run.", min=0),
    ] = 0.0,
    policy: PolicyFile = "service.toml",
    as_json: Json = False,
) -> None:
    """Submit a request; a worker carries it out."""
    asked = _request(ids, label, where, user, reason)
    with opened(policy) as service:
        row, new = service.submit(model, asked, key=key)
        if wait:
            row = _wait(service, row["id"], wait)
        if as_json:
            print_json(_shown(service, row))
            return
        typer.echo(f"request {row['id']}: {_sentence(row)}{'' if new else ' (submitted before)'}")


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Option("--model", help="Only those of a model.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="Only those in a state.")] = None,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1)] = 50,
    policy: PolicyFile = "service.toml",
    as_json: Json = False,
) -> None:
    """List requests, newest first."""
    with opened(policy) as service:
        from expunge.core.errors import UserError
        from expunge.service import requests, states

        if state is not None and state not in states.STATES:
            raise UserError(f"there is no state {state!r}; there are {', '.join(states.STATES)}")
        rows = service.database.read(
            lambda c: requests.listed(c, model=model, state=state, limit=limit)
        )
        if as_json:
            print_json([_shown(service, row, history=False) for row in rows])
            return
        print_table(
            "requests", ["id", "model", "state", "form", "samples", "created", "answer"],
            [[r["id"], r["model"], r["state"], r["form"], _or(r["count"]), r["created"], _answer(r)] for r in rows],
        )  # fmt: skip


@app.command()
def show(
    identifier: Identifier,
    certificate: Annotated[
        str | None, typer.Option("--certificate", help="Write its certificate to this file.")
    ] = None,
    policy: PolicyFile = "service.toml",
    as_json: Json = False,
) -> None:
    """Show a request with its history."""
    with opened(policy) as service:
        row = service.get(identifier)
        if certificate is not None:
            _write(row, Path(certificate))
        shown = _shown(service, row)
        if as_json:
            print_json(shown)
            return
        typer.echo(f"request {row['id']}: {_sentence(row)}")
        for entry in shown["history"]:
            note = "; ".join(f"{k} {v}" for k, v in entry["note"].items() if v not in ("", None))
            typer.echo(f"  {entry['time']}  {entry['state']:10} {note}")
        if certificate is not None:
            typer.echo(f"certificate: {certificate}; public keys: {service.keys / 'keys.json'}")


@app.command()
def plan(
    identifier: Identifier, policy: PolicyFile = "service.toml", as_json: Json = False
) -> None:
    """Show what carrying out a request takes."""
    with opened(policy) as service:
        row = service.get(identifier)
        if as_json:
            print_json({k: row[k] for k in ("id", "state", "hold", "count", "plan")})
            return
        typer.echo(f"request {row['id']}: {_sentence(row)}")
        for name, value in (row["plan"] or {}).items():
            typer.echo(f"  {name}: {value}")


@app.command()
def approve(
    identifier: Identifier, policy: PolicyFile = "service.toml", as_json: Json = False
) -> None:
    """Let a request that waits for approval be carried out."""
    with opened(policy) as service:
        row = service.approve(identifier, by=_user())
        _say(service, row, as_json)


@app.command()
def cancel(
    identifier: Identifier,
    reason: Annotated[str, typer.Option("--reason", help="Why.")] = "",
    policy: PolicyFile = "service.toml",
    as_json: Json = False,
) -> None:
    """Withdraw a request that is not yet carried out."""
    with opened(policy) as service:
        _say(service, service.cancel(identifier, reason), as_json)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # in a container a number may have no name
        return "cli"


def _request(
    ids: str | None, label: list[int] | None, where: str | None, user: list[str] | None, reason: str
) -> Request:
    from expunge.core.errors import RequestError
    from expunge.core.request import forget

    forms: dict[str, Any] = {
        "ids": tuple(i.strip() for i in ids.split(",") if i.strip()) if ids is not None else None,
        "label": tuple(label) if label else None,
        "where": where,
        "user": tuple(user) if user else None,
    }
    given = {k: v for k, v in forms.items() if v is not None}
    if len(given) != 1:
        raise RequestError("say what to delete with exactly one of --ids, --label, --where, --user")
    return forget(**given, reason=reason)


def _wait(service: Service, identifier: str, seconds: float) -> Mapping[str, Any]:
    from expunge.service.states import FINAL

    deadline = time.monotonic() + seconds
    while True:
        row = service.get(identifier)
        held = row["hold"] and row["state"] == "planned"
        if row["state"] in FINAL or held or time.monotonic() > deadline:
            return row
        time.sleep(0.1)


def _shown(service: Service, row: Mapping[str, Any], history: bool = True) -> dict[str, Any]:
    from expunge.service import requests

    kept = {k: v for k, v in row.items() if k not in ("certificate", "key", "batch", "alone")}
    shown = kept | {"certificate": row["certificate"] is not None}
    if history:
        shown["history"] = service.database.read(lambda c: requests.history_of(c, row["id"]))
    return shown


def _say(service: Service, row: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(_shown(service, row))
    else:
        typer.echo(f"request {row['id']}: {_sentence(row)}")


def _write(row: Mapping[str, Any], path: Path) -> None:
    from expunge.core.errors import UserError
    from expunge.report.certificate import text

    if row["certificate"] is None:
        raise UserError(f"request {row['id']} is {row['state']}; it has no certificate")
    if path.exists():
        raise UserError(f"{path} exists; name another file")
    try:
        path.write_text(text(row["certificate"]))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _answer(row: Mapping[str, Any]) -> str:
    if row["error"]:
        return str(row["error"])
    result = row["result"] or {}
    if result.get("outcome"):
        return f"{result['outcome'].replace('-', ' ')}, version {result['version']}"
    return "waits for approval" if row["hold"] and row["state"] == "planned" else ""


def _sentence(row: Mapping[str, Any]) -> str:
    answer = _answer(row)
    count = "" if row["count"] is None else f", {row['count']} samples"
    return f"{row['state']}{count}{': ' + answer if answer else ''}"


def _or(value: Any) -> str:
    return "" if value is None else str(value)

"""`expunge suite`: run, resume, status."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import Device, Engine, Json, StoreOption, Threads, print_json, print_table

if TYPE_CHECKING:
    from expunge.suite.suite import SuiteSpec

app = typer.Typer(
    help="Problems × requests × methods × audits × seeds from one file.", no_args_is_help=True
)
Out = Annotated[str | None, typer.Option("--out", help="Folder for the report.")]


@app.command()
def run(
    file: str,
    out: Out = None,
    store: StoreOption = None,
    device: Device = "cpu",
    threads: Threads = None,
    engine: Engine = None,
    as_json: Json = False,
) -> None:
    """Run a suite file; what the store has already is not run again."""
    from expunge.suite.suite import read_suite

    _go(read_suite(file), None, out, store, device, threads, engine, as_json)


@app.command()
def resume(
    suite: Annotated[
        str | None, typer.Argument(help="Suite id or prefix; the newest by default.")
    ] = None,
    out: Out = None,
    store: StoreOption = None,
    device: Device = "cpu",
    threads: Threads = None,
    engine: Engine = None,
    as_json: Json = False,
) -> None:
    """Go on with a suite that was stopped."""
    from expunge.core.errors import UserError
    from expunge.store import Store
    from expunge.suite.suite import suite_from

    opened = Store.open(store)
    known = opened.suites()
    if not known:
        raise UserError(
            "the store has no suite to resume; start one with expunge suite run FILE.toml"
        )
    found = opened.suite(suite) if suite else max(known, key=lambda s: s["id"])
    _go(suite_from(found["spec"]), found["id"], out, store, device, threads, engine, as_json)


@app.command()
def status(
    suite: Annotated[str | None, typer.Argument(help="Suite id or prefix; all by default.")] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Show suites, or the jobs of one: what was run, what was taken from the store."""
    from expunge.store import Store

    opened = Store.open(store)
    rows = opened.suites() if suite is None else opened.jobs(opened.suite(suite)["id"])
    if as_json:
        print_json(rows)
    elif suite is None:
        print_table(
            "suites", ["id", "name", "created"], [[r["id"], r["name"], r["created"]] for r in rows]
        )
    else:
        keys = ["time", "status", "key", "run"]
        print_table("jobs", keys, [[r.get(k) for k in keys] for r in rows])


def _go(
    spec: SuiteSpec,
    suite_id: str | None,
    out: str | None,
    store: str | None,
    device: str,
    threads: int | None,
    engine: str | None,
    as_json: bool,
) -> None:
    from expunge.cli import common
    from expunge.cli.demo import show_comparison
    from expunge.store import Store
    from expunge.suite.suite import run_suite

    opened = Store.open(store)
    with common.runtime(device, threads=threads, engine=engine) as runtime:
        suite, comparison = run_suite(spec, opened, runtime, suite_id)
    comparison.data["suite"] = suite
    show_comparison(comparison, Path(out) if out else opened.folder / "reports" / suite, as_json)

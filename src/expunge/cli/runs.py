"""`expunge runs`: look at a store, compare its runs, move them, and clear what nothing refers to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import Json, StoreOption, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from expunge.core.audit import Finding
    from expunge.store import Run, Store

app = typer.Typer(help="List, compare, move and tidy the runs of a store.", no_args_is_help=True)

RunId = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, or the beginning of it.")]


@app.command("list")
def list_runs(
    kind: Annotated[
        str | None, typer.Option(help="original, reference, unlearn, audit, fleet, …")
    ] = None,
    problem: Annotated[str | None, typer.Option(help="Name of the problem.")] = None,
    method: Annotated[str | None, typer.Option(help="Name of the method.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="How many, newest first.")] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """List runs, newest first."""
    found = _open(store).runs(kind=kind, problem=problem, method=method, limit=limit)
    if as_json:
        print_json([{k: v for k, v in run.to_json().items() if k != "record"} for run in found])
        return
    columns = ("id", "kind", "problem", "method", "seed", "status", "created")
    _table(columns, ([getattr(run, name) for name in columns] for run in found), "no runs")


@app.command()
def show(run: RunId, store: StoreOption = None, as_json: Json = False) -> None:
    """Show a run's record, its parents, and what audits found; of a fleet, how far it is."""
    from expunge.fleet.train import progress

    opened = _open(store)
    entry = opened.get(run)
    audits = [entry] if entry.kind == "audit" else opened.audits(entry.id)
    found = {audit.id: opened.findings(audit.id) for audit in audits}
    parents = [opened.get(parent) for parent in entry.parents]
    jobs = {"jobs": progress(opened, entry)} if entry.kind == "fleet" else {}
    if as_json:
        print_json({
            **entry.to_json(),
            **jobs,
            "findings": {audit: [_finding(f) for f in listed] for audit, listed in found.items()},
        })
        return
    console = _console()
    for name in ("id", "kind", "status", "created", "key", "weights", "blob"):
        console.print(f"{name:8} {_word(getattr(entry, name))}", markup=False, highlight=False)
    console.print("\nrecord")
    # Findings and jobs are left to the tables below, the curve to `--json`.
    shown = {k: v for k, v in entry.record.items() if k not in ("findings", "curve", "jobs")}
    console.print(json.dumps(shown, indent=1, ensure_ascii=False), markup=False, highlight=False)
    for listed_jobs in jobs.values():
        done = sum(job["run"] is not None for job in listed_jobs)
        console.print(f"\njobs ({done} of {len(listed_jobs)} done)")
        about = ("role", "samples", "seed", "run", "key")
        _table(about, ([job[name] for name in about] for job in listed_jobs), "none")
    console.print("\nparents")
    rows = ([p.id, p.kind, p.problem, p.method, p.seed] for p in parents)
    _table(("id", "kind", "problem", "method", "seed"), rows, "none")
    for audit, listed in found.items():
        console.print(f"\nfindings of audit {audit}", markup=False, highlight=False)
        columns = ("name", "value", "low", "high", "reference", "floor", "original", "reason")
        _table(columns, ([getattr(f, name) for name in columns] for f in listed), "none")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="RUN", help="One run.")],
    b: Annotated[str, typer.Argument(metavar="RUN", help="The run to compare it with.")],
    results: Annotated[
        bool, typer.Option("--results", help="Compare results too, not only inputs.")
    ] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Name what differs between two runs: settings, seeds, versions, hashes."""
    opened = _open(store)
    found = opened.diff(a, b, results)
    if as_json:
        print_json([{"path": path, "a": left, "b": right} for path, left, right in found])
        return
    # Every digit: a table of differences must not show two values that look the same.
    rows = ([repr(v) if isinstance(v, float) else v for v in line] for line in found)
    _table(("path", opened.get(a).id, opened.get(b).id), rows, "no difference")


@app.command("export")
def export_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Runs to export.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The .tar file.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    store: StoreOption = None,
) -> None:
    """Write runs, all they were made from and their tensors into one .tar file."""
    from expunge.core.errors import UserError

    if output.exists() and not force:
        raise UserError(f"{output} exists; pass --force to replace it")
    _open(store).export(runs, output)
    typer.echo(f"wrote {output}")


@app.command("import")
def import_runs(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file made by export.")],
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Add the runs of an exported file after checking every hash; all of them or none."""
    opened = _open(store)
    added = opened.import_(file)
    if as_json:
        print_json(added)
        return
    _table(("id", "kind", "problem", "method"), _short(opened, added), "nothing new in the file")


@app.command()
def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Remove tensors that no run refers to, and what killed processes left behind."""
    removed = _open(store).gc(dry_run)
    if as_json:
        print_json(removed)
        return
    heading = "would be removed" if dry_run else "removed"
    _table((heading,), ([path] for path in removed), "nothing to remove")


def _open(folder: str | None) -> Store:
    from expunge.store import Store

    return Store.open(folder)


def _short(store: Store, ids: Sequence[str]) -> Iterable[Sequence[Any]]:
    found: list[Run] = [store.get(run) for run in ids]
    return ([run.id, run.kind, run.problem, run.method] for run in found)


def _finding(finding: Finding) -> dict[str, Any]:
    from expunge.core.hashing import plain

    # Per-sample arrays are data, not a listing; export carries them.
    values = {k: v for k, v in vars(finding).items() if k != "per_sample"}
    return {**plain(values), "arrays": sorted(finding.per_sample)}


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A pipe has no width: lines stay whole for whatever reads them.
    return console if console.is_terminal else Console(width=200, soft_wrap=True)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], nothing: str) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "id")
    for row in rows:
        # As Text: names and settings are people's words, not markup.
        table.add_row(*(Text(_word(value)) for value in row))
    console = _console()
    if table.row_count:
        console.print(table)
    else:
        console.print(nothing)


def _word(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)

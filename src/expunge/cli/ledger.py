"""`expunge ledger`: check a ledger of deletion requests, and export it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.certificate import KeysOption, _keys, _place
from expunge.cli.common import Json, print_json

app = typer.Typer(help="Check and export the ledger of deletion requests.", no_args_is_help=True)


@app.command()
def verify(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="An exported ledger, or URL or SQLite file of its database."
        ),
    ],
    certificate: Annotated[
        list[Path] | None,
        typer.Option(
            "--certificate", help="A certificate whose row must be in the ledger; repeatable."
        ),
    ] = None,
    keys: KeysOption = None,
    as_json: Json = False,
) -> None:
    """Check every row and the order; exit 0 if all is well, 1 if not, 2 if it cannot be read."""
    from expunge.report.certificate import read, statement_of
    from expunge.report.keys import KeySet
    from expunge.service import ledger

    heads = [statement_of(read(c))["predicate"]["ledger"] for c in certificate or []]
    named = [ledger.Head(h["seq"], h["hash"]) for h in heads if h is not None]
    trusted = KeySet.read(_place(keys)) if keys is not None else None
    faults = ledger.verify(ledger.locate(file), named=named, keys=trusted)
    if as_json:
        print_json({"ok": not faults, "faults": faults})
    else:
        for sentence in faults:
            typer.echo(f"wrong: {sentence}")
        typer.echo("the ledger is refused" if faults else "the ledger holds")
    if faults:
        raise typer.Exit(1)


@app.command()
def export(
    database: Annotated[
        str, typer.Argument(metavar="DATABASE", help="URL or SQLite file of the database.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")
    ],
    sign: Annotated[
        bool, typer.Option("--sign", help="Sign the last row with the key in use.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    keys: KeysOption = None,
) -> None:
    """Write the ledger as JSON lines that can be checked without the database."""
    from expunge.core.errors import UserError
    from expunge.service import ledger

    place = ledger.locate(database)
    if isinstance(place, Path):
        raise UserError(f"{database} is no database; name its URL or SQLite file")
    if faults := ledger.verify(place):
        typer.echo(f"warning: the ledger does not hold: {faults[0]}", err=True)
    head = ledger.export(place, output, sign=_keys(keys).signer() if sign else None, force=force)
    typer.echo(f"wrote {output}: {head.seq} rows, the last one {head.hash}")

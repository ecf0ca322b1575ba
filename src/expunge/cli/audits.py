"""`expunge audits`: list, show, check."""

from __future__ import annotations

import typer

from expunge.cli.common import Json
from expunge.cli.listing import describe, print_entry, print_listing

app = typer.Typer(help="Audits: what is measured, and against what.", no_args_is_help=True)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the audits."""
    from expunge.audits import registry

    entries = [describe(name, registry.get(name)) for name in registry]
    print_listing("audits", entries, as_json, ["name", "needs", "idea"])


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """Show one audit: what it measures, what it needs, its settings."""
    from expunge.audits import registry

    found = registry.get(name)
    print_entry(describe(found.name, found), as_json)


@app.command()
def check(name: str, as_json: Json = False) -> None:
    """Run the common checks on an audit, also on somebody else's `pkg.module.Class`."""
    from expunge.audits import registry
    from expunge.cli.common import imported, print_json
    from expunge.cli.methods import _colon
    from expunge.core.errors import ExpungeError
    from expunge.suite.checks import check_audit

    found = registry.get(name) if name in set(registry) else imported(_colon(name))
    results = check_audit(found)
    if as_json:
        print_json([vars(r) for r in results])
    else:
        for result in results:
            typer.echo(
                f"{'✓' if result.state == 'pass' else '✗'} {result.name}{': ' + result.note if result.note else ''}"
            )
    failed = [r.name for r in results if r.state == "fail"]
    if failed:
        raise ExpungeError(
            f"{name} fails {len(failed)} of {len(results)} checks: {', '.join(failed)}"
        )

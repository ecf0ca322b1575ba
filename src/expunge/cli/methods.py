"""`expunge methods`: list, show, check."""

from __future__ import annotations

import typer

from expunge.cli.common import Json, Settings
from expunge.cli.listing import describe, print_entry, print_listing

app = typer.Typer(help="Unlearning methods.", no_args_is_help=True)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the methods with what they need and claim."""
    from expunge.methods import registry

    entries = [describe(name, registry.get(name)) for name in registry]
    print_listing(
        "methods", entries, as_json, ["name", "intent", "guarantee", "fidelity", "needs", "idea"]
    )


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """Show one method: paper, needs, deviations, settings with range and source."""
    from expunge.methods import registry

    found = registry.get(name)
    print_entry(describe(found.name, found), as_json)


@app.command()
def check(
    name: str,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Run the common checks on a method, also on somebody else's `pkg.module.Class`."""
    from expunge.cli.common import imported, print_json, settings_from
    from expunge.core.errors import ExpungeError
    from expunge.methods import registry
    from expunge.suite.checks import check_method

    found = registry.get(name) if name in set(registry) else imported(_colon(name))
    results = check_method(found, settings_from(settings))
    if as_json:
        print_json([vars(r) for r in results])
    else:
        for result in results:
            mark = {"pass": "✓", "fail": "✗", "skip": "–"}[result.state]
            typer.echo(f"{mark} {result.name}{': ' + result.note if result.note else ''}")
    failed = [r.name for r in results if r.state == "fail"]
    if failed:
        raise ExpungeError(
            f"{name} fails {len(failed)} of {len(results)} checks: {', '.join(failed)}"
        )


def _colon(path: str) -> str:
    return path if ":" in path else ":".join(path.rsplit(".", 1))

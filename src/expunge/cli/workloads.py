"""`expunge workloads`: list, show, check."""

from __future__ import annotations

import typer

from expunge.cli.common import Json
from expunge.cli.listing import print_entry, print_listing

app = typer.Typer(help="Bundled problems with their recipes.", no_args_is_help=True)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the workloads."""
    from expunge.workloads import registry

    entries = [registry.get(name).describe() for name in registry]
    print_listing("workloads", entries, as_json, ["name", "title", "request", "package"])


@app.command()
def show(name: str, as_json: Json = False) -> None:
    """Show one workload: its data, request, recipe and tuned settings."""
    from expunge.workloads import registry

    workload = registry.get(name)
    data = workload.data()
    entry = workload.describe() | {
        "samples": {"train": len(data.train), "test": len(data.test)},
        "recipe": workload.recipe(data.train).settings(),
    }
    print_entry(entry, as_json)


@app.command()
def check(name: str) -> None:
    """Build a workload's data and an untrained model, and see that they fit."""
    from expunge.workloads import registry

    workload = registry.get(name)
    data = workload.data()
    problem = workload.of(workload.recipe(data.train).build(), data.train, data.test)
    problem.check()
    count = len(workload.request.resolve(data.train))
    classes = getattr(problem, "classes", None)
    kind = f"{classes} classes" if classes else "one target each"
    typer.echo(f"✓ {name}: {len(data.train)} training samples, {kind}, request covers {count}")

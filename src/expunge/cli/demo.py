"""`expunge demo`: the main job on bundled real data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.cli.common import Json, Threads, print_json
from expunge.cli.common import runtime as make_runtime

if TYPE_CHECKING:
    from expunge.suite.compare import Comparison

METHODS = ("finetune", "gradient-ascent", "neggrad-plus", "random-label", "salun", "scrub", "ssd")


def demo(
    out: Annotated[
        str, typer.Option("--out", help="Folder for report, records and store.")
    ] = "demo",
    label: Annotated[int, typer.Option("--label", help="Which digit to forget.", min=0, max=9)] = 3,
    random: Annotated[bool, typer.Option(help="Also forget 10 % random samples.")] = True,
    references: Annotated[int, typer.Option(help="Retrained models to compare with.", min=1)] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="8×8 digits instead; seconds.")] = False,
    service: Annotated[
        bool, typer.Option("--service", help="A deletion request through the service instead.")
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a classifier, let several methods forget a class and random samples, audit, report.

    With --service: train digits in shards, serve them, delete three by a request, and leave a
    certificate; within two minutes.
    """
    if service:
        _service(Path(out), as_json)
        return
    from expunge.core.request import forget
    from expunge.store import Store
    from expunge.suite.bench import Bench
    from expunge.suite.compare import join
    from expunge.suite.parallel import Case, compare_all
    from expunge.workloads import registry

    folder = Path(out)
    cases = [("digits-class" if quick else "mnist-class", forget(label=label))]
    if random and not quick:
        cases.append(("mnist-random", registry.get("mnist-random").request))
    store = Store.open(folder / "store")
    with make_runtime(threads=threads) as runtime:
        Bench(store, runtime).workload(cases[0][0])  # the original, which the cases share
        found = compare_all(
            [Case(name, request.to_dict(), METHODS, references) for name, request in cases],
            store.folder,
            runtime,
        )
    show_comparison(join(found, f"expunge demo --label {label}"), folder, as_json)


def _service(folder: Path, as_json: bool) -> None:
    from expunge.core.errors import UserError

    try:
        from expunge.service.story import tell
    except ImportError as error:
        raise UserError(
            f"the service needs the extra serve ({error.name} is missing): pip install 'expunge[serve]'"
        ) from error

    def say(line: str) -> None:
        if not as_json:
            typer.echo(line)

    found = tell(folder, say)
    if as_json:
        print_json(found)
        return
    typer.echo(
        f"certificate: {found['certificate']} after {found['seconds']:.0f} s; verify it with"
    )
    typer.echo(
        f"  expunge certificate verify {found['certificate']} --keys {found['keys']} "
        f"--weights {found['weights']} --ledger {found['ledger']}"
    )


def show_comparison(comparison: Comparison, folder: Path, as_json: bool) -> None:
    """Write the report and print tables with the verdict in words, or the JSON document."""
    path = comparison.report(folder)
    if as_json:
        print_json(comparison.data)
        return
    from rich.console import Console

    from expunge.report import summary, terminal_table

    console = Console(width=None if sys.stdout.isatty() else 120)
    for one in comparison.data["comparisons"]:
        console.print(terminal_table(one))
        for sentence in summary(one):
            console.print(f"  {sentence}", highlight=False)
        console.print()
    console.print(f"report: {path}", highlight=False, soft_wrap=True)

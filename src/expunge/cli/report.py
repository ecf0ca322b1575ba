"""`expunge report`: write the page again from stored runs."""

from __future__ import annotations

from typing import Annotated

import typer

from expunge.cli.common import Json, StoreOption


def report(
    runs: Annotated[list[str], typer.Argument(help="Run ids or prefixes (of unlearning runs).")],
    out: Annotated[str, typer.Option("--out", help="Folder for the report.")] = "report",
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Build one report over stored runs, from their records and findings alone."""
    from pathlib import Path

    from expunge.cli.demo import show_comparison
    from expunge.store import Store
    from expunge.suite.stored import comparison_of

    show_comparison(comparison_of(Store.open(store), runs), Path(out), as_json)

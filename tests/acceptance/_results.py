"""Write what an acceptance run saw: one JSON and one table with the card's expectations beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from expunge import __version__
from expunge.core.hashing import plain

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMMAND = "make acceptance"


def write(
    name: str, data: Mapping[str, Any], seen: Iterable[tuple[str, str, bool]], more: str = ""
) -> None:
    """Write `benchmarks/results/NAME.json` and `.md`.

    Args:
        name: of the card, with underscores.
        data: every figure of the run.
        seen: rows of the table: what the card expects, what was seen, and whether it holds.
        more: Markdown that stands behind the table.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = [list(row) for row in seen]
    document = {"command": COMMAND, "expunge": __version__, **plain(data)}
    document["expected"] = [dict(zip(("expected", "seen", "holds"), r, strict=True)) for r in rows]
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    table = [
        f"Made by `{COMMAND}` (expunge {__version__}).",
        "",
        "| expected | seen | |",
        "|---|---|---|",
        *(f"| {e} | {s} | {'holds' if ok else 'MISSED'} |" for e, s, ok in rows),
    ]
    table += ["", more.rstrip()] if more else []
    (RESULTS / f"{name}.md").write_text("\n".join(table) + "\n")


def must_be_seen(
    expected: Callable[[Any], Iterable[tuple]], number: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Two tests over what the fixture `seen` found: each expectation holds, and none is left out.

    Args:
        expected: from what was seen to rows: the sentence, figures, and whether it holds.
        number: how many rows there are.
    """

    @pytest.mark.parametrize("index", range(number))
    def each(seen: Any, index: int) -> None:
        sentence, *figures, holds = list(expected(seen))[index]
        assert holds, f"{sentence}: {figures}"

    def whole(seen: Any) -> None:
        assert len(list(expected(seen))) == number

    return each, whole

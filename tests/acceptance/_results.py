"""Write what an acceptance run saw: one JSON and one table with the card's expectations beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from expunge import __version__
from expunge.core.hashing import plain

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
COMMAND = "make acceptance"


def write(name: str, data: Mapping[str, Any], seen: Iterable[tuple[str, str, bool]]) -> None:
    """Write `benchmarks/results/NAME.json` and `.md`.

    Args:
        name: of the card, with underscores.
        data: every figure of the run.
        seen: rows of the table: what the card expects, what was seen, and whether it holds.
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
    (RESULTS / f"{name}.md").write_text("\n".join(table) + "\n")

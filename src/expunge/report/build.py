"""Build the report: HTML, Markdown and JSON from one dict, each file written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError
from expunge.core.hashing import plain
from expunge.report import figures
from expunge.report.explain import explain, explanations
from expunge.report.table import COLUMNS, Cell, cell, method_rows, present
from expunge.report.verdict import MARKS, WORDS, judge
from expunge.report.words import SHOWN, headline, summary, told

PANELS = 12
"""Panels of a figure that are open; further ones are one click away."""


def write_report(
    data: Mapping[str, Any], folder: str | Path, name: str = "report"
) -> dict[str, Path]:
    """Write `report.html`, `report.json` and `report.md`.

    Args:
        data: the dict documented in `docs/scripting.md`.
        folder: created if it is not there.
        name: stem of the three files.

    Returns:
        Paths by suffix: `html`, `json`, `md`.

    Raises:
        ExpungeError: the folder cannot be written; files that were there are as they were.
    """
    folder = Path(folder)
    texts = {
        "json": json.dumps(plain(data), indent=1, allow_nan=False) + "\n",
        "md": render_markdown(data),
        "html": render_html(data),
    }
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in texts}
    temporary = {s: folder / f".{name}.{s}.{os.getpid()}.tmp" for s in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            temporary[suffix].write_text(text, encoding="utf-8")
        for suffix, path in paths.items():
            temporary[suffix].replace(path)
    except OSError as error:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()
        why = error.strerror or error
        raise ExpungeError(f"the report cannot be written to {folder} ({why})") from error
    return paths


def render_html(data: Mapping[str, Any]) -> str:
    """Render one self-contained page: no script, no network.

    Args:
        data: the dict documented in `docs/scripting.md`.

    Returns:
        The page; every text of the data is escaped.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("expunge.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparisons = [_context(c, f"c{i}") for i, c in enumerate(data["comparisons"], 1)]
    return environment.get_template("report.html").render(
        data={k: data.get(k) or "" for k in ("expunge", "created", "command")},
        comparisons=comparisons,
        explained=explanations(data["comparisons"]),
        words=WORDS,
        marks=MARKS,
        panels=PANELS,
    )


def _context(comparison: Mapping[str, Any], anchor: str) -> dict[str, Any]:
    rows = method_rows(comparison)
    references = comparison.get("references") or []
    return {
        "id": anchor,
        "title": comparison["title"],
        "headline": headline(comparison),
        "told": told(comparison),
        "request": (comparison.get("request") or {}).get("text") or "",
        "workload": comparison.get("workload") or "",
        "splits": {k: v for k, v in (comparison.get("splits") or {}).items() if v},
        "references": references,
        "rows": rows,
        "columns": [(n, explain(n)) for n in present(rows)],
        "figures": figures.all_figures(comparison),
        "records": [_record(row, comparison) for row in comparison["rows"]],
    }


def _record(row: Mapping[str, Any], comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known of one run: findings in words, notes, settings."""
    keys = ("intent", "guarantee", "fidelity", "cost", "settings", "details")
    seeds = sum(r["method"] == row["method"] for r in comparison["rows"])
    findings: list[tuple[str, Cell, str]] = []
    for name in explanations([{"rows": [row]}]):
        finding = row["findings"][name]
        found = cell(name, finding, judge(name, finding))
        findings.append((name, found, explain(name).label))
    return {
        "name": row["method"],
        "seed": row.get("seed") if seeds > 1 or row["method"] == "retrain" else None,
        "run": row.get("run") or "",
        "findings": findings,
        "notes": row.get("notes") or [],
        "settings": "\n".join(
            f"{k}: {json.dumps(plain(row.get(k)), ensure_ascii=False)}" for k in keys
        ),
    }


def render_markdown(data: Mapping[str, Any]) -> str:
    """Render the summary and the method table of each comparison.

    Args:
        data: the dict documented in `docs/scripting.md`.

    Returns:
        Markdown with one table row a method, each cell with value, reference, gap and interval.
    """
    origin = [f"expunge {data.get('expunge') or ''}".strip(), str(data.get("created") or "")]
    command = str(data.get("command") or "").replace("`", "'").replace("\n", " ")
    origin += [f"`{command}`"] if command else []
    lines = ["# What was forgotten, and how far", "", ", ".join(o for o in origin if o), ""]
    for comparison in data["comparisons"]:
        lines += [f"## {_escape(comparison['title'])}", ""]
        lines += [*(f"- {_escape(s)}" for s in summary(comparison)), ""]
        lines += [*_markdown_table(comparison), ""]
    lines += ["## How to read it", ""]
    lines += ["A cell holds the value, then in brackets the reference, the gap to it, and the 95 % interval.", ""]  # fmt: skip
    for name, words in explanations(data["comparisons"]).items():
        lines.append(f"- `{name.replace('`', '')}`: {_escape(words.meaning)} {_escape(words.good)}")
    return "\n".join(lines) + "\n"


def _markdown_table(comparison: Mapping[str, Any]) -> Sequence[str]:
    rows = method_rows(comparison)
    names = present(rows, COLUMNS)
    head = ["method", "verdict", "time / retraining", *(explain(n).label for n in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        verdict = row.word if row.method in SHOWN else f"{row.mark} {row.word}"
        if row.notes:
            verdict += f" ({', '.join(row.notes)})"
        cells = [row.method, verdict, row.ratio]
        for name in names:
            c = row.cells.get(name)
            if c is None or c.value == "–":
                cells.append("–")
                continue
            beside = [f"ref. {c.reference}", *filter(None, (c.gap, c.interval))]
            cells.append(f"{c.value} ({', '.join(beside)})")
        lines.append("| " + " | ".join(_escape(c) for c in cells) + " |")
    return lines


def _escape(text: object) -> str:
    """Text that Markdown shows as it is."""
    words = " ".join(str(text).split())
    for sign in "\\|*_[`":
        words = words.replace(sign, "\\" + sign)
    return words.replace("<", "&lt;")

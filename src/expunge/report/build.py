"""Build the report: HTML, Markdown and JSON from one dict, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError
from expunge.core.hashing import plain
from expunge.report import figures
from expunge.report.table import COLUMNS, method_rows
from expunge.report.verdict import MARKS, WORDS, judge
from expunge.report.words import summary

EXPLAINED: dict[str, str] = {
    "accuracy": "Share of right predictions, 0 … 1, with a Wilson interval over samples. Good is what retrained models reach, on forgotten data too: less is over-forgetting.",
    "prediction-matrix": "Mean total variation between the rows of the true × predicted matrix and retrained models', 0 … 1; lower is closer.",
    "divergence": "Distance between predicted distributions and retrained models' in nats: JS at most 0.69, KL unbounded; lower is closer. The reference is the distance of retrained models to each other.",
    "membership": "auc-…: how well a score tells forgotten from unseen samples, two-sided, ½ … 1. efficacy-…: share of forgotten samples an attacker calls unseen, 0 … 1. attack-accuracy: ½ … 1. Good is the reference's value, in each case.",
    "cka": "Similarity of hidden layers, 0 … 1. To the original: good is the reference's value. To retrained models: higher is closer.",
    "weight-distance": "Relative distance of the weights, 0 upward. It says how much was changed, not what was forgotten.",
    "cost": "Wall seconds, ratio to one retraining, samples read, gradient evaluations, growth of memory in bytes; lower is better.",
}  # fmt: skip
"""How to read each family of findings."""


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
        ExpungeError: the folder cannot be written.
    """
    folder = Path(folder)
    texts = {
        "json": json.dumps(plain(data), indent=1) + "\n",
        "md": render_markdown(data),
        "html": render_html(data),
    }
    paths = {suffix: folder / f"{name}.{suffix}" for suffix in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            temporary = paths[suffix].with_suffix(f".{suffix}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(paths[suffix])
    except OSError as error:
        raise ExpungeError(
            f"the report cannot be written to {folder} ({error.strerror})"
        ) from error
    return paths


def render_html(data: Mapping[str, Any]) -> str:
    """Render one self-contained page: no script, no network."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("expunge.report", "templates"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparisons = [_context(c) for c in data["comparisons"]]
    return environment.get_template("report.html").render(
        data=data, comparisons=comparisons, explained=EXPLAINED, words=WORDS, marks=MARKS
    )


def _context(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows = method_rows(comparison)
    present = [n for n in COLUMNS if any(n in r.cells and r.cells[n].value != "–" for r in rows)]
    findings = []
    for row in comparison["rows"]:
        judged = [(n, f, judge(n, f)) for n, f in sorted(row["findings"].items())]
        findings.append((row, judged))
    return {
        "raw": comparison,
        "summary": summary(comparison),
        "rows": rows,
        "columns": [(n, *COLUMNS[n]) for n in present],
        "figures": figures.all_figures(comparison),
        "findings": findings,
        "settings": [(r, json.dumps(plain({"settings": r["settings"], "details": r["details"], "cost": r["cost"]}), indent=1)) for r in comparison["rows"]],
    }  # fmt: skip


def render_markdown(data: Mapping[str, Any]) -> str:
    """Render the summary and the method table of each comparison."""
    lines = ["# What was forgotten, and how far", ""]
    lines += [f"expunge {data['expunge']}, {data['created']}, `{data['command']}`", ""]
    for comparison in data["comparisons"]:
        rows = method_rows(comparison)
        names = [n for n in COLUMNS if any(n in r.cells for r in rows)]
        lines += [f"## {_escape(comparison['title'])}", ""]
        lines += [*(f"- {_escape(s)}" for s in summary(comparison)), ""]
        head = ["method", *(COLUMNS[n][0] for n in names), "time / retraining", "verdict"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in rows:
            cells = []
            for n in names:
                c = row.cells.get(n)
                cells.append(
                    "–"
                    if c is None
                    else f"{c.value} (ref. {c.reference}, {c.interval or 'no interval'})"
                )
            lines.append(
                "| " + " | ".join([_escape(row.method), *cells, row.ratio, row.word]) + " |"
            )
        lines.append("")
    lines += ["## How to read it", ""] + [f"- **{k}**: {v}" for k, v in EXPLAINED.items()]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

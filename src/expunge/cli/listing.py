"""What `methods`, `audits` and `workloads` share: describing an entry, and the three verbs."""

from __future__ import annotations

from typing import Any

import typer

from expunge.cli.common import print_json, print_table


def describe(name: str, found: Any) -> dict[str, Any]:
    """Describe a method or audit class as JSON types."""
    from expunge.core.hashing import plain

    card = found.card
    return {
        "name": name,
        "class": f"{found.__module__}.{found.__qualname__}",
        "domain": getattr(found, "domain", "general"),
        "paper": {k: getattr(card, k) for k in ("title", "authors", "year", "link")},
        "idea": card.idea,
        "intent": card.intent,
        "guarantee": card.guarantee,
        "fidelity": card.fidelity,
        "deviations": plain(list(card.deviations)),
        "needs": found().needs.words(),
        "settings": found.describe_settings(),
    }


def print_listing(
    title: str, entries: list[dict[str, Any]], as_json: bool, columns: list[str]
) -> None:
    """Print entries as JSON or as a table of some of their keys."""
    if as_json:
        print_json(entries)
        return
    rows = [[_cell(entry.get(column)) for column in columns] for entry in entries]
    print_table(title, columns, rows)


def print_entry(entry: dict[str, Any], as_json: bool) -> None:
    """Print one entry with its settings."""
    if as_json:
        print_json(entry)
        return
    for key, value in entry.items():
        if key != "settings":
            typer.echo(f"{key:10} {_cell(value)}")
    if entry.get("settings"):
        rows = [
            [s["name"], s["default"], s["range"], s["help"], s["source"]] for s in entry["settings"]
        ]
        print_table("settings", ["name", "default", "range", "help", "source"], rows)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value) or "–"
    if isinstance(value, dict):
        return "; ".join(f"{k}: {_cell(v)}" for k, v in value.items()) or "–"
    return "–" if value in (None, "") else str(value)

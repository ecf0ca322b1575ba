"""src/expunge/cli/reference.py: docs/cli.md is up to date and holds what `--help` shows."""

import re
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from expunge.cli import reference
from expunge.cli.__main__ import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == reference.markdown(), (
        "run: python -m expunge.cli.reference > docs/cli.md"
    )


@pytest.mark.parametrize("name", list(reference.commands()))
def test_a_section_has_the_options_and_commands_of_help(name):
    shown = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(
        app, [*name.split()[1:], "--help"]
    )
    assert shown.exit_code == 0
    # words within descriptions may name options too, so only the beginnings of rows count
    rows = [line.strip("│ *") for line in shown.output.splitlines() if line.startswith("│")]
    of_help = {o for row in rows if row.startswith("-") for o in OPTION.findall(row.split("<")[0])}
    section = sections(PAGE.read_text())[name]
    table = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("|"))
    assert set(OPTION.findall(table)) == of_help - {"--help"}
    inside = re.search(r"^Commands: (.*)\.$", section, flags=re.MULTILINE)
    words = set(re.findall(r"`([a-z-]+)`", inside[1])) if inside else set()
    assert words == {
        row.split()[0] for row in rows if inside and re.match(r"[a-z-]+ {2,}[A-Z]", row)
    }


def test_spelling_of_every_kind_of_parameter():
    other = typer.Typer()

    @other.command()
    def move(
        sources: Annotated[list[str], typer.Argument(help="What | moves.")],
        to: Annotated[str, typer.Option("--to", "-t", metavar="PLACE", help="Where.")],
        tries: Annotated[int, typer.Option(help="How often.")] = 3,
        loud: Annotated[bool, typer.Option("--loud", help="Say so.")] = False,
        safe: Annotated[bool, typer.Option(help="Look first.")] = True,
        hidden: Annotated[int, typer.Option(hidden=True)] = 1,
    ) -> None:
        """Move things."""

    text = reference._section("x move", get_command(other))
    assert "x move SOURCES… --to / -t PLACE [OPTIONS]" in text
    assert "| `SOURCES…` | What \\| moves. | required |" in text
    assert "| `--tries TRIES` | How often. | `3` |" in text
    assert "| `--loud` | Say so. |  |" in text
    assert "| `--safe / --no-safe` | Look first. | `--safe` |" in text
    assert "hidden" not in text

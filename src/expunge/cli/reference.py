"""The command-line reference `docs/cli.md`, written from the commands themselves.

A test compares the page with `markdown()`; `python -m expunge.cli.reference > docs/cli.md` renews it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

HEAD = """\
# Command line

Written by `python -m expunge.cli.reference > docs/cli.md`; a test keeps the two equal. Every command
has `--help`. What `--json` prints, exit codes and progress are in [scripting.md](scripting.md).
"""


def commands() -> dict[str, Any]:
    """Every command by its full name, e.g. `expunge runs list`; groups included, in help's order."""
    from expunge.cli.__main__ import app

    return dict(_walk("expunge", get_command(app)))


def markdown() -> str:
    """Return the reference as Markdown, one section a command."""
    return HEAD + "".join(_section(name, command) for name, command in commands().items())


def _walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for word, inside in getattr(command, "commands", {}).items():
        yield from _walk(f"{name} {word}", inside)


def _section(name: str, command: Any) -> str:
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    inside = getattr(command, "commands", {})
    lines = ["", f"## {name}", "", " ".join((command.help or "").split()), ""]
    lines += ["```", _usage(name, shown, bool(inside)), "```", ""]
    if inside:
        lines += [f"Commands: {', '.join(f'`{word}`' for word in inside)}.", ""]
    if shown:
        lines += ["| | meaning | default |", "|---|---|---|", *map(_row, shown), ""]
    return "\n".join(lines)


def _usage(name: str, parameters: list[Any], group: bool) -> str:
    words = [name]
    words += [_spelling(p) for p in parameters if p.required]
    words += [f"[{_spelling(p)}]" for p in parameters if _argument(p) and not p.required]
    optional = any(not p.required and not _argument(p) for p in parameters)
    return " ".join(words + ["[OPTIONS]"] * optional + ["COMMAND"] * group)


def _row(parameter: Any) -> str:
    meaning = " ".join((parameter.help or "").split()).replace("|", "\\|")
    default = _default(parameter)
    return f"| `{_spelling(parameter)}` | {meaning} | {default} |"


# Only what every version of typer since 0.12 offers is read here: types and ranges are not.
def _spelling(parameter: Any) -> str:
    value = parameter.metavar or parameter.name.upper().replace("_", "-")
    if _argument(parameter):
        return value if parameter.nargs == 1 or value.endswith("…") else value + "…"
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    return f"{names} {parameter.metavar or parameter.opts[0].strip('-').upper().replace('-', '_')}"


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(value, bool):
        if not parameter.is_flag or not parameter.secondary_opts:
            return ""
        return f"`{(parameter.opts if value else parameter.secondary_opts)[0]}`"
    return f"`{value}`" if isinstance(value, (str, int, float)) and value != "" else ""


def _argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


if __name__ == "__main__":
    print(markdown(), end="")

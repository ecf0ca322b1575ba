"""A list of what to forget, in a file: ids, names or labels as `.csv`, `.tsv`, `.jsonl` or lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge.core.errors import RequestError
from expunge.core.request import Request, forget
from expunge.problems._foreign import first_line

_FIELDS = {
    "id": ("id", "ids"),
    "name": ("name", "names", "file", "files", "file_name", "filename", "path"),
    "label": ("label", "labels", "class"),
}


def read_forget_file(path: str | Path, classes: Sequence[str] = ()) -> Request:
    """Read what to forget from a list.

    `.csv`/`.tsv` with a column `id`, `name` (or `file`) or `label`, or one id or name a line without
    a header; `.jsonl` with an id, a name or an object of that kind a line; anything else is read as
    one id or name a line. Where there are several such columns, `id` goes before `name` before
    `label`.

    Args:
        path: the file.
        classes: names of classes by number, so that a label may be a name.

    Returns:
        A request for these ids or labels, without repetitions, in the file's order.

    Raises:
        RequestError: the file cannot be read, names nothing, or is not understood.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {first_line(error)}") from error
    if path.suffix == ".jsonl":
        field, values = _from_jsonl(path, text)
    else:
        field, values = _from_lines(path, text)
    if not values:
        raise RequestError(f"{path} names nothing to forget")
    if field == "label":
        return forget(label=tuple(dict.fromkeys(_label(path, v, classes) for v in values)))
    # a name that looks like a number stays a name; in other lists "7" and 7 are the same request
    return forget(
        ids=tuple(dict.fromkeys(v if field == "name" else _number_or_text(v) for v in values))
    )


def _from_lines(path: Path, text: str) -> tuple[str, list[Any]]:
    """The kind of column and its cells."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "", []
    if path.suffix in (".csv", ".tsv"):
        mark = next((m for m in ("\t", ";") if m in lines[0] and "," not in lines[0]), ",")
        try:
            rows = list(csv.reader(io.StringIO("\n".join(lines)), delimiter=mark, strict=True))
        except csv.Error as error:
            raise RequestError(f"{path} is no CSV file: {error}") from error
    else:
        rows = [[line] for line in lines]
    header = [cell.strip().lower() for cell in rows[0]]
    for field, aliases in _FIELDS.items():
        at = next((header.index(alias) for alias in aliases if alias in header), None)
        if at is not None:
            cells = [row[at].strip() if at < len(row) else "" for row in rows[1:]]
            return field, _no_gaps(path, field, cells)
    if any(len(row) > 1 for row in rows):
        raise RequestError(f"{path} has several columns; its header must name id, name or label")
    return "", [row[0].strip() for row in rows]


def _from_jsonl(path: Path, text: str) -> tuple[str, list[Any]]:
    fields, values = set(), []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}, line {number} is not JSON") from error
        field = ""
        if isinstance(item, dict):
            field = next((f for f, aliases in _FIELDS.items() if set(aliases) & set(item)), "")
            item = next((item[alias] for alias in _FIELDS.get(field, ()) if alias in item), None)
        if isinstance(item, bool) or not isinstance(item, (int, str)):
            raise RequestError(f"{path}, line {number} gives no id, name or label")
        fields.add(field)
        values.append(item)
    if len(fields) > 1:
        raise RequestError(f"{path} mixes ids, names and labels; use one kind")
    return next(iter(fields), ""), _no_gaps(path, "id", values)


def _no_gaps(path: Path, field: str, values: list[Any]) -> list[Any]:
    if "" in values:
        raise RequestError(f"{path} has an empty {field} in entry {values.index('') + 1}")
    return values


def _label(path: Path, value: int | str, classes: Sequence[str]) -> int:
    if value in classes:
        return list(classes).index(str(value))
    number = _number_or_text(value)
    if isinstance(number, int) and number >= 0:
        return number
    known = f" ({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''})" if classes else ""
    raise RequestError(f"{path}: {value!r} is not a class number or name{known}")


def _number_or_text(value: int | str) -> int | str:
    """`"7"` is 7; `"007"` and `"a"` stay text."""
    return int(value) if isinstance(value, str) and _canonical(value) else value


def _canonical(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(text)) == text

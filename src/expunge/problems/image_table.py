"""Images named by a table: a `.csv` with a row for each image, its label, and whose it is."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.core.data import Data
from expunge.core.errors import DataError
from expunge.problems._foreign import first_line
from expunge.problems.image_folder import ImageFiles
from expunge.problems.images import LazyImages, Reader
from expunge.problems.preprocessing import Preprocessing


def read_image_table(
    table: str | Path, images: str | Path, *, image: str = "image", label: str = "label",
    classes: Sequence[str] | None = None, size: int | None = None, skip_missing: bool = False,
) -> tuple[Data, list[str]]:  # fmt: skip
    """Read a `.csv` and the images it names, which are opened when asked for.

    Args:
        table: the `.csv`, with a header.
        images: folder that the names of the images are relative to.
        image: column with the names.
        label: column with the labels, which are words or class numbers.
        classes: the labels by number; sorted when left out.
        size: length in pixels that the shorter edge is made; as they are when left out.
        skip_missing: leave rows out whose image is not there, with a warning.

    Returns:
        The data (ids are the rows, counted from 0; every column of the table may be named by a request) and
        the classes by number.

    Raises:
        DataError: the table cannot be read, lacks a column or a value, or an image is not there.
    """
    path, root = Path(table).expanduser(), Path(images).expanduser()
    rows = table_rows(path, (image, label))
    numbers, names = Reader(None, classes).number(sorted({r[label] for r in rows}), path)
    there = present(root, [r[image] for r in rows], str(path), skip=skip_missing)
    kept = [rows[i] for i in there]
    data = lazy_images(
        root, [r[image] for r in kept], torch.tensor([numbers[r[label]] for r in kept]),
        ids=there, columns={c: [r[c] for r in kept] for c in rows[0] if c not in (image, label)},
        size=size,
    )  # fmt: skip
    return data, names


def table_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a `.csv` by column.

    Raises:
        DataError: it cannot be read, or a row has no value in one of the columns.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table ({first_line(error)})") from error
    for column in columns:
        if column not in header:
            raise DataError(
                f"{path} has no column {column!r} ({', '.join(header) or 'it is empty'})"
            )
        empty = next((i for i, row in enumerate(rows) if not row[column]), None)
        if empty is not None:
            raise DataError(f"{path}: row {empty + 2} has no {column}")
    if not rows:
        raise DataError(f"{path} has a header and no rows")
    longer = next((i for i, row in enumerate(rows) if None in row or None in row.values()), None)
    if longer is not None:
        raise DataError(f"{path}: row {longer + 2} has more or fewer values than the header")
    return rows


def present(root: Path, names: Sequence[str], what: str, *, skip: bool) -> list[int]:
    """Positions of the images that are there.

    Args:
        root: the folder.
        names: paths relative to it.
        what: what names them, for the message.
        skip: warn of missing ones instead of refusing them.

    Raises:
        DataError: one is missing, or lies outside the folder, or is named twice.
    """
    if len(set(names)) != len(names):
        twice = next(n for n in names if list(names).count(n) > 1)
        raise DataError(f"{what} names {twice} twice")
    outside = next((n for n in names if Path(n).is_absolute() or ".." in Path(n).parts), None)
    if outside is not None:
        raise DataError(f"{what} names {outside}, which is not below the folder of images")
    there = [i for i, name in enumerate(names) if (root / name).is_file()]
    if len(there) < len(names):
        lost = names[next(i for i in range(len(names)) if i >= len(there) or there[i] != i)]
        words = f"{len(names) - len(there)} of the {len(names)} images that {what} names are not in {root} ({lost}, …)"  # fmt: skip
        if not skip or not there:
            raise DataError(f"{words}; skip_missing=True leaves them out")
        warnings.warn(words + "; they are left out", stacklevel=3)
    return there


def lazy_images(
    root: Path, names: Sequence[str], labels: Tensor, *, ids: Sequence[int],
    columns: Mapping[str, Sequence[Any]], size: int | None,
) -> Data:  # fmt: skip
    """Images [3, H, W] in 0 … 1 below a folder, with their labels and columns."""
    source = LazyImages(ImageFiles(root, list(names)), labels, Preprocessing(3, size), str(root))
    return Data(source, ids=ids, names=list(names), columns=columns)

"""Data in a folder that `datasets` wrote with `save_to_disk`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.data import Data
from expunge.core.errors import DataError
from expunge.problems._foreign import first_line, need, quiet
from expunge.problems.images import Reader, labels_from


def read_datasets_folder(place: Path, split: str | None, reader: Reader) -> tuple[Data, list[str]]:
    """Read one part of a `datasets` folder; see `load_data`.

    Args:
        place: the folder.
        split: name of the part; by default `train`, or the only one.
        reader: what the model says about its data.

    Returns:
        The data, images read when asked for, and the names of its classes by number.

    Raises:
        DataError: it cannot be read, or its columns are not understood.
    """
    datasets = need("datasets")
    try:
        with quiet():
            rows = datasets.load_from_disk(str(place))
    except Exception as error:  # Arrow, JSON and OS errors alike
        raise DataError(
            f"{place} cannot be read as a datasets folder ({first_line(error)})"
        ) from error
    if isinstance(rows, dict):
        part = split or ("train" if "train" in rows or len(rows) != 1 else next(iter(rows)))
        if part not in rows:
            raise DataError(f"{place} has no part {part!r}; it has {', '.join(rows)}")
        rows = rows[part]
    elif split not in (None, "train"):
        raise DataError(f"{place} has no part {split!r}")
    if not len(rows):
        raise DataError(f"{place} holds no samples")
    rows = rows.with_format(None)
    features = rows.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    image = _only(images, ("image", "img"), "image", features, place)
    if image is None:
        raise DataError(f"{place} has no image column; its columns are {', '.join(features)}")
    if not features[image].decode:
        rows = rows.cast_column(image, datasets.Image())
    kinds = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = ("label", "labels", "fine_label", "target")
    kinds = kinds or [name for name in usual if name in features][:1]
    column = _only(kinds, usual, "label", features, place)
    labels, classes = None, list(reader.fixed or reader.known or [])
    if column is not None:
        labels, classes = _column_labels(rows, column, reader, place)
    ids = None
    if "id" in features and getattr(features["id"], "dtype", "").startswith(("int", "uint")):
        ids = torch.as_tensor(_values(rows, "id"))
    rows = rows.select_columns([image])
    first = None if reader.prepare else rows[0][image]
    return Data(reader.images(_Column(rows, image), labels, first, place), ids=ids), classes


def is_datasets_folder(place: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return (place / "dataset_dict.json").exists() or (place / "dataset_info.json").exists()


class _Column:
    """The image column of a `datasets.Dataset`."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows = rows
        self.column = column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Any:
        return self.rows[position][self.column]


def _column_labels(rows: Any, column: str, reader: Reader, place: Path) -> tuple[Tensor, list[str]]:
    values = _values(rows, column)
    missing = [i for i, value in enumerate(values) if value is None or value == -1]
    if missing:
        raise DataError(f"{place}: {len(missing)} labels are missing, the first at {missing[0]}")
    names = getattr(rows.features[column], "names", None)
    if names:
        numbers, classes = reader.number(names, place)
        return torch.tensor([numbers[names[value]] for value in values]), classes
    labels, classes = labels_from(np.asarray(values), len(values), reader, place)
    assert labels is not None
    return labels, classes


def _values(rows: Any, column: str) -> list[Any]:
    return list(rows.select_columns([column])[:][column])


def _only(
    found: list[str], usual: tuple[str, ...], what: str, features: Mapping[str, Any], place: Path
) -> str | None:
    """The one column of a kind, or the one with a usual name."""
    named = [name for name in usual if name in found]
    if len(found) > 1 and not named:
        raise DataError(
            f"{place} has several {what} columns ({', '.join(found)}); name one {what!r}"
        )
    return next(iter(named or found), None)

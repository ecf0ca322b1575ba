"""Data in a folder of images: one sub-folder a class, perhaps below `train/` and `test/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from expunge.core.data import Data
from expunge.core.errors import DataError
from expunge.problems._foreign import first_line, need
from expunge.problems.images import Reader

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def read_image_folder(place: Path, split: str | None, reader: Reader) -> tuple[Data, list[str]]:
    """Read the images below a folder; see `load_data`.

    Args:
        place: the folder.
        split: `train` or `test` where the folder has both; `train` by default.
        reader: what the model says about its data.

    Returns:
        The data, images read when asked for, and the names of its classes by number.

    Raises:
        DataError: there are no classes or no images, or the part is not there.
    """
    root = place
    if has_parts(place):
        root = place / (split or "train")
        if not root.is_dir():
            raise DataError(f"{place} has no part {split!r}")
    elif split not in (None, "train"):
        raise DataError(f"{place} has no part {split!r}; it is one folder of classes")
    folders = _subfolders(root)
    if not folders:
        raise DataError(f"{root} has no sub-folders; put the images of each class into one")
    names = [name for folder in folders for name in _image_names(root, folder)]
    if not names:
        raise DataError(f"{root} holds no images")
    numbers, classes = reader.number(folders, root)
    labels = torch.tensor([numbers[name.split("/", 1)[0]] for name in names])
    files = ImageFiles(root, names)
    first = None if reader.prepare else _readable(files, root)
    return Data(reader.images(files, labels, first, root), names=names), classes


def has_parts(place: Path) -> bool:
    """Whether an image folder is split into train/ and test/ (and these are not two classes)."""
    return all((place / p).is_dir() and _subfolders(place / p) for p in ("train", "test"))


class ImageFiles:
    """Image files below a folder, read when asked for."""

    def __init__(self, root: Path, names: list[str]) -> None:
        """Keep the folder and the files' paths relative to it."""
        self.root = root
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> Any:
        with need("PIL.Image").open(self.root / self.names[position]) as image:
            # cameras store the rotation beside the pixels
            return need("PIL.ImageOps").exif_transpose(image)


def _readable(files: ImageFiles, root: Path) -> Any:
    try:
        return files[0]
    except Exception as error:
        raise DataError(
            f"{root}: {files.names[0]} cannot be read as an image ({first_line(error)})"
        ) from error


def _subfolders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_names(root: Path, folder: str) -> list[str]:
    found = [
        (Path(base) / name).relative_to(root).as_posix()
        for base, _, names in os.walk(root / folder)
        for name in names
        if Path(name).suffix.lower() in _IMAGES and not name.startswith(".")
    ]
    return sorted(found)

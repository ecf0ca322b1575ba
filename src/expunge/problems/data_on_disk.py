"""A user's own images and labels: an `.npz`, an image folder, or a `datasets` folder.

All three give the same tensors for the same 8-bit images. Folders are read lazily.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from expunge.core.data import Data
from expunge.core.errors import DataError
from expunge.core.problem import Recipe
from expunge.problems.classification import Classification
from expunge.problems.datasets_folder import is_datasets_folder, read_datasets_folder
from expunge.problems.image_folder import has_parts, read_image_folder
from expunge.problems.images import Reader
from expunge.problems.models_on_disk import load_image_classifier, model_folder
from expunge.problems.npz_file import read_npz
from expunge.problems.preprocessing import preprocessing


def problem_from_disk(
    model: str, data: str, *, test: str | None = None, recipe: Recipe | None = None
) -> Classification:
    """Put a model and data on disk together, and look at all of it once.

    Every image is read here (its hash is needed for the record anyway), so a damaged file is
    found before any long work.

    Args:
        model: folder or hub name of a transformers image classifier.
        data: `.npz`, image folder or `datasets` folder with the training data.
        test: held-out data of any of these forms; when left out, the `test` part of `data` if it
            has one.
        recipe: how the model was trained, for retrained references.

    Returns:
        The problem; its `source` says how to build it again and how images are prepared.

    Raises:
        ModelError: the model cannot be read, or does not fit the data.
        DataError: the data cannot be read.
    """
    folder = str(model_folder(model))  # asks the hub once
    loaded = load_image_classifier(folder)
    train, classes = load_data(data, model_folder=folder)
    held_out = None
    if test is not None:
        held_out, _ = load_data(test, model_folder=folder, split=_test_part(test), classes=classes)
    elif _test_part(data):
        held_out, _ = load_data(data, model_folder=folder, split="test", classes=classes)
    local = Path(model).expanduser()
    problem = Classification(
        loaded,
        train,
        held_out,
        recipe=recipe,
        name=local.resolve().name if local.is_dir() else model,
        source={
            "kind": "disk",
            "model": str(local.resolve()) if local.is_dir() else model,
            "data": str(Path(data).expanduser().resolve()),
            "test": None if test is None else str(Path(test).expanduser().resolve()),
            "preprocessing": str(preprocessing(folder)),
        },
    )
    problem.check()
    problem.fingerprint()
    return problem


def load_data(
    path: str,
    *,
    model_folder: str | None,
    split: str | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Data, list[str]]:
    """Read images and labels.

    - `.npz`: `X` of uint8 (raw pixels, prepared as the model asks) or float (already prepared),
      [N, C, H, W], [N, H, W, C] or [N, H, W]; optional `y` (class numbers or names), `ids`, `names`.
    - image folder: one sub-folder a class, perhaps below `train/` and `test/`; `Data.names` are the
      relative paths.
    - `datasets` folder (`save_to_disk`): an image column, a label column if there is one, ids from
      an integer column `id`.

    Class names are numbered as `label2id` of the model says if it knows them. If it knows none,
    they are numbered in sorted order, which takes as many as the model has classes.

    Args:
        path: the file or folder.
        model_folder: the model's folder or hub name; without one, pixels are scaled to [0, 1] only.
        split: part of the data, e.g. `"test"`; by default all of it, or `"train"` where there are
            several.
        classes: names of the classes by number, when another part of the data has set them.

    Returns:
        The data and the names of its classes by number.

    Raises:
        DataError: says what is wrong with the data.
        ModelError: the number of classes is not the model's.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise DataError(f"there is no file or folder {path}")
    reader = Reader(model_folder, classes)
    if place.is_file():
        if split not in (None, "train"):
            raise DataError(f"{path} is one file and has no part {split!r}")
        return read_npz(place, reader)
    if is_datasets_folder(place):
        return read_datasets_folder(place, split, reader)
    return read_image_folder(place, split, reader)


def _test_part(path: str) -> str | None:
    """`"test"` if the data has a part of that name."""
    place = Path(path).expanduser()
    if (place / "dataset_dict.json").exists():
        return "test" if (place / "test").is_dir() else None
    return "test" if place.is_dir() and not is_datasets_folder(place) and has_parts(place) else None

"""A user's own images and labels: an `.npz`, an image folder, or a `datasets` folder; forget lists.

All three give the same tensors for the same 8-bit images. Folders are read lazily.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from expunge.core.data import Data
from expunge.core.errors import DataError, RequestError
from expunge.core.problem import Recipe
from expunge.core.request import Request, forget
from expunge.problems.classification import Classification
from expunge.problems.models_on_disk import (
    Preprocessing,
    class_names,
    first_line,
    load_image_classifier,
    model_config,
    model_folder,
    need,
    preprocessing,
    quiet,
)

KEEP_BYTES = 256 * 2**20  # prepared images are kept in memory only while all of them fit in this

# a file that is no zip, a damaged one, one with objects; a TypeError is a lone array (.npy)
_NPZ_ERRORS = (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error)
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_FIELDS = {
    "id": ("id", "ids"),
    "name": ("name", "names", "file", "files", "file_name", "filename", "path"),
    "label": ("label", "labels", "class"),
}


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
    reader = _Reader(model_folder, classes)
    if place.is_file():
        if split not in (None, "train"):
            raise DataError(f"{path} is one file and has no part {split!r}")
        return _npz(place, reader)
    if _is_datasets(place):
        return _datasets(place, split, reader)
    return _folder(place, split, reader)


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


class LazyImages(Dataset[Any]):
    """Images prepared when asked for, with labels known beforehand (`targets`)."""

    def __init__(
        self, source: Any, labels: Tensor | None, prepare: Preprocessing, where: str
    ) -> None:
        """Keep where images come from.

        Args:
            source: `len(source)` images; `source[i]` is a PIL image or uint8 pixels [C, H, W].
            labels: class numbers [N] or None.
            prepare: from an image to a tensor.
            where: what to call the source in messages.
        """
        self.targets = labels
        self._source = source
        self._prepare = prepare
        self._where = where
        self._kept: dict[int, Tensor] = {}
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._source)

    def __getitem__(self, position: int) -> tuple[Tensor, int | None]:
        """Return one image [C, H, W] and its class number.

        Raises:
            DataError: the image cannot be read or has another size than the first one.
        """
        label = None if self.targets is None else int(self.targets[position])
        if position in self._kept:
            return self._kept[position], label
        name = getattr(self._source, "names", {position: f"image {position}"})[position]
        try:
            raw = self._source[position]
            pixels = isinstance(raw, np.ndarray)
            x = self._prepare.of_pixels(raw) if pixels else self._prepare(raw)
        except DataError as error:
            raise DataError(f"{self._where}: {name}: {error}") from error
        except Exception as error:  # PIL raises OSError, SyntaxError, ValueError and its own
            raise DataError(
                f"{self._where}: {name} cannot be read as an image ({first_line(error)})"
            ) from error
        self._shape = self._shape or tuple(x.shape)
        if tuple(x.shape) != self._shape:
            raise DataError(
                f"{self._where}: {name} is {x.shape[1]}×{x.shape[2]} and others "
                f"{self._shape[1]}×{self._shape[2]}; the model's folder does not say one size"
            )
        if x.numel() * 4 * len(self) <= KEEP_BYTES:
            self._kept[position] = x
        return x, label

    def __getstate__(self) -> dict[str, Any]:
        """Leave the kept images behind when sent to another process."""
        return {**self.__dict__, "_kept": {}}


class _Reader:
    """What the model says about its data: preparation of images and numbers of classes."""

    def __init__(self, model: str | None, classes: Sequence[str] | None) -> None:
        self.prepare: Preprocessing | None = None
        self.known: list[str] | None = None
        if model is not None:
            self.prepare = preprocessing(model)
            self.known = class_names(model_config(model_folder(model)))
        self.fixed = None if classes is None else list(classes)

    def images(self, source: Any, labels: Tensor | None, first: Any, where: Path) -> LazyImages:
        """Images of a source; without a model they keep the channels of the first one."""
        prepare = self.prepare
        if prepare is None:
            prepare = Preprocessing(_channels(first))
        return LazyImages(source, labels, prepare, str(where))

    def number(self, names: Sequence[str], where: Path) -> tuple[dict[str, int], list[str]]:
        """Numbers for class names, and all names by number."""
        names = list(names)
        for wanted in (self.fixed, self.known):
            numbers = {n.casefold(): i for i, n in enumerate(wanted or [])}
            unknown = [n for n in names if n.casefold() not in numbers]
            if wanted is not None and not unknown:
                return {n: numbers[n.casefold()] for n in names}, list(wanted)
            if wanted is not None and (wanted is self.fixed or len(unknown) < len(names)):
                raise DataError(
                    f"{where}: class {unknown[0]!r} is not among the {len(wanted)} known classes "
                    f"({', '.join(wanted[:5])}{', …' if len(wanted) > 5 else ''})"
                )
        self._same_count(len(names), where)
        ordered = sorted(names)
        if all(n.isdigit() for n in names) and ordered != sorted(names, key=int):
            raise DataError(
                f"{where}: classes are named by numbers that sort differently as words (10 before "
                "2); give their names in label2id of the model's config.json"
            )
        return {n: i for i, n in enumerate(ordered)}, ordered

    def _same_count(self, count: int, where: Path) -> None:
        if self.known is not None and count != len(self.known):
            raise DataError(
                f"{where} has {count} classes but the model has {len(self.known)}, "
                "and their names do not match"
            )


def _npz(path: Path, reader: _Reader) -> tuple[Data, list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name.lower(): file[name] for name in file.files}
    except _NPZ_ERRORS as error:
        what = "holds Python objects" if "Object arrays" in str(error) else "cannot be read"
        raise DataError(f"{path} {what}; it should be an .npz of plain arrays X and y") from error
    if "x" not in arrays:
        raise DataError(f"{path} has no array X; it has {', '.join(sorted(arrays)) or 'none'}")
    pixels = arrays["x"]
    if not len(pixels.shape) or not len(pixels):
        raise DataError(f"{path} holds no samples")
    labels, classes = _labels_from(arrays.get("y"), len(pixels), reader, path)
    pixels = _channels_first(pixels, reader, path)
    ids, names = arrays.get("ids"), arrays.get("names")
    if ids is not None and ids.dtype.kind not in "iu":
        raise DataError(f"{path}: ids must be whole numbers, not {ids.dtype}")
    source: Any = (torch.from_numpy(pixels), labels)
    if pixels.dtype == np.uint8:
        source = reader.images(pixels, labels, pixels[0], path)
    stable = None if ids is None else torch.from_numpy(ids.astype(np.int64))
    return Data(source, ids=stable, names=None if names is None else list(map(str, names))), classes


def _channels_first(pixels: np.ndarray, reader: _Reader, path: Path) -> np.ndarray:
    """Bring X to [N, C, H, W], uint8 or float32."""
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise DataError(f"{path}: X must be uint8 or float, not {pixels.dtype}")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    wanted = {1, 3, 4} if reader.prepare is None else {1, 3, 4, reader.prepare.channels}
    if pixels.ndim != 4 or not wanted & {pixels.shape[1], pixels.shape[3]}:
        raise DataError(
            f"{path}: X must be images [N, C, H, W], [N, H, W, C] or [N, H, W], not {pixels.shape}"
        )
    if pixels.shape[1] not in wanted:
        pixels = np.moveaxis(pixels, 3, 1)
    if pixels.dtype == np.uint8:
        return pixels
    if reader.prepare is not None and pixels.shape[1] != reader.prepare.channels:
        raise DataError(
            f"{path}: X is float and has {pixels.shape[1]} channels, but the model takes "
            f"{reader.prepare.channels}"
        )
    with np.errstate(over="ignore"):  # infinite values are refused with a sentence later
        return np.ascontiguousarray(pixels, dtype=np.float32)


def _labels_from(
    y: np.ndarray | None, count: int, reader: _Reader, where: Path
) -> tuple[Tensor | None, list[str]]:
    """Class numbers from numbers or names, and the classes by number."""
    if y is None:
        return None, list(reader.fixed or reader.known or [])
    if y.shape != (count,):
        raise DataError(f"{where}: {count} images but labels of shape {y.shape}")
    if y.dtype.kind == "U":
        numbers, classes = reader.number(sorted(set(y.tolist())), where)
        return torch.tensor([numbers[name] for name in y.tolist()]), classes
    if y.dtype.kind not in "iub" or int(y.min()) < 0:
        raise DataError(f"{where}: labels must be class numbers 0, 1, … or names, one an image")
    labels = torch.from_numpy(y.astype(np.int64))
    classes = reader.fixed or reader.known or [str(i) for i in range(int(labels.max()) + 1)]
    if int(labels.max()) >= len(classes):
        raise DataError(
            f"{where} has label {int(labels.max())} but there are {len(classes)} classes"
        )
    return labels, list(classes)


class _Files:
    """Image files below a folder."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = root
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: int) -> Any:
        with need("PIL.Image").open(self.root / self.names[position]) as image:
            # cameras store the rotation beside the pixels
            return need("PIL.ImageOps").exif_transpose(image)


def _folder(place: Path, split: str | None, reader: _Reader) -> tuple[Data, list[str]]:
    root = place
    if _has_parts(place):
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
    files = _Files(root, names)
    first = None if reader.prepare else _readable(files, root)
    return Data(reader.images(files, labels, first, root), names=names), classes


def _readable(files: _Files, root: Path) -> Any:
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


def _has_parts(place: Path) -> bool:
    """Whether an image folder is split into train/ and test/ (and these are not two classes)."""
    return all((place / p).is_dir() and _subfolders(place / p) for p in ("train", "test"))


def _test_part(path: str) -> str | None:
    """`"test"` if the data has a part of that name."""
    place = Path(path).expanduser()
    if (place / "dataset_dict.json").exists():
        return "test" if (place / "test").is_dir() else None
    return "test" if place.is_dir() and not _is_datasets(place) and _has_parts(place) else None


def _is_datasets(place: Path) -> bool:
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


def _datasets(place: Path, split: str | None, reader: _Reader) -> tuple[Data, list[str]]:
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


def _column_labels(
    rows: Any, column: str, reader: _Reader, place: Path
) -> tuple[Tensor, list[str]]:
    values = _values(rows, column)
    missing = [i for i, value in enumerate(values) if value is None or value == -1]
    if missing:
        raise DataError(f"{place}: {len(missing)} labels are missing, the first at {missing[0]}")
    names = getattr(rows.features[column], "names", None)
    if names:
        numbers, classes = reader.number(names, place)
        return torch.tensor([numbers[names[value]] for value in values]), classes
    labels, classes = _labels_from(np.asarray(values), len(values), reader, place)
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


def _channels(image: Any) -> int:
    """Channels of an image or array [C, H, W]: 1, 3, or what the array has."""
    if hasattr(image, "getbands"):
        return 1 if image.mode in ("1", "L", "LA") else 3
    return int(image.shape[0])

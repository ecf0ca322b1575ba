"""What the three forms of data on disk share: images prepared when asked for, classes by number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from expunge.core.errors import DataError
from expunge.problems._foreign import first_line
from expunge.problems.models_on_disk import class_names, model_config, model_folder
from expunge.problems.preprocessing import Preprocessing, preprocessing

KEEP_BYTES = 256 * 2**20  # prepared images are kept in memory only while all of them fit in this


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


class Reader:
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
        if all(n.isdigit() for n in names) and [int(n) for n in ordered] != list(
            range(len(ordered))
        ):
            # "forget label 3" would mean the fourth folder: too easy to get wrong
            raise DataError(
                f"{where}: classes are named by numbers that are not the class numbers "
                f"(folder {ordered[0]!r} would be class 0); give their names in label2id of the "
                "model's config.json"
            )
        return {n: i for i, n in enumerate(ordered)}, ordered

    def _same_count(self, count: int, where: Path) -> None:
        if self.known is not None and count != len(self.known):
            raise DataError(
                f"{where} has {count} classes but the model has {len(self.known)}, "
                "and their names do not match"
            )


def labels_from(
    y: np.ndarray | None, count: int, reader: Reader, where: Path
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


def _channels(image: Any) -> int:
    """Channels of an image or array [C, H, W]: 1, 3, or what the array has."""
    if hasattr(image, "getbands"):
        return 1 if image.mode in ("1", "L", "LA") else 3
    return int(image.shape[0])

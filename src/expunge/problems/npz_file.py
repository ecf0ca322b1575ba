"""Data in an `.npz`: arrays `X`, and perhaps `y`, `ids` and `names`."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge.core.data import Data
from expunge.core.errors import DataError
from expunge.problems.images import Reader, labels_from

# a file that is no zip, a damaged one, one with objects; a TypeError is a lone array (.npy)
_NPZ_ERRORS = (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path, reader: Reader) -> tuple[Data, list[str]]:
    """Read arrays; see `load_data`.

    Args:
        path: the file.
        reader: what the model says about its data.

    Returns:
        The data and the names of its classes by number.

    Raises:
        DataError: it is no `.npz` of plain arrays, or they are not images and labels.
    """
    try:
        # NumPy leaves a damaged file open that it opened itself
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name.lower(): file[name] for name in file.files}
    except _NPZ_ERRORS as error:
        what = "holds Python objects" if "Object arrays" in str(error) else "cannot be read"
        raise DataError(f"{path} {what}; it should be an .npz of plain arrays X and y") from error
    if "x" not in arrays:
        raise DataError(f"{path} has no array X; it has {', '.join(sorted(arrays)) or 'none'}")
    pixels = arrays["x"]
    if not len(pixels.shape) or not len(pixels):
        raise DataError(f"{path} holds no samples")
    labels, classes = labels_from(arrays.get("y"), len(pixels), reader, path)
    pixels = _channels_first(pixels, reader, path)
    ids, names = arrays.get("ids"), arrays.get("names")
    if ids is not None and ids.dtype.kind not in "iu":
        raise DataError(f"{path}: ids must be whole numbers, not {ids.dtype}")
    source: Any = (torch.from_numpy(pixels), labels)
    if pixels.dtype == np.uint8:
        source = reader.images(pixels, labels, pixels[0], path)
    stable = None if ids is None else torch.from_numpy(ids.astype(np.int64))
    return Data(source, ids=stable, names=None if names is None else list(map(str, names))), classes


def _channels_first(pixels: np.ndarray, reader: Reader, path: Path) -> np.ndarray:
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

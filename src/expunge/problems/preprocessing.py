"""From an image to what a transformers model takes, as its `preprocessor_config.json` says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.core.errors import DataError, ModelError
from expunge.problems._foreign import first_line, need, read_json
from expunge.problems.models_on_disk import model_config, model_folder, preprocessor_files

# processors that do more than resize, crop, rescale and normalise
_OTHER_STEPS = ("EfficientNet", "ImageGPT", "Levit", "MobileViT", "PoolFormer", "Perceiver")
_SHORT_EDGE = ("CLIP", "ConvNe", "Bit", "MobileNet", "Siglip")


@dataclass(frozen=True)
class Preprocessing:
    r"""From one image to what a model takes: resize, centre crop, rescale, normalise.

    With pixels \(p\in[0,255]\) the result is \((s\,p-\mu_c)/\sigma_c\), float32 [C, H, W].

    Attributes:
        channels: C; grey images are repeated, colour images turned to grey as needed.
        size: (height, width) to resize to, the length of the shorter edge, or None to leave it.
        crop: (height, width) cut from the centre, padded with zeros where too small, or None.
        resample: PIL's number of the filter (0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic).
        scale: factor s.
        mean: \(\mu\), one a channel, or None.
        std: \(\sigma\), one a channel, or None.
        origin: the file the settings are from; empty if they had to be assumed.
    """

    channels: int = 3
    size: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    resample: int = 2
    scale: float = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    origin: str = ""

    def __call__(self, image: Any) -> Tensor:
        """Prepare a PIL image, or uint8 pixels [H, W], [C, H, W] or [H, W, C].

        Args:
            image: the image.

        Returns:
            float32 [channels, H, W].

        Raises:
            DataError: it is no 8-bit image, or its channels cannot be turned into the model's.
        """
        return self.of_pixels(_pixels(image, self.channels))

    def of_pixels(self, pixels: np.ndarray) -> Tensor:
        """Prepare uint8 pixels [C, H, W], for which nothing has to be guessed."""
        pixels = self._with_channels(pixels)
        if self.size is not None:
            pixels = self._resized(pixels, _target(self.size, *pixels.shape[1:]))
        if self.crop is not None:
            pixels = _centre(pixels, *self.crop)
        x = pixels.astype(np.float32) * np.float32(self.scale)
        if self.mean is not None and self.std is not None:
            mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.mean, self.std))
            x = (x - mean) / std
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    def __str__(self) -> str:
        """Say in words what is done."""
        steps = [{1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels} channels")]
        if isinstance(self.size, int):
            steps.append(f"shorter edge {self.size}")
        elif self.size is not None:
            steps.append(f"resize to {self.size[0]}×{self.size[1]}")
        steps += [] if self.crop is None else [f"centre crop {self.crop[0]}×{self.crop[1]}"]
        steps += [f"scale by {self.scale:.6g}"]
        steps += [] if self.mean is None else [f"mean {self.mean}, std {self.std}"]
        origin = f"from {self.origin}" if self.origin else "assumed: no preprocessor_config.json"
        return f"{', '.join(steps)} ({origin})"

    def _with_channels(self, pixels: np.ndarray) -> np.ndarray:
        have = len(pixels)
        if have == self.channels:
            return pixels
        if self.channels == 3 and have == 4:
            return pixels[:3]
        if have == 1:
            return np.repeat(pixels, self.channels, axis=0)
        if self.channels == 1 and have in (3, 4):
            return np.asarray(_pil(pixels[:3]).convert("L"))[None]
        raise DataError(f"images have {have} channels but the model takes {self.channels}")

    def _resized(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if pixels.shape[1:] == size:
            return pixels
        flipped = (size[1], size[0])  # PIL says width first
        return np.stack([np.asarray(_pil(c[None]).resize(flipped, self.resample)) for c in pixels])


def preprocessing(folder: str | Path) -> Preprocessing:
    """Return how images are prepared for the model in a folder.

    Read from `preprocessor_config.json`. Without one, images are resized to the `image_size` of
    `config.json` (if it says one) and scaled to [0, 1]; `str()` of the result says so.

    Args:
        folder: the model's folder or hub name.

    Returns:
        A function from a PIL image or uint8 array to a tensor [C, H, W].

    Raises:
        ModelError: the settings are damaged, or ask for a step that is not known here.
    """
    folder = model_folder(str(folder))
    config = model_config(folder)
    vision = config.get("vision_config") or {}
    channels = int(config.get("num_channels") or vision.get("num_channels") or 3)
    for path in preprocessor_files(folder):
        settings = read_json(path)
        settings = settings.get("image_processor", settings)
        if "size" in settings or "image_mean" in settings or "image_processor_type" in settings:
            try:
                return _from_settings(settings, channels, path.name)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise ModelError(f"{path} cannot be understood: {first_line(error)}") from error
    image_size = config.get("image_size") or vision.get("image_size")
    return Preprocessing(channels, None if image_size is None else _pair(image_size))


def _from_settings(settings: Mapping[str, Any], channels: int, origin: str) -> Preprocessing:
    kind = str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "")
    odd = next((word for word in _OTHER_STEPS if kind.startswith(word)), None)
    odd = odd or next(
        (k for k in ("do_flip_channel_order", "rescale_offset", "do_pad") if settings.get(k)), None
    )
    if odd:
        raise ModelError(
            f"{origin} asks for a step that is not known here ({odd}); "
            "prepare the images yourself and give them as floats in an .npz"
        )
    size = settings.get("size") if settings.get("do_resize", True) else None
    resize_to, crop = _size(size, kind.startswith(_SHORT_EDGE)), None
    if settings.get("do_center_crop") and settings.get("crop_size") is not None:
        crop = _pair(settings["crop_size"])
    if kind.startswith("ConvNe") and isinstance(resize_to, int):
        if resize_to < 384:  # as in the paper's evaluation: resize a little larger, then cut
            crop = crop or (resize_to, resize_to)
            resize_to = int(resize_to / float(settings.get("crop_pct") or 224 / 256))
        else:
            resize_to = (resize_to, resize_to)
    mean = std = None
    if settings.get("do_normalize", "image_mean" in settings):
        mean = _each(settings.get("image_mean", 0.5), channels)
        std = _each(settings.get("image_std", 0.5), channels)
    return Preprocessing(
        channels=channels,
        size=resize_to,
        crop=crop,
        resample=int(settings.get("resample", 2)),
        scale=float(settings.get("rescale_factor", 1 / 255))
        if settings.get("do_rescale", True)
        else 1.0,
        mean=mean,
        std=std,
        origin=origin,
    )


def _size(size: Any, short_edge: bool) -> tuple[int, int] | int | None:
    if size is None:
        return None
    if isinstance(size, Mapping) and size.get("shortest_edge") and not size.get("longest_edge"):
        return int(size["shortest_edge"])
    if isinstance(size, int) and short_edge:
        return size
    return _pair(size)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    if isinstance(size, (list, tuple)):
        height, width = size
        return int(height), int(width)
    return int(size), int(size)


def _each(values: Any, channels: int) -> tuple[float, ...]:
    """One value a channel; equal values for three channels serve a grey model too."""
    listed = [float(v) for v in values] if isinstance(values, (list, tuple)) else [float(values)]
    if len(listed) != channels:
        if len(set(listed)) != 1:
            raise ValueError(f"{len(listed)} means or deviations for {channels} channels")
        listed = listed[:1] * channels
    return tuple(listed)


def _target(size: tuple[int, int] | int, height: int, width: int) -> tuple[int, int]:
    if not isinstance(size, int):
        return size
    longer = int(size * max(height, width) / min(height, width))
    return (longer, size) if width <= height else (size, longer)


def _pixels(image: Any, channels: int) -> np.ndarray:
    """Pixels [C, H, W], uint8, of a PIL image or an array."""
    if hasattr(image, "convert"):
        if image.mode.startswith(("I", "F")):
            raise DataError(f"images must have 8 bits a channel, not PIL's mode {image.mode}")
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise DataError(f"no image: {array.dtype} values of shape {array.shape}")
    if array.ndim == 2:
        return array[None]
    usual = (1, 3, 4)
    first = array.shape[0] == channels or (array.shape[0] in usual and array.shape[2] not in usual)
    return array if first and not hasattr(image, "convert") else np.moveaxis(array, 2, 0)


def _pil(pixels: np.ndarray) -> Any:
    """A PIL image of pixels [1, H, W] or [3, H, W]."""
    array = pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)
    return need("PIL.Image").fromarray(np.ascontiguousarray(array))


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut from the centre; what lies outside the image is zero."""
    for axis, wanted in ((1, height), (2, width)):
        have = pixels.shape[axis]
        start = (have - wanted) // 2
        if start >= 0:
            pixels = np.take(pixels, range(start, start + wanted), axis)
        else:
            before = math.ceil((wanted - have) / 2)
            pad = [(0, 0)] * 3
            pad[axis] = (before, wanted - have - before)
            pixels = np.pad(pixels, pad)
    return pixels

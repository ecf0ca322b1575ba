"""A user's transformers image classifier: read from a folder or the hub, preprocess for, write back.

Only safetensors are read, nothing is unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import math
import re
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from expunge.core.errors import DataError, ExpungeError, ModelError, UserError
from expunge.core.hashing import plain

RECORD = "expunge-record.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_FILES = ["config.json", *PREPROCESSORS, _WEIGHTS, "model-*.safetensors", _INDEX]
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONVERT = (
    "expunge reads safetensors only; convert with model.save_pretrained(folder) in transformers"
)
# processors that do more than resize, crop, rescale and normalise
_OTHER_STEPS = ("EfficientNet", "ImageGPT", "Levit", "MobileViT", "PoolFormer", "Perceiver")
_SHORT_EDGE = ("CLIP", "ConvNe", "Bit", "MobileNet", "Siglip")


def load_image_classifier(folder_or_hub_name: str) -> nn.Module:
    """Read a transformers image classifier in the format of `save_pretrained`.

    Weights are brought to float32, since gradients and their squares underflow in half precision,
    and attention is computed by plain matrix products ("eager"), for which `torch.func.vmap` has
    batching rules; neither changes what is saved in `config.json` but the data type.

    Args:
        folder_or_hub_name: a folder, or a model's name on the Hugging Face hub.

    Returns:
        The model in eval mode; `model(pixel_values).logits` is [B, C].

    Raises:
        ModelError: there is no such model, or its files are missing, damaged, pickled, or do not
            hold every weight of an image classifier.
    """
    folder = model_folder(folder_or_hub_name)
    config = model_config(folder)
    _check_weights(folder)
    transformers = need("transformers")
    try:
        with quiet():
            model, info = transformers.AutoModelForImageClassification.from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, instead of a table on stderr
                attn_implementation="eager",
            )
    except Exception as error:  # whatever transformers meets in a foreign folder
        if "Unrecognized configuration class" in str(error):
            raise ModelError(
                f"{folder} holds a {config['model_type']} model, which is no image classifier"
            ) from error
        raise ModelError(
            f"{folder} cannot be read as an image classifier: {first_line(error)}"
        ) from error
    _refuse_invented(folder, info)
    model.float().eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the weights of {folder} hold NaN or infinite values in {name}")
    return model


def original_of(source: Mapping[str, Any]) -> nn.Module:
    """Return the original model that a record's `source` of kind `disk` names."""
    return load_image_classifier(str(source["model"]))


def save_image_classifier(
    model: nn.Module,
    out_folder: str | Path,
    source_folder: str | Path | None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model so that `from_pretrained` reads it; all of it appears at once or nothing does.

    Args:
        model: a transformers model.
        out_folder: a folder that does not exist yet or is empty.
        source_folder: where the original came from (folder or hub name); its preprocessor settings
            are copied.
        record: written beside the weights as `expunge-record.json`.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something, or the model is not a transformers model.
        ExpungeError: it cannot be written (read-only place, full disk).
    """
    out = check_out_folder(out_folder)
    save: Any = getattr(model, "save_pretrained", None)
    if save is None:
        raise ModelError(f"a {type(model).__name__} has no save_pretrained to write a folder with")
    copied = [] if source_folder is None else preprocessor_files(model_folder(str(source_folder)))
    made = [p for p in reversed(out.parents) if not p.exists()]
    part = out.parent / f".{out.name}-{uuid.uuid4().hex[:8]}.part"
    try:
        part.mkdir(parents=True)
        with quiet():
            save(str(part))
        for path in copied:
            shutil.copyfile(path, part / path.name)
        if record is not None:
            (part / RECORD).write_text(json.dumps(plain(record), indent=1) + "\n")
        part.replace(out)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise ExpungeError(f"{out} cannot be written: {first_line(error)}") from error
        raise
    return out


def check_out_folder(out_folder: str | Path) -> Path:
    """Return the resolved folder if a model may be written there; worth asking before long work.

    Raises:
        UserError: it is a file, or a folder that holds something.
    """
    out = Path(out_folder).expanduser().resolve()
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"{out} cannot be used: {first_line(error)}") from error
    if taken:
        raise UserError(f"{out} already exists and is not empty; choose another folder")
    return out


def model_folder(folder_or_hub_name: str) -> Path:
    """Return the local folder of a model, fetching its safetensors and settings from the hub.

    Raises:
        ModelError: it is neither a folder nor a model that the hub gives.
    """
    path = Path(folder_or_hub_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; give the folder that save_pretrained wrote")
    if not _HUB_NAME.fullmatch(folder_or_hub_name):
        raise ModelError(f"there is no model folder {folder_or_hub_name}")
    hub = need("huggingface_hub")
    try:
        with quiet():
            return Path(hub.snapshot_download(folder_or_hub_name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises its own, httpx' and OS errors
        missing = isinstance(error, hub.errors.RepositoryNotFoundError)
        reason = "has no such model" if missing else "cannot be reached"
        raise ModelError(
            f"there is no folder {folder_or_hub_name} here, and the Hugging Face hub {reason}"
        ) from error


def model_config(folder: Path) -> dict[str, Any]:
    """Return `config.json` of a model folder.

    Raises:
        ModelError: it is missing or damaged, or says no `model_type`.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds an adapter; merge it into its model and save that")
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} has no config.json; give a folder that save_pretrained wrote")
    config = _read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} does not say a model_type")
    return config


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a model's classes by number; transformers' default is two classes."""
    names = config.get("id2label") or {}
    count = len(names) or int(config.get("num_labels") or 2)
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]


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
        settings = _read_json(path)
        settings = settings.get("image_processor", settings)
        if "size" in settings or "image_mean" in settings or "image_processor_type" in settings:
            try:
                return _from_settings(settings, channels, path.name)
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise ModelError(f"{path} cannot be understood: {first_line(error)}") from error
    image_size = config.get("image_size") or vision.get("image_size")
    return Preprocessing(channels, None if image_size is None else _pair(image_size))


def preprocessor_files(folder: Path) -> list[Path]:
    """Return the preprocessor settings that lie in a model folder."""
    return [folder / name for name in PREPROCESSORS if (folder / name).exists()]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings, log lines and progress bars of transformers and its kin off stderr.

    Works on the whole process, as logging and warnings do; meant for short calls.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def need(package: str) -> Any:
    """Import a package of the `vision` extra.

    Raises:
        UserError: it is not installed.
    """
    if package in sys.modules:
        return sys.modules[package]
    try:
        with quiet():
            return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package} is not installed; pip install expunge[vision]") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no settings")
    return found


def _check_weights(folder: Path) -> None:
    """Open every weight file before transformers does, so that the error says what is wrong."""
    files = [folder / _WEIGHTS]
    if not files[0].exists() and (folder / _INDEX).exists():
        shards = _read_json(folder / _INDEX).get("weight_map") or {}
        files = [folder / Path(str(name)).name for name in sorted(set(shards.values()))]
    if not files or not files[0].exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise ModelError(f"the weights of {folder} are a pickle ({pickles[0]}); {_CONVERT}")
        raise ModelError(f"{folder} has no weights; it should hold {_WEIGHTS}")
    for path in files:
        start = b""
        try:
            with path.open("rb") as file:
                start = file.read(2)
            with safe_open(path, "pt"):
                pass
        except FileNotFoundError as error:
            raise ModelError(f"{folder} lacks a part of its weights, {path.name}") from error
        except SafetensorError as error:
            if start == b"PK" or start.startswith(b"\x80"):
                raise ModelError(f"{path} is a pickle under a wrong name; {_CONVERT}") from error
            raise ModelError(
                f"{path} is truncated or no safetensors file ({first_line(error)}); copy it again"
            ) from error
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {first_line(error)}") from error


def _refuse_invented(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose gaps transformers has filled with random numbers."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"the weights of {folder} lack {_named(missing)}; it is no trained image classifier"
        )
    mismatched = sorted(
        k if isinstance(k, str) else k[0] for k in info.get("mismatched_keys") or ()
    )
    if mismatched:
        raise ModelError(
            f"{_named(mismatched)} in the weights of {folder} has another shape than "
            "config.json says; are both of one model?"
        )


def _named(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


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

"""A user's transformers model: read from a folder or the hub, write back; image classifiers.

Only safetensors are read, nothing is unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from expunge.core.errors import ExpungeError, ModelError, UserError
from expunge.core.hashing import plain
from expunge.problems._foreign import first_line, need, quiet, read_json

RECORD = "expunge-record.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HUB_FILES = ("config.json", *PREPROCESSORS, _WEIGHTS, "model-*.safetensors", _INDEX)
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONVERT = (
    "expunge reads safetensors only; convert with model.save_pretrained(folder) in transformers"
)


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
    model = read_model(
        model_folder(folder_or_hub_name),
        "AutoModelForImageClassification",
        "image classifier",
        attention="eager",
    )
    return model.float()


def read_model(folder: Path, auto: str, what: str, *, attention: str | None = None) -> nn.Module:
    """Read a model of transformers in the data type of its file.

    Args:
        folder: with `config.json` and safetensors.
        auto: the class of transformers that chooses the architecture.
        what: what such a model is called in errors.
        attention: how attention is computed; by default as transformers chooses.

    Returns:
        The model in eval mode.

    Raises:
        ModelError: its files are missing, damaged, pickled, or do not hold every weight.
    """
    config = model_config(folder)
    _check_weights(folder)
    transformers = need("transformers")
    try:
        with quiet():
            model, info = getattr(transformers, auto).from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, instead of a table on stderr
                **({} if attention is None else {"attn_implementation": attention}),
            )
    except Exception as error:  # whatever transformers meets in a foreign folder
        if "Unrecognized configuration class" in str(error):
            raise ModelError(
                f"{folder} holds a {config['model_type']} model, which is no {what}"
            ) from error
        article = "an" if what[0] in "aeiou" else "a"
        raise ModelError(
            f"{folder} cannot be read as {article} {what}: {first_line(error)}"
        ) from error
    _refuse_invented(folder, info, what)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"the weights of {folder} hold NaN or infinite values in {name}")
    return model.eval()


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
    check_out_folder(out_folder)
    save: Any = getattr(model, "save_pretrained", None)
    if save is None:
        raise ModelError(f"a {type(model).__name__} has no save_pretrained to write a folder with")
    copied = [] if source_folder is None else preprocessor_files(model_folder(str(source_folder)))

    def fill(part: Path) -> None:
        with quiet():
            save(str(part))
        for path in copied:
            shutil.copyfile(path, part / path.name)
        if record is not None:
            (part / RECORD).write_text(json.dumps(plain(record), indent=1) + "\n")

    return write_folder(out_folder, fill)


def write_folder(out_folder: str | Path, fill: Callable[[Path], None]) -> Path:
    """Write a folder of which all appears at once or nothing does.

    Args:
        out_folder: does not exist yet or is empty.
        fill: writes into the folder it is given.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something.
        ExpungeError: it cannot be written (read-only place, full disk).
    """
    out = check_out_folder(out_folder)
    made = [p for p in reversed(out.parents) if not p.exists()]
    part = out.parent / f".{out.name}-{uuid.uuid4().hex[:8]}.part"
    try:
        part.mkdir(parents=True)
        fill(part)
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


def model_folder(
    folder_or_hub_name: str, *, files: Sequence[str] = _HUB_FILES, revision: str | None = None
) -> Path:
    """Return the local folder of a model, fetching its safetensors and settings from the hub.

    Args:
        folder_or_hub_name: a folder, or a model's name on the Hugging Face hub.
        files: patterns of the files to fetch.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: it is neither a folder nor a model that the hub gives.
    """
    path = Path(folder_or_hub_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; give the folder that save_pretrained wrote")
    if not HUB_NAME.fullmatch(folder_or_hub_name):
        raise ModelError(f"there is no model folder {folder_or_hub_name}")
    hub = need("huggingface_hub")
    try:
        with quiet():
            fetched = hub.snapshot_download(
                folder_or_hub_name, allow_patterns=list(files), revision=revision
            )
            return Path(fetched)
    except Exception as error:  # the hub's client raises its own, httpx' and OS errors
        reason = "cannot be reached"
        if isinstance(error, hub.errors.RepositoryNotFoundError):
            reason = "has no such model"
        elif isinstance(error, hub.errors.RevisionNotFoundError):
            reason = f"has no revision {revision} of it"
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
    config = read_json(folder / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} does not say a model_type")
    return config


def class_names(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a model's classes by number; transformers' default is two classes."""
    names = config.get("id2label") or {}
    count = len(names) or int(config.get("num_labels") or 2)
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]


def preprocessor_files(folder: Path) -> list[Path]:
    """Return the preprocessor settings that lie in a model folder."""
    return [folder / name for name in PREPROCESSORS if (folder / name).exists()]


def _check_weights(folder: Path) -> None:
    """Open every weight file before transformers does, so that the error says what is wrong."""
    files = [folder / _WEIGHTS]
    if not files[0].exists() and (folder / _INDEX).exists():
        shards = read_json(folder / _INDEX).get("weight_map") or {}
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


def _refuse_invented(folder: Path, info: Mapping[str, Any], what: str) -> None:
    """Refuse a checkpoint whose gaps transformers has filled with random numbers."""
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise ModelError(f"the weights of {folder} lack {_named(missing)}; it is no trained {what}")
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

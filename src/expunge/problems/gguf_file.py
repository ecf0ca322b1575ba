"""GGUF files: read once by transformers, kept as a folder of safetensors in the user's cache.

A quantised file becomes plain weights. The folder is named by the file's SHA-256 and the data type;
`EXPUNGE_CACHE` says where the cache is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from expunge.core.errors import ExpungeError, ModelError
from expunge.problems._foreign import first_line, need, quiet

_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def cache_folder() -> Path:
    """`$EXPUNGE_CACHE`, else the folder for caches on this platform."""
    own = os.environ.get("EXPUNGE_CACHE")
    if own:
        return Path(own).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "expunge"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home) / "expunge" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "expunge"


def converted(path: Path, change: Callable[[nn.Module], None], name: str) -> Path:
    """Return the folder of a GGUF file's weights and tokenizer, made the first time it is asked for.

    Args:
        path: the file.
        change: applied to the model before it is written, such as to another data type.
        name: of the change; each has its own folder.

    Raises:
        ModelError: transformers cannot read the file.
        ExpungeError: the cache cannot be written.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "gguf" / f"{digest[:32]}-{name.removeprefix('torch.')}"
    if folder.is_dir():
        return folder
    model, tokenizer = _read(path)
    change(model)
    part = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}.part"
    try:
        part.mkdir(parents=True)
        with quiet():
            model.save_pretrained(str(part))
            tokenizer.save_pretrained(str(part))
        with contextlib.suppress(OSError):  # another process was first
            part.replace(folder)
        if not folder.is_dir():
            raise ExpungeError(f"{folder} cannot be written")
    except (OSError, SafetensorError) as error:
        raise ExpungeError(
            f"the cache {folder.parent} cannot be written: {first_line(error)}; set EXPUNGE_CACHE"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _read(path: Path) -> tuple[Any, Any]:
    transformers = need("transformers", "llm")
    need("gguf", "llm")
    place = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), **place)
            found = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), **place)
            config = found.config
            # the weights are plain now, which transformers does not take for granted
            vars(config).pop("quantization_config", None)
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.load_state_dict(found.state_dict())
            model.generation_config = found.generation_config
    except Exception as error:  # whatever transformers meets in a foreign file
        raise ModelError(
            f"{path} cannot be read as a causal language model: {first_line(error)}"
        ) from error
    return model.eval(), tokenizer

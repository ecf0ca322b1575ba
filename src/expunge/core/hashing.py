"""Content hashes: one canonical JSON form, one hash for weights, one for arrays.

Every cache key and every record rests on these functions, so equal content gives equal keys on
every machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """Turn a value into JSON types: dataclasses to dicts, tuples and sets to lists, NaN to None.

    Args:
        value: anything made of dataclasses, mappings, sequences, paths, arrays and scalars.

    Returns:
        The same content as dict, list, str, int, float, bool or None.

    Raises:
        TypeError: for a type without a JSON form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().tolist())  # NumPy has no bfloat16
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, int, bool)):
        return value
    raise TypeError(f"no JSON form for {type(value).__name__}")


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def content_key(value: Any) -> str:
    """Return the SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors by name, dtype, shape and bytes; the order of insertion does not matter.

    Args:
        tensors: a state dict or any mapping of names to tensors.

    Returns:
        SHA-256 in hex. Equal if and only if every name, dtype, shape and bit is equal.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
        if tensor.numel():  # an empty array from NumPy has strides that `view` refuses
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_function(function: Any) -> str:
    """Hash what a function does: its code, constants, defaults and the values it closes over.

    Values without a JSON or tensor form enter by their `repr`; where that names an address, equal
    functions of two interpreters differ, so that at worst something is computed again.
    """
    if isinstance(function, functools.partial):
        return content_key([
            "partial",
            hash_function(function.func),
            _held(function.args),
            _held(function.keywords),
        ])
    bound = getattr(function, "__self__", None)
    inner = getattr(function, "__func__", function)
    code = getattr(inner, "__code__", None)
    if code is None:
        return content_key([
            type(function).__qualname__,
            _held(getattr(function, "__dict__", {})),
            repr(type(function)),
        ])
    cells = [c.cell_contents for c in (inner.__closure__ or ()) if _filled(c)]
    named = {n: inner.__globals__[n] for n in code.co_names if n in inner.__globals__}
    return content_key([
        _code(code),
        _held(cells),
        _held(inner.__defaults__),
        _held(named),
        _held(bound),
    ])


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]


def _held(value: Any, depth: int = 0) -> Any:
    """A value that a function holds, as JSON types; functions by their code, two levels deep."""
    if isinstance(value, Tensor):
        return hash_tensors({"value": value})
    if isinstance(value, torch.nn.Module):
        return [str(value), hash_model(value)]
    if isinstance(value, Mapping):
        return {str(k): _held(v, depth) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_held(v, depth) for v in value]
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    code = getattr(value, "__code__", None)
    if code is not None:
        return _code(code)
    try:
        return plain(value)
    except TypeError:
        return repr(value)


def hash_model(model: torch.nn.Module) -> str:
    """Hash a model's state dict, parameters and buffers alike."""
    return hash_tensors({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})


_ASIDE = {
    "training",
    "name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "gradient_checkpointing",
}
"""Attributes of modules and entries of configs that change no output."""


def beside_weights(model: torch.nn.Module) -> dict[str, Any]:
    """What a model computes with that neither its state dict nor its printed form shows.

    Returns:
        A hash of the buffers that are not saved, and by module the numbers and words among its attributes
        (such as heads or a temperature) and the entries of a transformers config.
    """
    saved = model.state_dict(keep_vars=True)
    found: dict[str, Any] = {
        "buffers": hash_tensors({n: b for n, b in model.named_buffers() if n not in saved})
    }
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        said = config.to_dict() if hasattr(config, "to_dict") else {}
        found[f"module {name}"] = [_visible(vars(module)), _visible(said)]
    return found


def _visible(values: Mapping[str, Any]) -> dict[str, Any]:
    """What has a JSON or tensor form under a public name."""
    kept = {}
    for name, value in values.items():
        if str(name).startswith("_") or name in _ASIDE:
            continue
        if isinstance(value, (Tensor, np.ndarray)):
            kept[str(name)] = hash_array(value)
            continue
        try:
            kept[str(name)] = plain(value)
        except TypeError:
            continue  # a module's parts come under their own names
    return kept


def hash_array(values: Tensor | np.ndarray) -> str:
    """Hash an array of numbers, words or anything with a JSON form by type, shape and content."""
    if isinstance(values, Tensor):
        return hash_tensors({"value": values})
    if values.dtype.kind == "O":
        return content_key(values.tolist())
    head = canonical([values.dtype.str, list(values.shape)])
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()

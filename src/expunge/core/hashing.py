"""Content hashes: one canonical JSON form, one hash for weights, one for arrays.

Every cache key and every record rests on these functions, so equal content gives equal keys on
every machine.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
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
        tensor = tensors[name].detach()
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
        if tensor.layout is not torch.strided:
            full = tensor.to_sparse_coo().coalesce()
            parts = {"indices": full.indices(), "values": full.values()}
            digest.update(hash_tensors(parts).encode())
            continue
        tensor = tensor.cpu().contiguous()
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
    if isinstance(function, types.BuiltinFunctionType):  # torch.tanh is all but its name torch.relu
        return content_key(["builtin", function.__module__, function.__qualname__])
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
    constants = [_code(c) if isinstance(c, types.CodeType) else _said(c) for c in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]


def _said(constant: Any) -> str:
    if isinstance(constant, frozenset):  # its own order is another in every interpreter
        return f"frozenset({sorted(map(_said, constant))})"
    return repr(constant)


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
_LIBRARIES = {"torch", "torchvision", "torch_geometric", "transformers", "diffusers", "peft", "timm", "accelerate", "expunge"}  # fmt: skip
"""Packages whose code does not belong to the user, and whose private attributes come and go."""
_WRITTEN = (
    complex, bytes, slice, range, enum.Enum, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal,
    torch.dtype, torch.device,
)  # fmt: skip
"""Types without a JSON form whose `repr` is their content."""


def beside_weights(model: torch.nn.Module) -> dict[str, Any]:
    """What a model computes with that neither its state dict nor its printed form shows.

    Returns:
        A hash of the buffers that are not saved, and by module the numbers, words, arrays and functions among
        its attributes (such as heads, a temperature or an activation), the entries of a transformers config, and
        the code of a class that is the user's own.
    """
    saved = model.state_dict(keep_vars=True)
    found: dict[str, Any] = {
        "buffers": hash_tensors({n: b for n, b in model.named_buffers() if n not in saved})
    }
    codes: dict[type, Any] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind not in codes:
            codes[kind] = _own_code(kind)
        config: Any = getattr(module, "config", None)
        said = _settings(config.to_dict()) if hasattr(config, "to_dict") else {}
        found[f"module {name}"] = [_visible(vars(module), own=bool(codes[kind])), said, codes[kind]]
    return found


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a config and of those within it, such as that of a vision tower."""
    parts = {n: v for n, v in config.items() if isinstance(v, Mapping) and not _aside(n)}
    return _visible(config) | {str(n): _settings(v) for n, v in parts.items()}


def _aside(name: Any) -> bool:
    return str(name).startswith("_") or name in _ASIDE


def _visible(values: Mapping[str, Any], *, own: bool = False) -> dict[str, Any]:
    """What has a JSON or tensor form under a public name; in a class of one's own numbers and words under any."""
    kept = {}
    for name, value in values.items():
        private = own and str(name).startswith("_") and not str(name).startswith("_is_hf")
        if _aside(name) and not (private and isinstance(value, (int, float, str))):
            continue
        try:
            kept[str(name)] = _form(value)
        except (TypeError, RecursionError):
            continue  # a module's parts come under their own names
    return kept


def _form(value: Any) -> Any:
    """An attribute as JSON types.

    Raises:
        TypeError: it has no form that is the same in every interpreter.
    """
    if isinstance(value, Tensor) and value.is_meta:
        return [str(value.dtype), list(value.shape)]
    if isinstance(value, (Tensor, np.ndarray)):
        return hash_array(value)
    if isinstance(value, _WRITTEN):
        return repr(value)
    if isinstance(value, functools.partial):
        return [_form(value.func), _form(value.args), _form(value.keywords)]
    if isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        return [value.__module__, value.__qualname__, _own(value) and _code(value.__code__)]  # type: ignore[union-attr]
    if isinstance(value, Mapping):
        return {str(k): _element(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_element(v) for v in value]
    if isinstance(value, torch.nn.Module) or hasattr(value, "to_dict"):
        raise TypeError("a module or a config has entries of its own")
    return plain(value)


def _element(value: Any) -> Any:
    """The form of an entry, or its type's name where there is none."""
    try:
        return _form(value)
    except TypeError:
        return type(value).__qualname__


def _own(made: Any) -> bool:
    """Whether a class or function is the user's: written in Python, and not in a library known here."""
    place = (getattr(made, "__module__", None) or "").partition(".")[0]
    python = isinstance(made, type) or hasattr(made, "__code__")
    return python and place not in _LIBRARIES | {"builtins"}


def _own_code(kind: type) -> dict[str, Any]:
    """Code of the functions that a class and its parents define, as far as they are the user's."""
    found = {}
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items() if _own(base) else ():
            inner = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(inner, types.FunctionType):
                found[name] = _code(inner.__code__)
    return found


def hash_array(values: Tensor | np.ndarray) -> str:
    """Hash an array of anything by type, shape and content; what has no form by its type's name."""
    if isinstance(values, Tensor):
        return hash_tensors({"value": values})
    if values.dtype.hasobject or values.dtype.kind == "T":  # their bytes are addresses
        entries = values.tolist()
        if not all(isinstance(v, (str, int)) for v in entries):
            entries = _form(entries)
        return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()
    head = canonical([values.dtype.str, list(values.shape)])
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()

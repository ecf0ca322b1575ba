r"""The choice `train=lora(R)`: low-rank adapters, \(W + \frac{\alpha}{R} B A\), through peft.

The original's weights stay as they are, so the original is the model with its adapters off: a
reference that takes no second copy.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from expunge.core.errors import ModelError, NeedsError, SettingError
from expunge.core.outcome import Adapter
from expunge.core.pruned import kept_of
from expunge.core.runtime import random_restored
from expunge.train.masks import Roles, parse

_CONFIG = "config.json"


def is_lora(spec: str) -> bool:
    """Whether a `train=` setting asks for adapters."""
    return parse(spec)[0] == "lora"


def attach(
    spec: str, model: nn.Module, roles: Roles, seed: int, *, alpha: int | None = None
) -> nn.Module:
    """Put adapters on a model in place; they alone can move afterwards, and begin as the identity.

    Args:
        spec: `lora(R)`: rank R on all linear layers of the blocks; `lora(R, NAME)`: on the modules
            that play a role.
        model: the model.
        roles: a view or a problem.
        seed: of the matrices A; B begins at 0.
        alpha: α; 2 R by default.

    Returns:
        The model.

    Raises:
        SettingError: the model is pruned, which adapters would undo.
        NeedsError: nothing plays the role, or peft is not installed.
    """
    rank, _, role = parse(spec)[1].partition(",")
    if kept_of(model) is not None:
        raise SettingError(f"train={spec!r}: adapters would fill the zeros of a pruned model")
    modules = roles.role(role.strip() or "linear")
    return _inject(
        model, {"rank": int(rank), "alpha": alpha or 2 * int(rank), "modules": modules}, seed
    )


def adapter_of(model: nn.Module) -> Adapter:
    """The adapters of a model as a change that can be stored.

    Raises:
        ModelError: it has none.
    """
    layers = _layers(model)
    if not layers:
        raise ModelError("the model has no adapters")
    first = next(iter(layers.values()))
    config = {
        "rank": first.r["default"],
        "alpha": first.lora_alpha["default"],
        "modules": list(layers),
    }
    tensors = {n: v.detach().cpu().clone() for n, v in model.state_dict().items() if ".lora_" in n}
    text = torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)
    return Adapter(tensors | {_CONFIG: text})


def put_on(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Apply stored adapters to a model in place and return it.

    Raises:
        ModelError: the model lacks a layer, or has it in another size.
    """
    config = json.loads(bytes(tensors[_CONFIG].tolist()))
    names = dict(model.named_modules())
    missing = [n for n in config["modules"] if n not in names]
    if missing:
        raise ModelError(f"the model has no layer {missing[0]!r}; is it the one adapted?")
    _inject(model, config, 0)
    values = {n: v for n, v in tensors.items() if n != _CONFIG}
    state = model.state_dict()
    for name, value in values.items():
        if name not in state or state[name].shape != value.shape:
            raise ModelError(f"adapter {name!r} does not fit the model; is it the one adapted?")
    model.load_state_dict(values, strict=False)
    return model.eval()


def matrices(tensors: Mapping[str, Tensor]) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """α / R of stored adapters, and A [R, in] and B [out, R] by module."""
    config = json.loads(bytes(tensors[_CONFIG].tolist()))
    found = {
        module: (tensors[_matrix(module, "A")], tensors[_matrix(module, "B")])
        for module in config["modules"]
    }
    return config["alpha"] / config["rank"], found


def of_matrices(scale: float, found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Adapters as they are stored; undoes `matrices`."""
    rank = len(next(iter(found.values()))[0])
    config = {"rank": rank, "alpha": scale * rank, "modules": list(found)}
    tensors = {
        _matrix(module, name): matrix
        for module, pair in found.items()
        for name, matrix in zip("AB", pair, strict=True)
    }
    text = torch.frombuffer(bytearray(json.dumps(config).encode()), dtype=torch.uint8)
    return tensors | {_CONFIG: text}


def _matrix(module: str, name: str) -> str:
    return f"{module}.lora_{name}.default.weight"


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Let a model be the original for a while."""
    layers = list(_layers(model).values())
    if not layers:
        raise NeedsError("the model has no adapters to switch off")
    kept = [layer._disable_adapters for layer in layers]
    for layer in layers:
        # the public switch would also stop gradients of a forward pass that is already done
        layer._disable_adapters = True
    try:
        yield model
    finally:
        for layer, was in zip(layers, kept, strict=True):
            layer._disable_adapters = was


def has_adapters(model: nn.Module) -> bool:
    """Whether a model carries adapters."""
    return bool(_layers(model))


def merged(model: nn.Module) -> nn.Module:
    """Copy a model with its adapters added into the weights, as the architecture it came from."""
    model = copy.deepcopy(model)
    for name, layer in _layers(model).items():
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    vars(model).pop("peft_config", None)  # it has none any more, and may get new ones
    return model


def save_peft(model: nn.Module, folder: str | Path, base: str = "") -> Path:
    """Write adapters as peft reads them: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: a model with adapters.
        folder: created if it is not there.
        base: name or path of the model they belong to.

    Returns:
        The folder.
    """
    layers = _layers(model)
    first = next(iter(layers.values()))
    config = _peft_config(first.r["default"], first.lora_alpha["default"], list(layers))
    config.base_model_name_or_path, config.task_type = base or None, "CAUSAL_LM"
    config.inference_mode = True
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{n.replace('.default.', '.')}": v.detach().cpu().contiguous()
        for n, v in model.state_dict().items()
        if ".lora_" in n
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def _inject(model: nn.Module, config: Mapping[str, Any], seed: int) -> nn.Module:
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise NeedsError("train=lora needs peft; pip install 'expunge[llm]'") from error
    with random_restored():
        torch.manual_seed(seed)
        inject_adapter_in_model(
            _peft_config(config["rank"], config["alpha"], config["modules"]), model
        )
    return model


def _peft_config(rank: int, alpha: int, modules: Sequence[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=list(modules)
    )


def _layers(model: nn.Module) -> dict[str, Any]:
    """Adapted layers by name; empty without looking at peft where nothing is adapted."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "r")}

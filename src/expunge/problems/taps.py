"""Taps: outputs of named layers, read through hooks that are always removed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from expunge.core.errors import ModelError

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.MultiheadAttention)


def leaf_layers(model: nn.Module) -> list[str]:
    """Names of the linear, convolution and layer-norm modules in order of definition."""
    return [
        name
        for name, module in model.named_modules()
        # attention applies this one itself, so that its output never shows
        if isinstance(module, _LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear)
    ]


def read_taps(
    model: nn.Module,
    layers: list[str],
    forward: Callable[[nn.Module], Any],
    *,
    flat: bool = True,
) -> dict[str, Tensor]:
    """Run `forward(model)` and collect the outputs of named layers.

    Args:
        model: the model.
        layers: module names as in `named_modules`.
        forward: runs the model once.
        flat: flatten beyond the batch dimension.

    Returns:
        One tensor a layer: [B, d] if flattened, else [B, …].

    Raises:
        ModelError: a layer does not exist, or was not run.
    """
    modules = _modules(model)
    found: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            found[name] = tensor.flatten(1) if flat else tensor

        return hook

    try:
        for name in layers:
            if name not in modules:
                raise ModelError(f"the model has no layer {name!r}")
            handles.append(modules[name].register_forward_hook(keep(name)))
        forward(model)
    finally:
        for handle in handles:
            handle.remove()
    unused = [name for name in layers if name not in found]
    if unused:
        raise ModelError(f"layer {unused[0]!r} was not run by the model")
    return found


def penultimate(
    model: nn.Module, last: str, forward: Callable[[nn.Module], Any], *, flat: bool = True
) -> Tensor:
    """Return the input of the last layer `last` in one forward pass.

    Args:
        model: the model.
        last: name of its last layer.
        forward: runs the model once.
        flat: flatten beyond the batch dimension.

    Returns:
        [B, d] if flattened, else [B, …, d].

    Raises:
        ModelError: the layer does not exist, or was not run.
    """
    module = _modules(model).get(last)
    if module is None:
        raise ModelError(f"the model has no layer {last!r}")
    found: list[Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _m, inputs: found.append(inputs[0].flatten(1) if flat else inputs[0])
    )
    try:
        forward(model)
    finally:
        handle.remove()
    if not found:
        raise ModelError(f"layer {last!r} was not run by the model")
    return found[-1]  # a gate may have run the model before, to look at prompts


def innermost(model: nn.Module) -> nn.Module:
    """The model inside all its wrappers; the model itself where there is none."""
    while isinstance(inside := getattr(model, "unwrapped", None), nn.Module):
        model = inside
    return model


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names they have in the original; a wrapper says what it is around."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return dict(innermost(model).named_modules())

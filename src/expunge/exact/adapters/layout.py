"""How the weights of layers are laid out, and one order that all of them can be brought into.

Linear layers hold `[out, in]`, transformers' `Conv1D` `[in, out]`, convolutions `[out, in/groups, k…]`,
transposed convolutions `[in, out/groups, k…]`. Here every one is `[out, in/groups, k…]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

_CONVOLUTIONS = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd


def is_dense(module: nn.Module) -> bool:
    """Whether a module is linear or a convolution, of any kind, with a plain weight.

    A weight that `torch.nn.utils.parametrize` or `weight_norm` computes is none that a map could change.
    """
    known = isinstance(module, (nn.Linear, _CONVOLUTIONS)) or _is_conv1d(module)
    return known and module._parameters.get("weight") is not None


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises and then scales and shifts channels."""
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats


def _is_conv1d(module: nn.Module) -> bool:
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.")
        for c in type(module).__mro__
    )


def channels(module: nn.Module) -> int:
    """Count the output channels of a dense layer or a normalisation."""
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[0])
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    return Layout.of(module).sizes[0]


@dataclass(frozen=True)
class Layout:
    """Sizes (out, in/groups, k…) of a dense layer, and how its own weight orders them."""

    sizes: tuple[int, ...]
    order: Literal["same", "swapped", "transposed"] = "same"
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Self:
        """Read a dense layer's layout."""
        shape = tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]
        if _is_conv1d(module):
            return cls((shape[1], shape[0]), "swapped")
        if isinstance(module, _TRANSPOSED):
            inputs = module.in_channels // module.groups
            return cls((module.out_channels, inputs, *shape[2:]), "transposed", module.groups)
        return cls(shape, groups=getattr(module, "groups", 1))

    def native(self, weight: Tensor) -> Tensor:
        """Bring a tensor [out, in/groups, k…] into the order of the layer's own weight."""
        if self.order == "swapped":
            return weight.T
        if self.order == "transposed":
            split = weight.unflatten(0, (self.groups, self.sizes[0] // self.groups))
            return split.transpose(1, 2).flatten(0, 1)
        return weight


def new(module: nn.Module, *shape: int, value: float = 0.0) -> nn.Parameter:
    """Make a constant parameter for a module's map, in at least float32 and where the module is."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    like = own[0] if own else torch.zeros(())
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else None
    return nn.Parameter(torch.full(shape, value, dtype=dtype, device=like.device))

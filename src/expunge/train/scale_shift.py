r"""The choice `train=scale_shift()`: one scale and one shift for every channel (SSF, Lian et al. 2022).

\[ W' = \mathrm{diag}(\gamma) W, \quad b' = \gamma \odot b + \beta \]

so that a layer's output becomes \(\gamma \odot y + \beta\). Both are folded into the weights when the
training ends: what comes out is the architecture that went in. (Slices of a sharded model keep them
apart, see `exact/adapters`.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from expunge.core.errors import SettingError
from expunge.train.masks import Roles, owners, parse

_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class Scale(nn.Module):
    """Scales a weight's output channels."""

    def __init__(self, gamma: nn.Parameter, axis: int) -> None:
        """Take γ [C] and the axis of the output channels."""
        super().__init__()
        self.gamma, self.axis = gamma, axis

    def forward(self, weight: Tensor) -> Tensor:
        """γ ⊙ W along the axis."""
        shape = [-1 if d == self.axis else 1 for d in range(weight.dim())]
        return (self.gamma.view(shape) * weight).to(weight.dtype)


class ScaleShift(nn.Module):
    """Scales and shifts a bias."""

    def __init__(self, gamma: nn.Parameter, beta: nn.Parameter) -> None:
        """Take γ [C], shared with the weight's, and β [C]."""
        super().__init__()
        self.gamma, self.beta = gamma, beta

    def forward(self, bias: Tensor) -> Tensor:
        """γ ⊙ b + β."""
        return (self.gamma * bias + self.beta).to(bias.dtype)


def is_scale_shift(spec: str) -> bool:
    """Whether a `train=` setting asks for scales and shifts."""
    return parse(spec)[0] == "scale_shift"


def attach(spec: str, model: nn.Module, roles: Roles) -> list[str]:
    """Put γ = 1 and β = 0 on layers in place; they alone can move afterwards.

    Args:
        spec: `scale_shift()`: linear layers, convolutions and normalisations, but for a layer whose weight
            is another's too, as a tied embedding's; `scale_shift(NAME)`: those that play a role.
        model: the model; to the bit what it was.
        roles: a view or a problem.

    Returns:
        Names of the layers. One without bias is only scaled, so that the architecture stays.

    Raises:
        SettingError: there is no such layer, or a weight is another layer's too.
        NeedsError: nothing plays the role.
    """
    role = parse(spec)[1].strip()
    shared = {name for held in owners(model).values() if len(held) > 1 for name, _ in held}
    inside = tuple(roles.role(role)) if role else None
    found = {
        name: module
        for name, module in model.named_modules()
        if _axis(module) is not None
        and (name not in shared if inside is None else _within(name, inside))
    }
    if not found:
        raise SettingError(
            f"train={spec!r}: there is no linear, convolution or normalisation layer"
        )
    if tied := sorted(shared & found.keys()):
        raise SettingError(
            f"train={spec!r}: the weight of {tied[0]} is another module's too, and would be scaled there"
        )
    model.requires_grad_(False)
    for module in found.values():
        axis, weight = _axis(module), module.weight
        assert axis is not None
        assert isinstance(weight, Tensor)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        gamma = nn.Parameter(torch.ones(weight.shape[axis], dtype=dtype, device=weight.device))
        parametrize.register_parametrization(module, "weight", Scale(gamma, axis), unsafe=True)
        if getattr(module, "bias", None) is not None:
            beta = nn.Parameter(torch.zeros_like(gamma))
            parametrize.register_parametrization(
                module, "bias", ScaleShift(gamma, beta), unsafe=True
            )
    return list(found)


def is_attached(model: nn.Module) -> bool:
    """Whether a model carries scales."""
    return any(isinstance(m, Scale) for m in model.modules())


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Write the scales and shifts of a model into its weights in place and return it."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module, "weight") or not _ours(module):
            continue
        names = [n for n in ("weight", "bias") if parametrize.is_parametrized(module, n)]
        values = {name: getattr(module, name).detach().clone() for name in names}
        # torch's own way back takes the names out of a class that copies of the module share
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value))
    return model.requires_grad_(True)


def _ours(module: nn.Module) -> bool:
    return isinstance(module.parametrizations["weight"][0], Scale)  # type: ignore[union-attr, index]


def _axis(module: nn.Module) -> int | None:
    """The axis of a layer's output channels in its weight; None where it cannot be scaled."""
    if not isinstance(module._parameters.get("weight"), Tensor):  # none, or a parametrization's
        return None
    if isinstance(module, _DENSE) or (isinstance(module, _NORMS) and module.weight.dim() == 1):
        return 0
    # transformers' own, of GPT-2, keeps its weight the other way round
    return 1 if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in modules)

r"""SSF: a scale and a shift for every channel (Lian et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError
from expunge.exact.adapters.base import fill, insert, named
from expunge.exact.adapters.layout import Layout, channels, is_dense, is_norm, new
from expunge.exact.adapters.maps import Map


@dataclass(frozen=True)
class ScaleShift:
    r"""Maps \(W' = \mathrm{diag}(\gamma) W,\ b' = \gamma \odot b + \beta\) over output channels.

    The output of the layer becomes \(\gamma \odot y + \beta\): for linear layers, convolutions with any
    padding and groups, layer normalisation and evaluated batch normalisation. The axis follows from
    the kind of layer, never from shapes, so a feature map with as many columns as channels is scaled
    along its channels. A layer without bias gets one. Folding into the *following* convolution is not
    offered: with zero padding it is wrong at the borders.

    Attributes:
        init: `identity` (γ = 1, β = 0, the base to the bit) or `paper`
            (γ from N(1, 0.02²), β from N(0, 0.02²): not quite the base at first).
    """

    name: ClassVar[str] = "scale-shift"
    usage: ClassVar[str] = "scale-shift or scale-shift(paper)"

    init: Literal["identity", "paper"] = "identity"

    def __post_init__(self) -> None:
        if self.init not in ("identity", "paper"):
            raise SettingError(f"init={self.init!r} should be identity or paper")

    @classmethod
    def of(cls, given: Sequence[str]) -> Self:
        """Read `scale-shift` or `scale-shift(paper)`."""
        return cls(*given)  # type: ignore[arg-type]

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is linear, a convolution, or normalises channels."""
        return is_dense(module) or is_norm(module)

    def attach(self, model: nn.Module, modules: Sequence[str], group: str, seed: int) -> None:
        """Put untrained maps on modules as a new group; see `SliceAdapter`.

        Raises:
            SettingError: the group's name is taken or cannot be one.
            ModelError: a module is missing, or its channels cannot be scaled and shifted.
        """
        generator = torch.Generator().manual_seed(seed)
        maps: dict[str, Map] = {}
        for name, module in named(model, modules).items():
            maps[name] = one = self._blank(module, name)
            if self.init == "paper":
                noise = torch.randn(2, len(one.gamma), generator=generator) * 0.02
                one.gamma.data.copy_(1 + noise[0])
                one.beta.data.copy_(noise[1])
        insert(model, group, maps)

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Map:
        """Make one module's map from stored γ and β.

        Raises:
            ModelError: they do not fit the module.
        """
        return fill(self._blank(module, type(module).__name__), tensors)

    def _blank(self, module: nn.Module, name: str) -> ScaleShiftMap:
        if not self.fits(module):
            raise ModelError(
                f"{name} is neither linear, a convolution, layer normalisation nor batch "
                "normalisation with running statistics; a scale and shift could not be merged"
            )
        return ScaleShiftMap(module)


class ScaleShiftMap(Map):
    """Scales and shifts a layer's output channels by way of its weights."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layout = Layout.of(module) if is_dense(module) else None
        self.gamma = new(module, channels(module), value=1.0)
        self.beta = new(module, channels(module))

    def change(self, name: str, value: Tensor | None) -> Tensor | None:
        """Scale the weight; scale and shift the bias. A normalisation without weight has ones."""
        if name == "weight":
            if value is None:
                return self.gamma
            if self.layout is None:
                return self.gamma.to(value.dtype) * value
            column = self.gamma.view(-1, *[1] * (len(self.layout.sizes) - 1))
            return self.layout.native(column.expand(self.layout.sizes)).to(value.dtype) * value
        if value is None:
            return self.beta
        return (self.gamma * value + self.beta).to(value.dtype)


def composed(first: ScaleShiftMap, second: ScaleShiftMap) -> tuple[Tensor, Tensor]:
    r"""One scale and shift that do what two do in turn: \((\gamma_2\gamma_1,\ \beta_2 + \gamma_2\beta_1)\)."""
    return second.gamma * first.gamma, second.beta + second.gamma * first.beta

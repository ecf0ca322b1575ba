r"""FLoRA: a small core tensor with one factor for each axis of the weight (Si et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError
from expunge.exact.adapters.base import fill, insert, named
from expunge.exact.adapters.layout import Layout, is_dense, new
from expunge.exact.adapters.maps import Map


@dataclass(frozen=True)
class Tucker:
    r"""Maps \(W' = W + s\, G \times_1 A_1 \times_2 A_2 \cdots\) with a core G of as many axes as W.

    \[\Delta W_{oikl} = s \sum_{abcd} G_{abcd}\, (A_1)_{ia} (A_2)_{ob} (A_3)_{kc} (A_4)_{ld}\]

    Axes and ranks come in the order of the paper's code: input channels (of one group), output
    channels, kernel. For a linear layer this is \(s\,A_2 G^\top A_1^\top\): LoRA with a core. G begins at
    0, so the map is the identity to the bit and at first only G has a gradient; the factors are
    normal with deviation \(1/\sqrt{2 r_i}\) (Kaiming with slope √3 over r_i columns).

    Attributes:
        ranks: r by axis; what a layer's axes do not reach is cut off, and a linear layer takes the
            first two. By default 8, 8 and the whole kernel.
        scale: s; by default 4 for convolutions and 1 for linear layers.
    """

    name: ClassVar[str] = "tucker"
    usage: ClassVar[str] = "tucker or tucker(IN,OUT) or tucker(IN,OUT,K,K)"

    ranks: tuple[int, ...] = ()
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.ranks and (len(self.ranks) < 2 or min(self.ranks) < 1):
            raise SettingError(
                f"ranks={self.ranks}: ranks are counts from 1, for inputs, outputs and kernel"
            )

    @classmethod
    def of(cls, given: Sequence[str]) -> Self:
        """Read `tucker(IN,OUT,…)`."""
        return cls(tuple(map(int, given)))

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is linear or a convolution."""
        return is_dense(module)

    def attach(self, model: nn.Module, modules: Sequence[str], group: str, seed: int) -> None:
        """Put untrained maps on modules as a new group; see `SliceAdapter`.

        Raises:
            SettingError: the group's name is taken or cannot be one, or a kernel has more axes than
                there are ranks.
            ModelError: a module is missing, or is neither linear nor a convolution.
        """
        generator = torch.Generator().manual_seed(seed)
        maps: dict[str, Map] = {}
        for name, module in named(model, modules).items():
            maps[name] = one = self._blank(module, name)
            for factor in one.factors():
                values = torch.randn(factor.shape, generator=generator)
                factor.data.copy_(values / math.sqrt(2 * factor.shape[1]))
        insert(model, group, maps)

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Map:
        """Make one module's map from a stored core and factors.

        Raises:
            ModelError: they do not fit the module.
        """
        return fill(self._blank(module, type(module).__name__), tensors)

    def _blank(self, module: nn.Module, name: str) -> TuckerMap:
        if not is_dense(module):
            raise ModelError(f"{name} is neither linear nor a convolution; FLoRA needs axes")
        out, inputs, *kernel = Layout.of(module).sizes
        axes = (inputs, out, *kernel)
        wanted = self.ranks or (8, 8, *kernel)
        if len(wanted) < len(axes):
            raise SettingError(f"{name} has {len(axes)} axes and the adapter {len(wanted)} ranks")
        scale = self.scale if self.scale is not None else 4.0 if kernel else 1.0
        return TuckerMap(module, tuple(map(min, wanted, axes)), scale)


class TuckerMap(Map):
    """Adds a Tucker product to a weight."""

    def __init__(self, module: nn.Module, ranks: tuple[int, ...], scale: float) -> None:
        """Make a map of zeros, in at least float32, where the module's weight is."""
        super().__init__()
        self.layout = Layout.of(module)
        out, inputs, *kernel = self.layout.sizes
        self.core = new(module, *ranks)
        for number, (size, rank) in enumerate(
            zip((inputs, out, *kernel), ranks, strict=True), start=1
        ):
            self.register_parameter(f"A{number}", new(module, size, rank))
        self.scale = scale

    def factors(self) -> list[nn.Parameter]:
        """Return A_1, A_2, …: inputs, outputs, kernel."""
        return [getattr(self, f"A{n}") for n in range(1, self.core.dim() + 1)]

    def update(self) -> Tensor:
        """Multiply the core out: [out, in/groups, k…]."""
        product: Tensor = self.core
        for factor in self.factors():
            # takes the first axis away and puts the new one last: after all of them, in order
            product = torch.tensordot(product, factor, dims=([0], [1]))
        return self.scale * product.transpose(0, 1)

    def change(self, name: str, value: Tensor | None) -> Tensor | None:
        """Add the product to the weight; a bias stays."""
        if name != "weight" or value is None:
            return value
        return value + self.layout.native(self.update()).to(value.dtype)

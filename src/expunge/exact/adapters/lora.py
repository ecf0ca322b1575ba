r"""LoRA: a product of two thin matrices added to a weight (Hu et al. 2021)."""

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
class LoRA:
    r"""Low-rank maps \(W' = W + s\,B A\) with \(B\ [out, R]\) and \(A\ [R, in/groups \cdot k \cdots]\).

    A convolution's kernel is flattened beside its input channels, as in peft: R filters of the
    kernel's size, mixed by a 1×1 one. A is uniform in \(\pm 1/\sqrt{\text{its columns}}\), B is 0, so
    the untrained map is the identity to the bit, and at first only B has a gradient.

    Attributes:
        rank: R.
        alpha: α of the scale \(s = \alpha / R\); 2 R by default.
        stabilised: \(s = \alpha / \sqrt R\) instead (Kalajdzievski 2023), as the card s3t has it.
    """

    name: ClassVar[str] = "lora"
    usage: ClassVar[str] = "lora(R) or lora(R,ALPHA)"

    rank: int = 8
    alpha: float | None = None
    stabilised: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SettingError(f"rank={self.rank}: a rank is a count from 1")

    @classmethod
    def of(cls, given: Sequence[str]) -> Self:
        """Read `lora(R)` or `lora(R,ALPHA)`."""
        if not given:
            return cls()
        rank, alpha = given if len(given) > 1 else (given[0], None)
        return cls(int(rank), None if alpha is None else float(alpha))

    @property
    def scale(self) -> float:
        """The factor s."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is linear or a convolution."""
        return is_dense(module)

    def attach(self, model: nn.Module, modules: Sequence[str], group: str, seed: int) -> None:
        """Put untrained maps on modules as a new group; see `SliceAdapter`.

        Raises:
            SettingError: the group's name is taken or cannot be one.
            ModelError: a module is missing, or is neither linear nor a convolution.
        """
        generator = torch.Generator().manual_seed(seed)
        maps: dict[str, Map] = {}
        for name, module in named(model, modules).items():
            maps[name] = one = self._blank(module, name)
            values = 2 * torch.rand(one.A.shape, generator=generator) - 1
            one.A.data.copy_(values / math.sqrt(one.A.shape[1]))
        insert(model, group, maps)

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Map:
        """Make one module's map from stored A and B.

        Raises:
            ModelError: they do not fit the module.
        """
        return fill(self._blank(module, type(module).__name__), tensors)

    def _blank(self, module: nn.Module, name: str) -> LoRAMap:
        if not is_dense(module):
            raise ModelError(f"{name} is neither linear nor a convolution; LoRA needs a matrix")
        return LoRAMap(module, self.rank, self.scale)


class LoRAMap(Map):
    """Adds s B A to a weight."""

    def __init__(self, module: nn.Module, rank: int, scale: float) -> None:
        """Make a map of zeros, in at least float32, where the module's weight is."""
        super().__init__()
        self.layout = Layout.of(module)
        out, *rest = self.layout.sizes
        self.A = new(module, rank, math.prod(rest))
        self.B = new(module, out, rank)
        self.scale = scale

    def change(self, name: str, value: Tensor | None) -> Tensor | None:
        """Add the product to the weight; a bias stays."""
        if name != "weight" or value is None:
            return value
        added = (self.scale * (self.B @ self.A)).view(self.layout.sizes)
        return value + self.layout.native(added).to(value.dtype)

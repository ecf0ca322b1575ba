r"""SaRA: train the weights that hardly act (Hu et al. 2024)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError
from expunge.exact.adapters.base import insert, named
from expunge.exact.adapters.maps import Map, effective

Rule = Literal["magnitude-low", "magnitude-high", "saliency", "random"]
RULES = ("magnitude-low", "magnitude-high", "saliency", "random")


@dataclass(frozen=True)
class SparseMagnitude:
    r"""Maps \(W' = W + S(\delta)\): a flat vector δ added at chosen coordinates, all others constant.

    Chosen once, at attachment, over all parameters of the named modules together (biases, scales
    of norms and embeddings included). What is stored is, for each tensor, its name, int32 indices,
    δ, and a hash of the base tensor, without which δ means nothing. δ begins at 0, so the untrained
    map is the identity to the bit. Scores are compared in float32, ties by position.

    Attributes:
        density: the share q of coordinates, if no threshold is given.
        threshold: θ: all coordinates with \(|W| < \theta\) (`magnitude-low`) or \(\ge \theta\)
            (`magnitude-high`).
        rule: which: `magnitude-low` (SaRA), `magnitude-high`, `saliency` (largest |gradient|, as SalUn;
            reads the `.grad` that the caller accumulated), or `random`.
        matrices: choose among tensors of two and more axes only. Biases and fresh norms are zeros,
            so by magnitude nearly all of them are chosen; `densities` tells.
    """

    name: ClassVar[str] = "sparse"
    usage: ClassVar[str] = "sparse(SHARE) or sparse(SHARE,RULE) with a RULE of " + ", ".join(RULES)

    density: float = 0.2
    threshold: float | None = None
    rule: Rule = "magnitude-low"
    matrices: bool = False

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise SettingError(f"rule={self.rule!r} should be one of {', '.join(RULES)}")
        if not 0 <= self.density <= 1:
            raise SettingError(f"density={self.density}: a share lies between 0 and 1")
        if self.threshold is not None and not self.rule.startswith("magnitude"):
            raise SettingError(f"rule={self.rule!r} compares no magnitudes; give density instead")
        if self.threshold is not None and not self.threshold >= 0:
            raise SettingError(f"threshold={self.threshold}: a magnitude is 0 or more")

    @classmethod
    def of(cls, given: Sequence[str]) -> Self:
        """Read `sparse(SHARE)` or `sparse(SHARE,RULE)`."""
        return cls(float(given[0]), None, *given[1:]) if given else cls()  # type: ignore[arg-type]

    def fits(self, module: nn.Module) -> bool:
        """Whether a module has parameters of its own."""
        return any(p.is_floating_point() for p in module.parameters(recurse=False))

    def attach(self, model: nn.Module, modules: Sequence[str], group: str, seed: int) -> None:
        """Choose coordinates of modules and put maps on them as a new group; see `SliceAdapter`.

        Magnitudes are those that groups acting now give.

        Raises:
            SettingError: the group's name is taken or cannot be one, or saliency is asked for
                without gradients.
            ModelError: a module is missing or has no parameters of its own.
        """
        found = named(model, modules)
        bare = [name for name, module in found.items() if not self.fits(module)]
        if bare:
            raise ModelError(f"{bare[0]} has no weights of its own to choose among")
        values: dict[tuple[str, str], Tensor] = {}
        for name, module in found.items():
            for own in module._parameters:
                value = effective(module, own)
                if value is not None and (value.dim() > 1 or not self.matrices):
                    values[name, own] = value.detach()
        chosen, threshold = self._choose(values, found, seed)
        maps: dict[str, Map] = {
            name: SparseMap(
                module,
                {own: i for (of, own), i in chosen.items() if of == name and len(i)},
                threshold,
            )
            for name, module in found.items()
        }
        insert(model, group, maps)

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Map:
        """Make one module's map from stored indices and δ.

        Raises:
            ModelError: they do not fit the module, or its weights are not those δ was learned on.
        """
        names = sorted(key.removesuffix("_index") for key in tensors if key.endswith("_index"))
        wanted = {f"{n}_{part}" for n in names for part in ("index", "delta", "base")}
        if set(tensors) != wanted | {"threshold"}:
            raise ModelError(f"{sorted(tensors)} are not the tensors of a sparse map")
        for name in names:
            base, index = module._parameters.get(name), tensors[f"{name}_index"].long()
            if base is None or not torch.equal(tensors[f"{name}_base"], base_of(base)):
                raise ModelError(
                    f"the {name} of {type(module).__name__} is not the one the sparse map was "
                    "learned on, where its differences mean nothing; start from the same base"
                )
            delta = tensors[f"{name}_delta"]
            if delta.shape != index.shape or (
                len(index) and not 0 <= int(index.min()) <= int(index.max()) < base.numel()
            ):
                raise ModelError(f"stored indices do not lie within the {name} of the module")
        one = SparseMap(
            module, {n: tensors[f"{n}_index"] for n in names}, float(tensors["threshold"])
        )
        for name in names:
            one.delta(name).data.copy_(tensors[f"{name}_delta"])
        return one

    def _choose(
        self, values: Mapping[tuple[str, str], Tensor], found: Mapping[str, nn.Module], seed: int
    ) -> tuple[dict[tuple[str, str], Tensor], float]:
        """Flat indices by tensor, and the θ below which all of them lie by magnitude."""
        if self.rule == "random":
            generator = torch.Generator().manual_seed(seed)
            scores = [torch.rand(v.numel(), generator=generator) for v in values.values()]
        elif self.rule == "saliency":
            gradients = [found[name]._parameters[own].grad for name, own in values]  # type: ignore[union-attr]
            if any(g is None for g in gradients):
                raise SettingError(
                    "rule='saliency' reads gradients that some weights lack; run backward on the "
                    "loss of the forget set first"
                )
            scores = [g.float().abs().flatten() for g in gradients if g is not None]
        else:
            scores = [v.float().abs().flatten() for v in values.values()]
        flat = torch.cat([s.cpu() for s in scores])
        high = self.rule in ("magnitude-high", "saliency")
        if self.threshold is not None:
            mask = flat >= self.threshold if high else flat < self.threshold
            threshold = self.threshold
        else:
            count = round(self.density * len(flat))
            mask = torch.zeros(len(flat), dtype=torch.bool)
            mask[flat.argsort(descending=high, stable=True)[:count]] = True
            largest = flat[mask].max() if count else torch.tensor(0.0)
            # the least number above all chosen magnitudes, so that < holds for them
            threshold = float(torch.nextafter(largest, torch.tensor(math.inf))) if count else 0.0
        if self.rule != "magnitude-low":
            threshold = math.nan
        parts = mask.split([v.numel() for v in values.values()])
        return {
            key: part.nonzero()[:, 0].int() for key, part in zip(values, parts, strict=True)
        }, threshold


class SparseMap(Map):
    """Adds a vector at some coordinates of a module's parameters.

    `NAME_delta` trains; `NAME_held_delta` did, until `reselect` froze it.
    """

    def __init__(self, module: nn.Module, chosen: Mapping[str, Tensor], threshold: float) -> None:
        """Make a map of zeros.

        Args:
            module: whose parameters it changes.
            chosen: flat indices by the name of the parameter.
            threshold: θ, or NaN where the choice was not of small magnitudes.
        """
        super().__init__()
        self.threshold = threshold
        self.names = tuple(chosen)
        self.base = {n: base_of(module._parameters[n]) for n in chosen}  # type: ignore[arg-type]
        for name, index in chosen.items():
            like = module._parameters[name]
            assert like is not None
            self._set(name, index.int().to(like.device), torch.zeros(len(index)).to(like.device))
            self._hold(name, index[:0].int().to(like.device), torch.zeros(0).to(like.device))

    def delta(self, name: str) -> nn.Parameter:
        """Return the trainable δ of one parameter, a vector."""
        found: nn.Parameter = getattr(self, f"{name}_delta")
        return found

    def index(self, name: str) -> Tensor:
        """Return the flat indices that δ belongs to, int32."""
        found: Tensor = getattr(self, f"{name}_index")
        return found

    def change(self, name: str, value: Tensor | None) -> Tensor | None:
        """Add δ, and what is held, at their coordinates."""
        if name not in self.names or value is None:
            return value
        held = getattr(self, f"{name}_held_index")
        if len(held):
            value = _add(value, getattr(self, f"{name}_held_delta"), held)
        return _add(value, self.delta(name), self.index(name))

    def stored(self) -> dict[str, Tensor]:
        """Return indices in order, δ, and the hash of the base tensor; empty ones are left out."""
        found = {"threshold": torch.tensor(self.threshold, dtype=torch.float64)}
        for name in self.names:
            index = torch.cat([self.index(name), getattr(self, f"{name}_held_index")]).cpu()
            delta = torch.cat([self.delta(name).detach(), getattr(self, f"{name}_held_delta")])
            order = index.argsort()
            found[f"{name}_index"] = index[order].contiguous()
            found[f"{name}_delta"] = delta.cpu()[order].contiguous()
            found[f"{name}_base"] = self.base[name].clone()
        return found

    def keep(self, name: str, moving: Tensor) -> None:
        """Go on training only part of δ, and hold the rest where it is."""
        index, delta = self.index(name), self.delta(name).detach()
        held = torch.cat([getattr(self, f"{name}_held_index"), index[~moving]])
        values = torch.cat([getattr(self, f"{name}_held_delta"), delta[~moving]])
        self._hold(name, held, values)
        trains = self.delta(name).requires_grad
        self._set(name, index[moving].clone(), delta[moving].clone())
        self.delta(name).requires_grad_(trains)

    def _set(self, name: str, index: Tensor, delta: Tensor) -> None:
        self.register_buffer(f"{name}_index", index)
        self.register_parameter(f"{name}_delta", nn.Parameter(delta))

    def _hold(self, name: str, index: Tensor, delta: Tensor) -> None:
        self.register_buffer(f"{name}_held_index", index)
        self.register_buffer(f"{name}_held_delta", delta)


class _Add(torch.autograd.Function):
    """W + S(δ), whose backward pass keeps only the chosen entries of W's gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, delta: Tensor, index: Tensor) -> Tensor:
        return value.flatten().index_add(0, index, delta.to(value.dtype)).view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        chosen = gradient.flatten().index_select(0, index).to(ctx.dtype)
        return (gradient if ctx.needs_input_grad[0] else None), chosen, None


def _add(value: Tensor, delta: Tensor, index: Tensor) -> Tensor:
    return _Add.apply(value, delta, index)


def base_of(tensor: Tensor) -> Tensor:
    """SHA-256 of a tensor's bytes, as uint8 [32]."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)

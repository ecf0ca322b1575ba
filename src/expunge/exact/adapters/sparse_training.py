r"""How a sparse map trains: AdamW on the values, the nuclear norm, and the progressive choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.exact.adapters.base import maps_of
from expunge.exact.adapters.maps import effective
from expunge.exact.adapters.sparse import SparseMap

LEAST_SIDE = 64
"""The nuclear norm looks at matrices with more rows and columns than this."""


class SparseAdamW(torch.optim.AdamW):
    r"""AdamW on the values \(v = W[M] + \delta\) of a sparse group, though δ is what it moves.

    Weight decay pulls v, not δ, to zero: \(v \leftarrow (1 - \eta w)\,v\) before the step of Adam.
    """

    def __init__(
        self,
        model: nn.Module,
        group: str,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        """Prepare.

        Args:
            model: with an active sparse group.
            group: its name.
            lr: η; the paper's rule is `paper_lr(threshold)`.
            betas: of Adam.
            eps: of Adam.
            weight_decay: w.

        Raises:
            SettingError: the group is not sparse, or nothing of it can train.
        """
        self.starts = {id(delta): start for delta, start, _ in values(model, group)}
        self.pull = weight_decay
        deltas = [delta for delta, _, _ in values(model, group)]
        if not deltas:
            raise SettingError(f"no weight of the group {group!r} may move; choose more of them")
        super().__init__(deltas, lr=lr, betas=betas, eps=eps, weight_decay=0.0)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Pull the values to zero, then take a step of Adam."""
        with torch.no_grad():
            for group in self.param_groups:
                for delta in group["params"]:
                    if delta.grad is not None:
                        pulled = group["lr"] * self.pull
                        delta.sub_(pulled * (self.starts[id(delta)]() + delta))
        return super().step(closure)


def paper_lr(threshold: float) -> float:
    r"""The paper's rule \(10^{-3} e^{-350\,\theta}\), made for Stable Diffusion; it vanishes for large θ."""
    return 1e-3 * math.exp(-350 * threshold)


def values(
    model: nn.Module, group: str
) -> Iterator[tuple[nn.Parameter, Callable[[], Tensor], tuple[nn.Module, SparseMap, str]]]:
    """Yield δ of each parameter, what it is added to, and where it stands.

    Raises:
        SettingError: the model has no such group, or it is not sparse.
    """
    for module, one in maps_of(model, group).items():
        if not isinstance(one, SparseMap):
            raise SettingError(f"the group {group!r} is not sparse")
        owner = model.get_submodule(module)
        for name in one.names:

            def start(owner: nn.Module = owner, one: SparseMap = one, name: str = name) -> Tensor:
                whole = effective(owner, name, until=group)
                assert whole is not None
                return whole.detach().flatten().index_select(0, one.index(name)).float()

            yield one.delta(name), start, (owner, one, name)


def nuclear_norm(model: nn.Module, group: str, generator: torch.Generator) -> Tensor | None:
    r"""\(\lVert P \odot M \rVert_*\) of one matrix of the group, drawn at random.

    The sum of singular values of the whole chosen part, not of its change alone; its gradient with
    respect to the values is \((U V^\top) \odot M\).

    Args:
        model: with a sparse group.
        group: its name.
        generator: draws among the matrices with more than 64 rows and columns.

    Returns:
        A scalar to be multiplied by λ and added to the loss; None if there is no such matrix.
    """
    found = [
        (delta, start, one.index(name), shape)
        for delta, start, (owner, one, name) in values(model, group)
        if len(shape := owner._parameters[name].shape) == 2 and min(shape) > LEAST_SIDE  # type: ignore[union-attr]
    ]
    if not found:
        return None
    drawn = int(torch.randint(len(found), (), generator=generator))
    delta, start, index, shape = found[drawn]
    flat = torch.zeros(shape.numel(), device=delta.device)
    masked = flat.index_add(0, index, start() + delta).view(shape)
    return torch.linalg.svdvals(masked).sum()


@torch.no_grad()
def reselect(model: nn.Module, group: str, threshold: float | None = None) -> int:
    r"""Go on with the entries that are still small: \(M_2 = M \wedge (|P| < \theta)\).

    Those that outgrew θ keep what they learned and are frozen. Make a new optimiser afterwards.

    Args:
        model: with a sparse group chosen by small magnitude.
        group: its name.
        threshold: θ; that of the first choice by default.

    Returns:
        How many entries still train.

    Raises:
        SettingError: the group is not sparse, or was not chosen by small magnitude and no θ is given.
    """
    left = 0
    for delta, start, (_, one, name) in list(values(model, group)):
        limit = one.threshold if threshold is None else threshold
        if math.isnan(limit):
            raise SettingError("the group was not chosen by small magnitude; give a threshold")
        moving = (start() + delta).abs() < limit
        one.keep(name, moving)
        left += int(moving.sum())
    return left


def densities(model: nn.Module, group: str) -> dict[str, float]:
    """Share of entries that a sparse group changes, by kind of module and parameter."""
    chosen: dict[str, list[int]] = {}
    for module, one in maps_of(model, group).items():
        if not isinstance(one, SparseMap):
            raise SettingError(f"the group {group!r} is not sparse")
        owner = model.get_submodule(module)
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            kind = f"{getattr(owner, '_plain', type(owner)).__name__}.{name}"
            counts = chosen.setdefault(kind, [0, 0])
            counts[1] += parameter.numel()
            if name in one.names:
                counts[0] += len(one.index(name)) + len(one.get_buffer(f"{name}_held_index"))
    return {kind: part / whole for kind, (part, whole) in chosen.items()}

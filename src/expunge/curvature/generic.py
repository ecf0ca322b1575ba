"""Per-sample gradients of any model: by vmap, or by one backward pass a sample."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.core.data import Batch, map_inputs
from expunge.core.errors import ModelError

EachLoss = Callable[[nn.Module, Batch], Tensor]
Reduction = Literal["none", "square", "abs"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by name; one name each where weights are tied.

    Raises:
        ModelError: there is none.
    """
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ModelError("no parameter of this model requires a gradient; unfreeze those to edit")
    return found


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float64 for float64 parameters, else float32.

    Squares of half-precision gradients would underflow below about 2e-4, so halves are widened.
    Summing non-negative terms in float32 costs a relative error of at most 6e-8 a chunk, far below
    what a threshold on ratios resolves, at half the memory of float64.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module in eval mode and restore each one's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def by_vmap(
    model: nn.Module, each: EachLoss, batch: Batch, reduction: Reduction
) -> dict[str, Tensor]:
    """Per-sample gradients, or their reduction over the batch, by `vmap(grad)`.

    Args:
        model: in eval mode; its parameters are swapped in place meanwhile.
        each: per-sample losses [B] of a batch.
        batch: B samples.
        reduction: `none` for gradients [B, …], `square` or `abs` for their sums […].

    Returns:
        One tensor for each trainable parameter.

    Raises:
        RuntimeError: an operation cannot be batched.
    """
    wrapper = _Each(model, each)
    names = {f"model.{n}": n for n in trainable(model)}
    values = {long: model.get_parameter(n).detach() for long, n in names.items()}

    def loss(values: dict[str, Tensor], x: Any, y: Tensor | None, ids: Tensor) -> Tensor:
        one = Batch(
            map_inputs(x, lambda t: t[None]), None if y is None else y[None], ids[None], total=1
        )
        return functional_call(wrapper, values, (one,))[0]

    in_dims = (None, 0, None if batch.y is None else 0, 0)
    # fused attention has no batching rule, so vmap would run it sample by sample, with a warning
    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(grad(loss), in_dims=in_dims)(values, batch.x, batch.y, batch.ids)
    return {
        name: _reduce(found[long], reduction, model.get_parameter(name).dtype)
        for long, name in names.items()
    }


def by_loop(
    model: nn.Module, each: EachLoss, batch: Batch, reduction: Reduction
) -> dict[str, Tensor]:
    """Do as `by_vmap` does, with one backward pass a sample; parameters not reached may be missing."""
    parameters = trainable(model)
    if reduction == "none":
        rows = [add_gradients({}, each(model, o)[0], parameters, "none") for o in pieces(batch, 1)]
        return {
            n: torch.cat([row.get(n, torch.zeros_like(p)[None]) for row in rows])
            for n, p in parameters.items()
        }
    sums: dict[str, Tensor] = {}
    for one in pieces(batch, 1):
        add_gradients(sums, each(model, one)[0], parameters, reduction)
    return sums


def add_gradients(
    sums: dict[str, Tensor], loss: Tensor, parameters: dict[str, nn.Parameter], reduction: Reduction
) -> dict[str, Tensor]:
    """Add the reduced gradient of one sample's loss to `sums`; nothing where it does not reach."""
    if not loss.requires_grad:
        return sums
    found = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, retain_graph=True
    )
    for (name, p), g in zip(parameters.items(), found, strict=True):
        if g is not None:
            value = _reduce(g[None], reduction, p.dtype)
            sums[name] = sums[name] + value if name in sums else value
    return sums


class _Each(nn.Module):
    """Makes `each(model, batch)` a forward, so that `functional_call` swaps parameters in the model.

    The user's function keeps its real model, attributes and all.
    """

    def __init__(self, model: nn.Module, each: EachLoss) -> None:
        super().__init__()
        self.model = model
        self._each = each

    def forward(self, batch: Batch) -> Tensor:
        return self._each(self.model, batch)


def _reduce(g: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """Reduce gradients [B, …] over samples in the accumulator's precision."""
    if reduction == "none":
        return g
    g = g.to(accumulator_dtype(dtype))
    # never in place: autograd may hand out one tensor as the gradient of two parameters
    return (g.square() if reduction == "square" else g.abs()).sum(0)


def pieces(batch: Batch, size: int) -> Iterator[Batch]:
    """Cut a batch into pieces of at most `size` samples."""
    for start in range(0, len(batch), size):
        yield batch.rows(slice(start, start + size))

"""Gradients of single samples, streamed: memory is bounded by the chunk, never by the data.

Three exact ways, tried in this order and recorded: `layerwise` (closed forms from layer inputs and
output gradients), `vmap` (torch.func over any model), `loop` (one backward pass a sample, for
models with in-place or data-dependent operations). Dropout is off and running statistics are used
and left alone, since the model is in eval mode meanwhile; its mode is restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.curvature import layerwise
from expunge.curvature.generic import (
    EachLoss,
    Reduction,
    accumulator_dtype,
    add_gradients,
    by_loop,
    by_vmap,
    eval_mode,
    pieces,
    trainable,
)
from expunge.curvature.layerwise import NotLayerwise

Path = Literal["layerwise", "vmap", "loop"]
PATHS: tuple[Path, ...] = ("layerwise", "vmap", "loop")

MEMORY = 256 * 2**20
"""Bytes that one chunk's gradients may take by default."""

LARGEST_CHUNK = 64
"""Beyond this, a larger chunk gained no speed on a CPU and only took memory for activations."""


@dataclass
class PerSampleSum:
    """Sums over samples, by parameter name, and how they were computed.

    Attributes:
        sums: one tensor of the parameter's shape for every trainable parameter.
        samples: how many samples went in.
        evaluations: per-sample gradients computed, the comparison with the loop included.
        chunk: samples held at a time.
        paths: samples by the way their gradients were computed.
    """

    sums: dict[str, Tensor]
    samples: int = 0
    evaluations: int = 0
    chunk: int = 0
    paths: dict[str, int] = field(default_factory=dict)


def default_chunk(model: nn.Module, memory: int = MEMORY) -> int:
    """Samples whose gradients fit into `memory` bytes, at least 1 and at most `LARGEST_CHUNK`.

    A sample takes as many bytes as the trainable parameters. Activations come on top; a model with
    large ones and few weights wants a smaller chunk.
    """
    each = sum(p.numel() * p.element_size() for p in trainable(model).values())
    return max(1, min(LARGEST_CHUNK, memory // max(each, 1)))


def per_sample_gradients(
    model: nn.Module, each: EachLoss, batch: Batch, *, path: Path = "vmap"
) -> dict[str, Tensor]:
    r"""Gradients \(g_n = \nabla_\theta \ell_n\) of every sample of one batch.

    Args:
        model: the model; left as it was.
        each: per-sample values [B] of a batch, e.g. the loss.
        batch: B samples.
        path: how; `layerwise` and `vmap` do not work for every model.

    Returns:
        One tensor [B, *shape] for each trainable parameter, 0 where the loss does not reach.

    Raises:
        NotLayerwise: the model has no closed form.
        RuntimeError: vmap does not work for the model.
    """
    parameters = trainable(model)
    with eval_mode(model), torch.enable_grad():
        found = _COMPUTE[path](model, each, batch, "none")
    return {
        n: found.get(n, p.new_zeros(len(batch), *p.shape)).detach() for n, p in parameters.items()
    }


def per_sample_sum(
    model: nn.Module,
    each: EachLoss,
    batches: Iterable[Batch],
    *,
    reduce: Literal["square", "abs"] = "square",
    chunk: int | None = None,
    path: Path | Literal["auto"] = "auto",
) -> PerSampleSum:
    r"""Sum \(\sum_n g_n^2\) or \(\sum_n |g_n|\) over a stream of batches of any sizes.

    With `auto`, three samples are also differentiated one by one; the layerwise path is used only
    if it agrees with that, so a model that mixes samples, or uses weights outside their
    layer, falls through to vmap; what vmap cannot do falls through to the loop.

    Args:
        model: the model; left as it was.
        each: per-sample values [B] of a batch. A label-free function may ignore `batch.y`.
        batches: read one at a time.
        reduce: which sum.
        chunk: samples whose gradients are held at a time; from a memory bound when None.
        path: one way only, or `auto`.

    Returns:
        The sums, and how they were computed.

    Raises:
        ModelError: no parameter requires a gradient.
        NotLayerwise: `path="layerwise"` and the model has no closed form.
    """
    parameters = trainable(model)
    chunk = default_chunk(model) if chunk is None else chunk
    result = PerSampleSum(
        {n: torch.zeros_like(p, dtype=accumulator_dtype(p.dtype)) for n, p in parameters.items()},
        chunk=chunk,
    )
    ways = list(PATHS) if path == "auto" else [path]
    trusted = path != "auto"
    with eval_mode(model), torch.enable_grad():
        for batch in batches:
            for piece in pieces(batch, chunk):
                if len(piece) > 1 and not trusted:
                    trusted = True
                    if not _agrees(model, each, piece.rows(slice(0, 3)), reduce, result):
                        ways.remove("layerwise")
                # a single sample proves nothing about the closed forms, and a loop is as fast
                current = ["loop"] if path == "auto" and len(piece) == 1 else ways
                used, sums = _first_that_works(model, each, piece, reduce, current)
                for name, value in sums.items():
                    result.sums[name] += value
                result.samples += len(piece)
                result.evaluations += len(piece)
                result.paths[used] = result.paths.get(used, 0) + len(piece)
    return result


def _first_that_works(
    model: nn.Module, each: EachLoss, batch: Batch, reduce: Reduction, ways: list[Any]
) -> tuple[str, dict[str, Tensor]]:
    """Compute by the first way that works and forget those that do not, for later chunks too."""
    while True:
        way = ways[0]
        try:
            return way, _COMPUTE[way](model, each, batch, reduce)
        except torch.OutOfMemoryError:
            raise  # a smaller chunk helps, a slower way does not
        except (NotLayerwise, RuntimeError):
            if len(ways) == 1:
                raise
            ways.pop(0)


def _agrees(
    model: nn.Module, each: EachLoss, batch: Batch, reduce: Reduction, result: PerSampleSum
) -> bool:
    """Whether the closed forms are right for a few samples, and each loss is of its sample alone.

    Gradients are compared within one batch: a batch of one may round a saturated softmax to other
    last bits, and then tiny gradients differ although both are right.
    """
    try:
        fast = _layerwise(model, each, batch, reduce)
    except (NotLayerwise, RuntimeError):
        return False
    losses = each(model, batch)
    with torch.no_grad():
        alone = torch.cat([each(model, one) for one in pieces(batch, 1)])
    if not _close(losses.detach(), alone, floor=1.0):
        return False
    result.evaluations += 2 * len(batch)
    slow: dict[str, Tensor] = {}
    parameters = trainable(model)
    for loss in losses:
        add_gradients(slow, loss, parameters, reduce)
    return all(_close(fast.get(n, torch.zeros_like(v)), v) for n, v in slow.items())


def _close(got: Tensor, want: Tensor, floor: float = 0.0) -> bool:
    """Whether two tensors agree to half the digits; rounding is far below, a wrong formula above."""
    if got.shape != want.shape:
        return False
    scale = max(float(want.abs().max()), floor) if want.numel() else 0.0
    return float((got - want).abs().max()) <= torch.finfo(want.dtype).eps ** 0.5 * scale


def _layerwise(
    model: nn.Module, each: EachLoss, batch: Batch, reduction: Reduction
) -> dict[str, Tensor]:
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise NotLayerwise("half-precision squares have to be widened first")
    return layerwise.reduced(model, each, batch, reduction)


_COMPUTE = {"layerwise": _layerwise, "vmap": by_vmap, "loop": by_loop}

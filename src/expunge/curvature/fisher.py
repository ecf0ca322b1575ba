r"""Gradient statistics over a side of the data, each under its own name.

They are different quantities and a method says which it uses:

| name | per parameter | depends on batches |
|---|---|---|
| `per_sample_squares` | \(\frac1N \sum_n g_n^2\), the diagonal empirical Fisher | no |
| `per_sample_magnitudes` | \(\frac1N \sum_n \lvert g_n\rvert\) | no |
| `squared_batch_means` | \(\frac1{n_b} \sum_b \bar g_b^2\) | size and order |
| `batch_mean_magnitudes` | \(\frac1{n_b} \sum_b \lvert\bar g_b\rvert\) | size and order |
| `accumulated` | \(\sum_b \bar g_b\) | only if the last batch is short |
| `mean_gradient` | \(\frac1N \sum_n g_n\) | no |

where \(g_n\) is the gradient of sample n and \(\bar g_b\) the mean over batch b. A short last batch
counts like a full one. The model is in eval mode meanwhile, no buffer changes, and parameters that
are frozen or not reached have the value 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.curvature.generic import EachLoss, accumulator_dtype, eval_mode, trainable
from expunge.curvature.layout import channels_last
from expunge.curvature.per_sample import Path, default_chunk, per_sample_sum


@dataclass(frozen=True)
class Statistic:
    """One gradient statistic of one side of the data.

    Attributes:
        kind: its name in the table above.
        values: by parameter name, of the parameter's shape; float64 for float64 parameters, else
            float32.
        samples: N over all processes.
        batches: n_b, or None where batches do not matter.
        paths: samples of this process by the way their gradients were computed.
    """

    kind: str
    values: dict[str, Tensor]
    samples: int
    batches: int | None = None
    paths: dict[str, int] = field(default_factory=dict)


def per_sample_squares(
    model: nn.Module,
    each: EachLoss,
    source: Source,
    runtime: Runtime,
    *,
    chunk: int | None = None,
    path: Path | Literal["auto"] = "auto",
) -> Statistic:
    r"""Diagonal empirical Fisher \(I_i = \frac1N \sum_n (\partial \ell_n / \partial \theta_i)^2\).

    Args:
        model: the model; left as it was.
        each: per-sample losses [B] of a batch.
        source: the samples; each process takes its share of them.
        runtime: counts gradients, adds up the processes' sums.
        chunk: samples whose gradients are held at a time; the runtime's when None.
        path: how per-sample gradients are computed (see `per_sample`).

    Returns:
        The statistic.
    """
    return _per_sample("per_sample_squares", "square", model, each, source, runtime, chunk, path)


def per_sample_magnitudes(
    model: nn.Module,
    each: EachLoss,
    source: Source,
    runtime: Runtime,
    *,
    chunk: int | None = None,
    path: Path | Literal["auto"] = "auto",
) -> Statistic:
    r"""Mean magnitude \(\frac1N \sum_n |\partial \ell_n / \partial \theta_i|\).

    Arguments and result are those of `per_sample_squares`.
    """
    return _per_sample("per_sample_magnitudes", "abs", model, each, source, runtime, chunk, path)


def squared_batch_means(
    model: nn.Module,
    each: EachLoss,
    source: Source,
    runtime: Runtime,
    *,
    batch_size: int,
    order: Tensor | None = None,
) -> Statistic:
    r"""Mean of squared batch gradients \(\frac1{n_b} \sum_b (\nabla_\theta \mathrm{mean}_b \ell)_i^2\).

    Gradients of samples that agree add up within a batch, so the value depends on the batch size
    and on which samples meet: batches of one class give larger values than mixed ones.

    Args:
        model: the model; left as it was.
        each: per-sample losses [B] of a batch.
        source: the samples; each process takes its share of each batch.
        runtime: counts gradients; adds up the processes' gradients *before* squaring.
        batch_size: samples in a batch over all processes.
        order: ids in the order to read them; by id when None.

    Returns:
        The statistic.
    """
    batches = _read(source, batch_size, order)
    return _over_batches(
        "squared_batch_means", _add_squares, True, model, each, batches, len(source), runtime
    )


def batch_mean_magnitudes(
    model: nn.Module,
    each: EachLoss,
    source: Source,
    runtime: Runtime,
    *,
    batch_size: int,
    order: Tensor | None = None,
) -> Statistic:
    r"""Mean magnitude of batch gradients \(\frac1{n_b} \sum_b |\nabla_\theta \mathrm{mean}_b \ell|_i\).

    Arguments and result are those of `squared_batch_means`.
    """
    batches = _read(source, batch_size, order)
    return _over_batches(
        "batch_mean_magnitudes", _add_magnitudes, True, model, each, batches, len(source), runtime
    )


def accumulated(
    model: nn.Module,
    each: EachLoss,
    source: Source,
    runtime: Runtime,
    *,
    batch_size: int,
    order: Tensor | None = None,
) -> Statistic:
    r"""Accumulated batch gradients \(\sum_b \nabla_\theta \mathrm{mean}_b \ell\), with their signs.

    Arguments and result are those of `squared_batch_means`.
    """
    batches = _read(source, batch_size, order)
    return _over_batches(
        "accumulated", Tensor.add_, False, model, each, batches, len(source), runtime
    )


def mean_gradient(
    model: nn.Module, each: EachLoss, source: Source, runtime: Runtime, *, batch_size: int
) -> Statistic:
    r"""Gradient of the mean loss over a source, \(\frac1N \sum_n \nabla_\theta \ell_n\), in one pass.

    Arguments and result are those of `squared_batch_means`; a short last batch counts as it should.
    """
    parameters = trainable(model)
    values = {
        n: torch.zeros_like(p, dtype=accumulator_dtype(p.dtype)) for n, p in parameters.items()
    }
    batches = source.batches(batch_size)
    with (
        runtime.task("mean_gradient", len(source)) as task, eval_mode(model), torch.enable_grad(),
        channels_last(model) as laid_out,
    ):  # fmt: skip
        for batch in _reported(batches, task.advance):
            share = batch.total / len(source) / batch.processes
            gradients = laid_out(_batch_gradient, model, each, batch, list(parameters.values()))
            for value, g in zip(values.values(), gradients, strict=True):
                value += share * runtime.sum(_in_order(g, value.dtype))
            runtime.cost.gradients += len(batch)
    return Statistic("mean_gradient", values, len(source))


def _per_sample(
    kind: str,
    reduce: Literal["square", "abs"],
    model: nn.Module,
    each: EachLoss,
    source: Source,
    runtime: Runtime,
    chunk: int | None,
    path: Path | Literal["auto"],
) -> Statistic:
    chunk = chunk or runtime.chunk or default_chunk(model)
    # read as many as the processes can hold together, so that no one holds more than a chunk
    batches = source.batches(chunk * runtime.processes)
    with runtime.task(kind, len(source)) as task:
        found = per_sample_sum(
            model, each, _reported(batches, task.advance), reduce=reduce, chunk=chunk, path=path
        )
    runtime.cost.gradients += found.evaluations
    values = {n: runtime.sum(v).div_(len(source)) for n, v in found.sums.items()}
    return Statistic(kind, values, len(source), paths=found.paths)


def _over_batches(
    kind: str,
    add: Callable[[Tensor, Tensor], Tensor],
    average: bool,
    model: nn.Module,
    each: EachLoss,
    batches: Iterable[Batch],
    samples: int,
    runtime: Runtime,
) -> Statistic:
    parameters = trainable(model)
    values = {
        n: torch.zeros_like(p, dtype=accumulator_dtype(p.dtype)) for n, p in parameters.items()
    }
    count = 0
    with (
        runtime.task(kind, samples) as task, eval_mode(model), torch.enable_grad(),
        channels_last(model) as laid_out,
    ):  # fmt: skip
        for batch in _reported(batches, task.advance):
            gradients = laid_out(_batch_gradient, model, each, batch, list(parameters.values()))
            for value, g in zip(values.values(), gradients, strict=True):
                if batch.processes > 1:
                    # of a clone: the sum works in place, and autograd may share tensors
                    g = runtime.sum(_in_order(g, value.dtype)) / batch.processes
                add(value, g.to(value.dtype))
            count += 1
            runtime.cost.gradients += len(batch)
    if average:
        for value in values.values():
            value /= count
    return Statistic(kind, values, samples, count)


def _add_squares(total: Tensor, g: Tensor) -> Tensor:
    return total.addcmul_(g, g)  # no tensor for the squares alone


def _add_magnitudes(total: Tensor, g: Tensor) -> Tensor:
    return total.add_(g.abs())


def _batch_gradient(
    model: nn.Module, each: EachLoss, batch: Batch, parameters: list[nn.Parameter]
) -> list[Tensor]:
    """Gradient of this process' share of the batch mean; 0 for an empty share."""
    if len(batch):
        loss = batch.mean(each(model, batch))
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters, found, strict=True)
            ]
    return [torch.zeros_like(p) for p in parameters]


def _in_order(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the order of its indices: sums over processes add memory to memory, whatever its layout here."""
    return gradient.to(dtype).clone(memory_format=torch.contiguous_format)


def _read(source: Source, size: int, order: Tensor | None) -> Iterator[Batch]:
    ids = source.ids if order is None else order
    return (source.fetch(chunk) for chunk in ids.split(size))


def _reported(batches: Iterable[Batch], advance: Callable[[int], None]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        advance(batch.total)

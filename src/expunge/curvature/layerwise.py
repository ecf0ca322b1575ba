r"""Per-sample gradients of common layers from their inputs and output gradients.

One batched forward and one backward pass give, for every layer, its input \(a_n\) and the gradient
\(\delta_n\) of its output for each sample; the gradient of the weights follows in closed form, e.g.
\(\delta_n a_n^T\) for a linear layer. On a CPU this is several times faster than vmap, whose
convolutions become grouped ones, and it never holds more than one layer's gradients at a time.

It is right only if samples do not mix and each layer runs once on inputs whose first dimension is
the batch. `NotLayerwise` says that a model is visibly otherwise; `per_sample` also compares a
few samples with one backward pass each before it trusts this path.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F

from expunge.core.data import Batch
from expunge.curvature.generic import EachLoss, Reduction


class NotLayerwise(Exception):
    """This model or batch has no closed form here; vmap or a loop has to do it."""


BLOCK = 2**19
"""Numbers of one layer's gradients held at a time: 2 MiB in float32 stay in the cache."""


@dataclass
class _Call:
    """One run of one layer: its input, the input's version then, and where its output came from."""

    inputs: Tensor
    version: int
    edge: GradientEdge | None


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that own the trainable parameters, by name.

    Args:
        model: any module.

    Returns:
        Name → module, each of a type with a closed form.

    Raises:
        NotLayerwise: a trainable parameter lies elsewhere, or belongs to two layers.
    """
    found: dict[str, nn.Module] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own:
            continue
        # an exact type: a subclass may compute something else in its forward
        if type(module) not in _RULES:
            raise NotLayerwise(f"{name or 'the model'} is a {type(module).__name__}")
        for p in own:
            if owners.setdefault(id(p), name) != name:
                raise NotLayerwise(f"{name} shares a parameter with {owners[id(p)]}")
        found[name] = module
    return found


def reduced(
    model: nn.Module, each: EachLoss, batch: Batch, reduction: Reduction
) -> dict[str, Tensor]:
    r"""Per-sample gradients of one batch, or \(\sum_n g_n^2\), or \(\sum_n |g_n|\).

    Args:
        model: in eval mode.
        each: per-sample losses [B] of a batch.
        batch: B samples.
        reduction: `none` for gradients [B, …], `square` or `abs` for their sums […].

    Returns:
        One tensor for each parameter that the loss reached; the others have gradient 0.

    Raises:
        NotLayerwise: there is no closed form.
    """
    layers = layers_of(model)
    calls, losses = _forward(model, layers, each, batch)
    reached = {name: call for name, call in calls.items() if call.edge is not None}
    if not reached or not losses.requires_grad:
        return {}
    edges = [call.edge for call in reached.values()]
    # gradients with respect to layer outputs only: the weights' own backward is never run
    deltas = torch.autograd.grad(losses.sum(), edges, allow_unused=True)  # type: ignore[arg-type]
    result: dict[str, Tensor] = {}
    with torch.no_grad():
        for (name, call), delta in zip(reached.items(), deltas, strict=True):
            if call.inputs._version != call.version:
                raise NotLayerwise(f"the input of {name} was overwritten after its use")
            if delta is None:
                continue
            module = layers[name]
            for parameter, part in _RULES[type(module)](module, call.inputs, delta).items():
                owned = getattr(module, parameter)
                if owned is not None and owned.requires_grad:
                    full = f"{name}.{parameter}" if name else parameter
                    result[full] = part().reduce(reduction, owned.shape)
    return result


def _forward(
    model: nn.Module, layers: dict[str, nn.Module], each: EachLoss, batch: Batch
) -> tuple[dict[str, _Call], Tensor]:
    calls: dict[str, _Call] = {}
    unfit: list[str] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            # raising inside the user's forward could be swallowed there, so it is noted instead
            if name in calls or len(inputs) != 1 or len(inputs[0]) != len(batch):
                unfit.append(name)
                return
            # an edge, not the output: a later in-place operation would move the output's gradient
            edge = get_gradient_edge(output) if output.requires_grad else None
            calls[name] = _Call(inputs[0].detach(), inputs[0]._version, edge)

        return hook

    # first of all hooks, since a user's hook may replace the output
    handles = [m.register_forward_hook(keep(n), prepend=True) for n, m in layers.items()]
    try:
        losses = each(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if unfit:
        raise NotLayerwise(f"{unfit[0]} runs more than once, or not with the batch first")
    return calls, losses


@dataclass
class _Plain:
    """Gradients of samples [B, …], as they are."""

    values: Tensor

    def reduce(self, reduction: Reduction, shape: torch.Size) -> Tensor:
        if reduction == "none":
            return self.values.reshape(-1, *shape)
        f = torch.square if reduction == "square" else torch.abs
        return f(self.values).sum(0).reshape(shape)


@dataclass
class _Blocks:
    """Gradients of `samples` samples, computed for a slice of them at a time."""

    samples: int
    gradients: Callable[[slice], Tensor]

    def reduce(self, reduction: Reduction, shape: torch.Size) -> Tensor:
        if reduction == "none":
            return self.gradients(slice(None)).reshape(-1, *shape)
        step = max(1, BLOCK // shape.numel())
        total: Tensor | None = None
        for start in range(0, self.samples, step):
            g = self.gradients(slice(start, start + step))
            part = (g.square_() if reduction == "square" else g.abs_()).sum(0)
            total = part if total is None else total + part
        assert total is not None
        return total.reshape(shape)


_Part = Callable[[], _Plain | _Blocks]


def _linear(module: nn.Linear, a: Tensor, delta: Tensor) -> dict[str, _Part]:
    if a.ndim == 2:
        return {"weight": lambda: _Outer(delta, a), "bias": lambda: _Plain(delta)}
    delta = delta.reshape(len(delta), -1, delta.shape[-1])
    a = a.reshape(len(a), -1, a.shape[-1])
    return {
        "weight": lambda: _Blocks(len(a), lambda s: torch.bmm(delta[s].transpose(1, 2), a[s])),
        "bias": lambda: _Plain(delta.sum(1)),
    }


@dataclass
class _Outer(_Plain):
    """Gradients δₙ ⊗ aₙ of a linear layer, with δ in `values` [B, o] and a in `right` [B, i]."""

    right: Tensor

    def reduce(self, reduction: Reduction, shape: torch.Size) -> Tensor:
        if reduction == "none":
            return self.values[:, :, None] * self.right[:, None, :]
        # (δ aᵀ)² = δ² (a²)ᵀ: the sum over samples is one product of matrices
        f = torch.square if reduction == "square" else torch.abs
        return f(self.values).T @ f(self.right)


def _conv2d(module: nn.Conv2d, a: Tensor, delta: Tensor) -> dict[str, _Part]:
    if a.ndim != 4 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise NotLayerwise("a convolution with unusual padding or without a batch")

    def gradients(part: slice) -> Tensor:
        patches = _patches(module, a[part], delta.shape[-2:])
        samples = len(patches)
        patches = patches.reshape(samples * module.groups, -1, delta[0, 0].numel())
        grouped = delta[part].reshape(samples * module.groups, -1, patches.shape[-1])
        return torch.bmm(grouped, patches.transpose(1, 2)).reshape(samples, -1)

    return {
        "weight": lambda: _Blocks(len(a), gradients),
        "bias": lambda: _Plain(delta.sum((2, 3))),
    }


def _patches(module: nn.Conv2d, a: Tensor, output: torch.Size) -> Tensor:
    """Return what each output position [h, w] sees, [B, C, kh, kw, h, w].

    `torch.nn.functional.unfold` gives the same; a view is copied up to three times as fast.
    """
    up, left = (int(p) for p in module.padding)
    (kh, kw), (dh, dw), (sh, sw) = module.kernel_size, module.dilation, module.stride
    a = F.pad(a, (left, left, up, up))
    batch, channel, row, column = a.stride()
    return a.as_strided(
        (len(a), a.shape[1], kh, kw, *output),
        (batch, channel, row * dh, column * dw, row * sh, column * sw),
    )


def _batch_norm(module: nn.BatchNorm2d, a: Tensor, delta: Tensor) -> dict[str, _Part]:
    if module.training or module.running_mean is None:
        raise NotLayerwise("a batch norm that uses the statistics of the batch")
    normal = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return _scale_and_shift(normal, delta, tuple(range(2, a.ndim)))


def _group_norm(module: nn.GroupNorm, a: Tensor, delta: Tensor) -> dict[str, _Part]:
    normal = F.group_norm(a, module.num_groups, eps=module.eps)
    return _scale_and_shift(normal, delta, tuple(range(2, a.ndim)))


def _layer_norm(module: nn.LayerNorm, a: Tensor, delta: Tensor) -> dict[str, _Part]:
    shape = list(module.normalized_shape)
    if a.ndim <= len(shape):
        raise NotLayerwise("a layer norm that takes in the batch dimension")
    normal = F.layer_norm(a, shape, eps=module.eps)
    return _scale_and_shift(normal, delta, tuple(range(1, a.ndim - len(shape))))


def _scale_and_shift(normal: Tensor, delta: Tensor, over: tuple[int, ...]) -> dict[str, _Part]:
    def add(t: Tensor) -> _Plain:
        return _Plain(t.sum(over) if over else t)

    return {"weight": lambda: add(delta * normal), "bias": lambda: add(delta)}


_RULES: dict[type[nn.Module], Callable[..., dict[str, _Part]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
}

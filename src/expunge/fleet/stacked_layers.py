"""Layers over stacked models, with the arithmetic of single ones.

`vmap` turns a linear layer's backward pass into other products, a convolution into a grouped one, and
batch norm into several steps. All round differently, which a long training at a high learning rate
magnifies, and grouped convolutions are slow on a CPU. Here products are those that autograd takes for
one model, batched; on a CPU each model's convolution and batch norm is its own call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import batch_norm, conv2d, linear


def stackable(network: nn.Module, device: str) -> nn.Module:
    """Give a network layers that know stacked models, in place.

    Args:
        network: its plain `Linear` and, on a CPU, `Conv2d` and `BatchNorm` layers are changed.
        device: where it will run.
    """
    for module in network.modules():
        kind = type(module)
        if kind is nn.Linear:
            module.__class__ = _Linear
        elif device != "cpu":
            continue
        # other paddings are more than one call
        elif isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
            if module.padding_mode == "zeros" and not isinstance(module.padding, str):
                module.__class__ = _Conv2d
        elif kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.__class__ = _NORMS[kind]
    return network


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or self.bias is None:
            return super().forward(x)
        return _LinearRule.apply(x, self.weight, self.bias)


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return super().forward(x)
        how = (self.stride, self.padding, self.dilation, self.groups)
        return _ConvRule.apply(x, self.weight, self.bias, how)


class _Norm(nn.modules.batchnorm._BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        train = self.training or self.running_mean is None
        how = (train, 0.0 if self.momentum is None else self.momentum, self.eps)
        return _NormRule.apply(x, self.weight, self.bias, self.running_mean, self.running_var, how)

    def _check_input_dim(self, input: Tensor) -> None:
        """Leave it to the kernel."""


_NORMS: dict[type, type] = {
    kind: type(kind.__name__, (_Norm, kind), {})
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


class _Rule(Function):
    """A function that is known over stacked models alone."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: without stacked models there is no backward pass here."""


class _LinearRule(_Rule):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear(x, w, b)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, int]:
        return _StackedLinear.apply(*_first(info, dims, x, w, b)), 0


class _ConvRule(_Rule):
    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Tensor:
        return conv2d(x, w, b, *how)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Any:
        return _StackedConv.apply(*_first(info, dims[:3], x, w, b), how), 0


class _NormRule(_Rule):
    @staticmethod
    def forward(x: Tensor, w: Any, b: Any, mean: Any, var: Any, how: Any) -> Tensor:
        train, momentum, eps = how
        return batch_norm(x, mean, var, w, b, train, momentum, eps)

    @staticmethod
    def vmap(info: Any, dims: Any, *given: Any) -> Any:
        return _StackedNorm.apply(*_first(info, dims[:5], *given[:5]), given[5]), 0


def _first(info: Any, dims: Any, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors with the models in front; what they share is repeated without a copy."""
    return [
        t if t is None else t.movedim(d, 0) if d is not None else t.expand(info.batch_size, *t.shape)
        for t, d in zip(tensors, dims, strict=True)
    ]  # fmt: skip


class _StackedLinear(Function):
    """Outputs [K, B, o] of inputs [K, B, i], weights [K, o, i] and biases [K, o]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.baddbmm(b.unsqueeze(1), x, w.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        of_x = torch.bmm(g, w) if ctx.needs_input_grad[0] else None
        return of_x, torch.bmm(g.transpose(1, 2), x), g.sum(1)


class _StackedConv(Function):
    """Outputs [K, B, …] of inputs [K, B, …], kernels [K, …] and biases [K, o], model by model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, how: Any) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.how, ctx.bias = how, None if b is None else list(b.shape[1:])
        biases = [None] * len(x) if b is None else b
        return torch.stack([conv2d(*one, *how) for one in zip(x, w, biases, strict=True)])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.how
        wanted = [ctx.needs_input_grad[0], True, ctx.bias is not None]
        each = [
            torch.ops.aten.convolution_backward(
                *one, ctx.bias, stride, padding, dilation, False, [0, 0], groups, wanted
            )
            for one in zip(g, x, w, strict=True)
        ]
        parts = zip(*each, strict=True)
        return *(None if p[0] is None else torch.stack(p) for p in parts), None


class _StackedNorm(Function):
    """Batch norm of inputs [K, B, …], model by model; running statistics [K, C] move in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Any, b: Any, mean: Any, var: Any, how: Any) -> Tensor:
        rows = [_rows(t, len(x)) for t in (w, b, mean, var)]
        made = [
            torch.native_batch_norm(*one, *how) for one in zip(x, *rows, strict=True)
        ]  # fmt: skip
        out, *kept = (torch.stack(part) for part in zip(*made, strict=True))
        ctx.save_for_backward(x, w, mean, var, *kept)
        ctx.how, ctx.affine = how, w is not None
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *others = ctx.saved_tensors
        train, _, eps = ctx.how
        wanted = [ctx.needs_input_grad[0], ctx.affine, ctx.affine]
        rows = [_rows(t, len(x)) for t in others]
        each = [
            torch.ops.aten.native_batch_norm_backward(*one, train, eps, wanted)
            for one in zip(g, x, *rows, strict=True)
        ]
        parts = zip(*each, strict=True)
        return *(None if p[0] is None else torch.stack(p) for p in parts), None, None, None


def _rows(stack: Tensor | None, count: int) -> Any:
    return [None] * count if stack is None else stack

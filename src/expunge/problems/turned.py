r"""Linear layers over a few rows, which on a processor are faster as \(W x^\top\) than as \(x W^\top\).

The long side of the weights is then the one that is cut among threads, and nothing is computed otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FEW = 64
"""Most rows for which the turned product was seen to be faster; up to 2 times at 8 to 32 rows."""


class TurnedProducts(TorchFunctionMode):
    """While it is entered, linear layers over at most `FEW` rows on a processor are turned."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func`, or the turned product in place of `linear`."""
        if func is nn.functional.linear and not kwargs and _turns(*args):
            return _turned(*args)
        return func(*args, **(kwargs or {}))


def _turns(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    rows = x.numel() // max(1, x.shape[-1])
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return plain and 1 < rows <= FEW and weight.dim() == 2


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous()
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], len(weight))

"""The mean of the weights over the last steps of a training: `smooth=swa(START, EVERY)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from expunge.train.master import write_back
from expunge.train.norm import norm_layers
from expunge.train.smooth import kept


class Average:
    r"""The running mean \(\bar\theta \leftarrow \bar\theta + (\theta - \bar\theta) / (n + 1)\).

    Running statistics of norm layers are averaged beside the weights that may move. What does not
    move keeps every bit.
    """

    def __init__(
        self,
        values: tuple[float, ...],
        model: nn.Module,
        moving: Mapping[str, nn.Parameter],
        wide: Mapping[str, nn.Parameter],
        mean: dict[str, Tensor],
    ) -> None:
        """Go on with the mean so far, which is empty at first.

        Args:
            values: START and EVERY, in steps.
            model: the model in training.
            moving: its parameters that may move.
            wide: the same in float32 at least.
            mean: is changed in place.
        """
        self.start, self.every = map(int, values)
        self.model, self.moving, self.wide, self.mean = model, moving, wide, mean

    def _tensors(self) -> dict[str, Tensor]:
        statistics = {id(b) for layer in norm_layers(self.model) for b in layer.buffers()}
        running = {
            n: b
            for n, b in self.model.named_buffers()
            if id(b) in statistics and b.is_floating_point()
        }
        return {n: p.detach() for n, p in self.wide.items()} | running

    def take(self, step: int) -> None:
        """Let the weights after a step (counted from 1) into the mean, if it is their turn."""
        count, between = divmod(step - self.start, self.every)
        if count < 0 or between:
            return
        for name, value in self._tensors().items():
            if name not in self.mean:
                self.mean[name] = value.clone()
            else:
                self.mean[name] += (value - self.mean[name]) / (count + 1)

    @torch.no_grad()
    def put(self) -> None:
        """Give the model the mean in place of its weights; nothing before there is one."""
        for name, value in self._tensors().items():
            if name in self.mean:
                value.copy_(self.mean[name])
        write_back(self.moving, self.wide)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Have the mean in the model for a while."""
        with kept([*self._tensors().values(), *self.moving.values()]):
            self.put()
            yield

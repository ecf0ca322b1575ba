"""Supervised: what classifiers and regressors share, namely one output a sample and named layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ModelError, NeedsError
from expunge.core.problem import Problem
from expunge.problems.lm_roles import lm_roles
from expunge.problems.taps import leaf_layers, penultimate, read_taps


class Supervised(Problem):
    """Base of problems whose model maps a batch of inputs to one output a sample.

    `model(x)` returns a tensor or an object with `.logits`; inputs that are a mapping are passed as
    keyword arguments, as transformers models expect.
    """

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a kind of problem makes of the model's output: logits or predictions."""
        raise NotImplementedError

    def features(self, model: nn.Module, batch: Batch, layers: list[str]) -> dict[str, Tensor]:
        """Outputs of named layers, flattened to [B, d]."""
        return read_taps(model, layers, lambda m: self.outputs(m, batch))

    def tapped(
        self, model: nn.Module, batch: Batch, layers: list[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits or predictions, and outputs [B, …] of named layers, from one forward pass."""
        kept: list[Tensor] = []
        found = read_taps(model, layers, lambda m: kept.append(self.outputs(m, batch)), flat=False)
        return kept[0], found

    def penultimate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Input [B, d] of the last layer, with its gradient."""
        return penultimate(model, self.role("last layer")[0], lambda m: self.outputs(m, batch))

    def role(self, name: str) -> list[str]:
        """Module names that play a role; in a transformer also those of its blocks (`mlp out`, …).

        Raises:
            NeedsError: no module plays it.
        """
        try:
            return super().role(name)
        except NeedsError:
            found = lm_roles(self.model).get(name)
            if found is None:
                raise
            return found

    def layers(self) -> list[str]:
        """Names of the layers that `features` is usually asked for, input to output."""
        return leaf_layers(self.model)

    def _first(self, compute: Callable[[nn.Module, Batch], Any]) -> Any:
        """What the model gives for the first two samples.

        Raises:
            ModelError: it does not take them.
        """
        batch = self.train.fetch(self.train.ids[:2])
        parameter = next(self.model.parameters(), None)
        try:
            with torch.no_grad():
                return compute(
                    self.model, batch if parameter is None else batch.to(parameter.device)
                )
        except Exception as error:  # somebody else's model may raise anything
            if isinstance(error, ModelError):
                raise
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"the model does not take this data: {line}") from error


def call(model: nn.Module, batch: Batch) -> Any:
    """The raw output of a model, or the `.logits` of what it returns."""
    output = model(batch.x) if isinstance(batch.x, Tensor) else model(**batch.x)
    return getattr(output, "logits", output)

"""Classification: any `nn.Module` that maps inputs to logits, or a transformers image classifier."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.core.data import Batch
from expunge.core.errors import DataError, ModelError
from expunge.problems.supervised import Supervised, call


class Classification(Supervised):
    r"""A classifier with the loss \(-\log p_y(x)\).

    `model(x)` must return logits [B, C] or an object with `.logits`; inputs that are a mapping are
    passed as keyword arguments, as transformers models expect.
    """

    kind: ClassVar[str] = "classification"

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C]."""
        return call(model, batch)

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy [B] of each sample, in nats."""
        assert batch.y is not None
        return cross_entropy(self.logits(model, batch), batch.y, reduction="none")

    def logits_and_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and losses [B] from one forward pass."""
        if "each_loss" in vars(self) or type(self).each_loss is not Classification.each_loss:
            return super().logits_and_loss(model, batch)  # a loss of the user's own
        assert batch.y is not None
        logits = self.logits(model, batch)
        return logits, cross_entropy(logits, batch.y, reduction="none")

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C]."""
        return self.logits(model, batch)

    @property
    def classes(self) -> int:
        """Number of classes C of the model's output, found by one forward pass."""
        if not hasattr(self, "_classes"):
            self._classes = int(self._first(self.logits).shape[1])
        return self._classes

    def check(self) -> None:
        """Compare the model's classes with the data's labels, before any long work.

        Raises:
            ModelError: the model does not take these inputs, or has fewer classes than the data.
            DataError: labels are not class numbers.
        """
        first = self._first(self.logits)
        if not isinstance(first, Tensor) or first.ndim != 2:
            gave = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first)
            raise ModelError(f"a classifier gives logits [B, C]; this model gave {gave}")
        if not bool(torch.isfinite(first).all()):
            raise ModelError("the model gives NaN or infinite logits on its training data")
        self._classes = int(first.shape[1])
        for split in (self.train, self.test, self.valid):
            labels = None if split is None else split.labels
            if labels is None:
                continue
            if labels.is_floating_point() or labels.ndim != 1 or int(labels.min()) < 0:
                raise DataError("labels must be class numbers 0, 1, …, one a sample")
            if int(labels.max()) >= self._classes:
                raise ModelError(
                    f"the model has {self._classes} classes but the data has label {int(labels.max())}"
                )

"""Regression: any `nn.Module` that maps inputs to one number a sample."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError, ModelError
from expunge.problems.supervised import Supervised, call
from expunge.train.losses import one_a_sample, quantile_of, regression_each


class Regression(Supervised):
    r"""A regressor with the loss \(\ell(\hat y, y)\): absolute, squared or quantile.

    `model(x)` must return one number a sample, [B] or [B, 1], or an object with such `.logits`.
    Targets are numbers [N]; ranges of them are forgotten by `xp.forget(where="2 < y <= 5")`.
    """

    kind: ClassVar[str] = "regression"

    def __init__(self, model: nn.Module, train: Any, test: Any = None, *, loss: str = "l1", **more: Any) -> None:  # fmt: skip
        """Describe a regressor and its data.

        Args:
            model: the trained model; it is copied, never changed.
            train: training data.
            test: held-out data of the same kind.
            loss: what it was trained on: `l1`, `mse` or `quantile(q)`, e.g. `quantile(0.9)`.
            **more: keyword arguments of `Problem` (valid=, recipe=, roles=, …).

        Raises:
            SettingError: the loss has another name.
        """
        quantile_of(loss)
        super().__init__(model, train, test, **more)
        self.loss = loss

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predicted targets [B].

        Raises:
            ModelError: the model does not give one number a sample.
        """
        return one_a_sample(call(model, batch), len(batch))

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predicted targets [B]."""
        return self.predict(model, batch)

    def loss_between(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss [B] of predictions [B] against any targets [B], e.g. another model's."""
        return regression_each(prediction, target, self.loss)

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss [B] of each sample."""
        assert batch.y is not None
        return self.loss_between(self.predict(model, batch), batch.y)

    def check(self) -> None:
        """Look at targets and at the model's output, before any long work.

        Raises:
            ModelError: the model does not take these inputs, or does not give one number a sample.
            DataError: targets are not one number a sample.
        """
        first = self._first(self.predict)
        if not bool(torch.isfinite(first).all()):
            raise ModelError("the model gives NaN or infinite predictions on its training data")
        for split in (self.train, self.test, self.valid):
            targets = None if split is None else split.labels
            if targets is not None and targets.ndim != 1:
                raise DataError(
                    f"targets must be one number a sample, [N]; these have shape {tuple(targets.shape)}"
                )

    def fingerprint(self) -> dict[str, str | None]:
        """Hashes of weights and data, and the loss."""
        return super().fingerprint() | {"loss": self.loss}

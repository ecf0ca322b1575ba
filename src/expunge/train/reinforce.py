"""A model that has learned the forget data even better, for methods that turn away from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.adapters import is_lora
from expunge.train.fit import Pass
from expunge.train.method import Training
from expunge.train.norm import NormMode
from expunge.train.steps import StepName


@dataclass(frozen=True, kw_only=True)
class Reinforcing(Training):
    """Base of methods that first go on training the original on the forget data."""

    search: ClassVar[Mapping[str, Any]] = {"epochs": None, "lr": None}

    epochs: int = setting(5, "passes over the forget data", low=1, source="TOFU")
    lr: float = setting(1e-5, "learning rate, η", above=0, source="OpenUnlearning")
    batch_size: int = setting(32, "forget samples a batch, over all processes", low=1, source="MUSE, 4 × 8")  # fmt: skip
    step: StepName = setting("adamw", "optimiser: sgd, adam or adamw", source="OpenUnlearning")
    clip: float = setting(1.0, "largest gradient norm", above=0, source="transformers")
    norm: NormMode = setting("frozen", "running statistics: train, frozen or recalibrate")

    def reinforced(self, view: View, runtime: Runtime) -> Outcome:
        """Train a copy of the original on the forget data, by the problem's own loss.

        Args:
            view: forget data with labels.
            runtime: see `fit`.

        Returns:
            The reinforced model; with `train=lora(R)` it shares its weights with the original.
        """

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            for batch in view.forget.batches(self.batch_size, runtime.generator("forget", epoch)):
                yield loss, batch

        model = view.model(shared=is_lora(self.train))
        return self.train_model(model, passes, view, runtime, clip=self.clip)[0]

"""LMRecipe: train a causal language model on the samples to keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.train.method import cosine
from expunge.train.recipe import SupervisedRecipe
from expunge.train.steps import StepName
from expunge.train.token_losses import nll_of, sequence_mean


@dataclass(frozen=True)
class LMRecipe(SupervisedRecipe):
    """Train a language model on the likelihood of its answers; see `SupervisedRecipe`.

    The learning rate rises and falls by epochs, or, with `rise`, by steps.

    Attributes:
        warmup: epochs in which the learning rate rises linearly.
        rise: steps in which it rises linearly, in place of epochs.
        floor: share of the highest learning rate that half a cosine over the steps ends at.
    """

    lr: float = 3e-3
    weight_decay: float = 0.0
    step: StepName = "adamw"
    clip: float | None = 1.0
    warmup: int = 0
    rise: int = 0
    floor: float = 0.0

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-likelihood [B] of each sample's answered tokens."""
        assert batch.y is not None

        def logits(**some: Tensor) -> Tensor:
            output = model(**batch.x, **some)
            return getattr(output, "logits", output)

        return sequence_mean(*nll_of(model, batch.y, logits))

    def rate(self, epoch: int) -> float:
        """Factor of the learning rate in an epoch: a rise, then half a cosine, or none."""
        if self.rise:
            return 1.0
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        return cosine(epoch - self.warmup, self.epochs - self.warmup)

    def pace(self, step: int, steps: int) -> float:
        """Factor at a step, where it goes by steps: a rise, then half a cosine to the floor."""
        if not self.rise:
            return 1.0
        if step < self.rise:
            return (step + 1) / self.rise
        if self.schedule == "constant":
            return 1.0
        left = max(steps - self.rise, 1)
        return self.floor + (1 - self.floor) * cosine(step - self.rise, left)

    def settings(self) -> dict[str, Any]:
        """What a record keeps of the recipe."""
        found = super().settings() | {"warmup": self.warmup, "clip": self.clip}
        if self.rise:  # a training by epochs keeps the key it always had
            found |= {"rise": self.rise, "floor": self.floor}
        return found

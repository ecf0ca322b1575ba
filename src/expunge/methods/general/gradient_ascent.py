r"""GradientAscent: raise the loss on the forget data by a few small steps.

\(\theta \leftarrow \theta - \eta\,\nabla_\theta\,[-\mathrm{mean}_{D_f} L(\theta)]\). The loss is not
bounded below: a factor of three in the learning rate lies between no effect and a ruined model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.method import Training


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Training):
    """Ascend on the forget data; the only method here that reads no retain data."""

    name: ClassVar[str] = "gradient-ascent"
    card: ClassVar[Card] = Card(
        title="Unrolling SGD: Understanding Factors Influencing Machine Unlearning",
        authors="Thudi, Deza, Chandrasekaran, Papernot",
        year=2022,
        link="https://arxiv.org/abs/2109.13398",
        idea="Walk up the loss of the forget data; forgets fast and damages fast.",
    )

    epochs: int = setting(5, "passes over the forget data", low=1, source="Unlearn-Sparse README")
    lr: float = setting(1e-4, "learning rate", above=0, source="Unlearn-Sparse README")
    bound: float | None = setting(None, "stop once the forget loss exceeds this, in nats", above=0)

    @property
    def needs(self) -> Needs:
        """Forget data with labels; retain data only to recalibrate norm layers."""
        return Needs(forget=True, labels="forget", retain=self.norm == "recalibrate")

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Ascend until the epochs or the bound are reached."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return -batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            for batch in view.forget.batches(self.batch_size, runtime.generator("forget", epoch)):
                yield loss, batch

        def stop(value: float) -> str | None:
            if self.bound is not None and -value > self.bound:
                return f"the forget loss {-value:.3g} passed the bound {self.bound:g}"
            return None

        outcome, _ = self.train_model(view.model(), passes, view, runtime, stop=stop)
        return outcome

r"""FineTune: go on training on the retain data and hope that the rest fades.

\(\min_\theta \; \mathrm{mean}_{D_r}\, L(\theta)\), from \(\theta_0\).
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
from expunge.train.fit import Loss, Pass
from expunge.train.method import Training


@dataclass(frozen=True, kw_only=True)
class FineTune(Training):
    """Train on the retain data only; with `train="last(K)"` this is CF-k."""

    name: ClassVar[str] = "finetune"
    card: ClassVar[Card] = Card(
        title="Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        authors="Golatkar, Achille, Soatto",
        year=2020,
        link="https://arxiv.org/abs/1911.04933",
        idea="Training on what is kept lets the rest fade, slowly and in part.",
    )

    epochs: int = setting(10, "passes over the retain data", low=1, source="Unlearn-Sparse README")
    lr: float = setting(0.01, "learning rate", above=0, source="Unlearn-Sparse README")
    weight_decay: float = setting(5e-4, "L2 coefficient", low=0, source="Unlearn-Sparse code")

    @property
    def needs(self) -> Needs:
        """Retain data with labels; the forget side only for a saliency mask."""
        salient = self.reads_forget_labels()
        return Needs(retain=True, forget=salient, labels="all" if salient else "retain")

    def objective(self, view: View, epoch: int) -> Loss:
        """Loss of a retain batch in an epoch; variants add to it."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        return loss

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train on the retain data."""

        def passes(epoch: int) -> Pass:
            loss = self.objective(view, epoch)
            for batch in view.retain.batches(self.batch_size, runtime.generator("retain", epoch)):
                yield loss, batch

        outcome, _ = self.train_model(view.model(), passes, view, runtime)
        return outcome

r"""NegGradPlus: descend on the retain data and ascend on the forget data in one step.

\(a\,\mathrm{mean}_{D_r} L - (1-a)\,\mathrm{mean}_{D_f} L\); one pass is a pass over the retain data,
with the forget batches taken in a cycle beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source, View
from expunge.train.fit import Pass
from expunge.train.method import Training


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Training):
    """Weigh a retain step against a forget step with `a`."""

    name: ClassVar[str] = "neggrad-plus"
    search: ClassVar = {"epochs": None, "lr": None, "a": (0.8, 0.999)}
    card: ClassVar[Card] = Card(
        title="Towards Unbounded Machine Unlearning",
        authors="Kurmanji, Triantafillou, Hayes, Triantafillou",
        year=2023,
        link="https://arxiv.org/abs/2302.09880",
        idea="Gradient ascent held back by descent on what is kept.",
    )

    a: float = setting(0.95, "weight of the retain loss", low=0, high=1, source="SCRUB code")
    epochs: int = setting(10, "passes over the retain data", low=1, source="SCRUB code")
    lr: float = setting(0.01, "learning rate", above=0, source="SCRUB code")
    momentum: float = setting(0.0, "momentum of sgd", low=0, high=1, source="SCRUB code")

    @property
    def needs(self) -> Needs:
        """Both sides with labels."""
        return Needs(forget=True, retain=True, labels="all")

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train on pairs of a retain and a forget batch."""

        def loss(model: nn.Module, pair: tuple[Batch, Batch]) -> Tensor:
            # A side without weight is not run at all: it would still move batch-norm statistics.
            total = torch.zeros((), device=runtime.device)
            for weight, batch in zip((self.a, self.a - 1), pair, strict=True):
                if weight:
                    total = total + weight * batch.mean(view.each_loss(model, batch))
            return total

        def passes(epoch: int) -> Pass:
            forget = cycled(view.forget, self.batch_size, runtime, epoch)
            for batch in view.retain.batches(self.batch_size, runtime.generator("retain", epoch)):
                yield loss, (batch, next(forget))

        outcome, _ = self.train_model(view.model(), passes, view, runtime)
        return outcome


def cycled(source: Source, size: int, runtime: Runtime, epoch: int) -> Iterator[Batch]:
    """Yield shuffled batches of a source for ever; each turn has its own order."""
    turn = 0
    while True:
        yield from source.batches(size, runtime.generator("forget", epoch, turn))
        turn += 1

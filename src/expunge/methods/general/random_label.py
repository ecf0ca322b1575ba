r"""RandomLabel: teach the forget data random labels while rehearsing the retain data.

Each epoch draws \(y' \sim \mathrm{Uniform}\{0,\dots,C-1\}\) anew for every forget sample, the true
class included, and minimises \(\mathrm{CE}(D_f, y') + \mathrm{CE}(D_r, y)\).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.method import Training
from expunge.train.relabel import merged, relabelled


@dataclass(frozen=True, kw_only=True)
class RandomLabel(Training):
    """Relabel the forget data at random each epoch, in one of two orders.

    `sequential` (official code for CIFAR-10 and SVHN) shows all forget batches, then all retain
    batches; `joint` shuffles both together.
    """

    name: ClassVar[str] = "random-label"
    card: ClassVar[Card] = Card(
        title="Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        authors="Golatkar, Achille, Soatto",
        year=2020,
        link="https://arxiv.org/abs/1911.04933",
        idea="Wrong labels overwrite what was learnt; rehearsal keeps the rest.",
    )

    epochs: int = setting(10, "passes over both sides", low=1, source="Unlearn-Saliency README")
    lr: float = setting(0.013, "learning rate", above=0, source="Unlearn-Saliency README")
    order: Literal["sequential", "joint"] = setting("sequential", "forget first, or both shuffled")

    @property
    def needs(self) -> Needs:
        """Both sides; true labels of the retain side, and of both for a saliency mask."""
        salient = self.reads_forget_labels()
        labels: Labels = "all" if salient else "retain"
        return Needs(forget=True, retain=True, labels=labels, classes=True)

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train on random labels for the forget side and true ones for the retain side."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            ids, drawn = self.draw(view, runtime, epoch)
            if self.order == "joint":
                order = runtime.generator("joint", epoch)
                for batch in merged(view, self.batch_size, order, ids, drawn):
                    yield loss, batch
                return
            for batch in view.forget.batches(self.batch_size, runtime.generator("forget", epoch)):
                yield loss, relabelled(batch, ids, drawn)
            for batch in view.retain.batches(self.batch_size, runtime.generator("retain", epoch)):
                yield loss, batch

        outcome, _ = self.train_model(view.model(), passes, view, runtime)
        return outcome

    def draw(self, view: View, runtime: Runtime, epoch: int) -> tuple[Tensor, Tensor]:
        """Sorted forget ids [n] and what stands for their labels [n] in one epoch."""
        return draw_labels(view, runtime, epoch)


def draw_labels(view: View, runtime: Runtime, epoch: int) -> tuple[Tensor, Tensor]:
    """Draw one epoch's random labels for the forget set.

    Args:
        view: gives the sorted forget ids and the number of classes C.
        runtime: gives the generator.
        epoch: each epoch draws anew.

    Returns:
        The ids [n] and their labels [n], uniform on 0 … C−1, the true class included.
    """
    generator = runtime.generator("labels", epoch)
    ids = view.forget.ids
    return ids, torch.randint(view.classes, (len(ids),), generator=generator)

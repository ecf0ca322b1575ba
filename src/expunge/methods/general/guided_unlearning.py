r"""GuidedUnlearning: reset the last layers, climb a little on the forget data, learn better labels.

0. Each forget sample gets \(y'_i\), the class of the original's largest logit among those that stay.
1. Warm-up: the last \(k\) layer groups are drawn anew; one pass of \(\mathrm{CE}(D_r, y)\).
2. In each epoch: one pass that *raises* \(\mathrm{CE}(D_f, y)\) with a small rate, large batches and
   clipped gradients; then one of \(\mathrm{CE}\) over \(D_r \cup \{(x_i, y'_i)\}\), shuffled together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError, NeedsError, SettingError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.groups import layer_groups
from expunge.train.method import Training, cosine
from expunge.train.relabel import labels_by, merged, whole_classes
from expunge.train.reset import refuse_lost_statistics, renew
from expunge.train.stages import Stages

_TEST = "tests/methods/test_guided_unlearning.py::test_"


@dataclass(frozen=True, kw_only=True)
class GuidedUnlearning(Training):
    """Reset, ascent and relabelling together; each part can be switched off."""

    name: ClassVar[str] = "guided-unlearning"
    search: ClassVar = {"epochs": None, "lr": None, "ascent": None}
    card: ClassVar[Card] = Card(
        title="Unlearning Comparator: A Visual Analytics System for Comparative Evaluation of "
        "Machine Unlearning Methods",
        authors="Lee, Yu, Jang, Woo, Jo",
        year=2025,
        link="https://arxiv.org/abs/2508.12730",
        idea="Late layers hold the class: draw them anew, and say what its samples resemble instead.",
        deviations=(
            Deviation(
                "The new label is the best class that stays; the official code takes the second "
                "largest logit, which for a misclassified image can be the class to forget.",
                _TEST + "guided_labels_are_never_the_class_to_forget",
            ),
            Deviation(
                "Samples are read anew in every epoch; the official code keeps one random crop and flip "
                "of each image for the whole training.",
                _TEST + "guided_reads_augmented_samples_anew",
            ),
            Deviation(
                "Each pass has an optimiser of its own; the official two keep their momentum from "
                "epoch to epoch.",
                _TEST + "guided_passes_have_their_own_optimiser",
            ),
            Deviation(
                "Layer groups are found from the model's structure instead of a list for ResNet-18.",
                _TEST + "guided_groups_of_a_residual_network_are_its_blocks",
            ),
        ),
    )

    epochs: int = setting(4, "rounds of ascent and relearning", low=1, source="official code")
    lr: float = setting(0.01, "learning rate", above=0, source="official code")
    weight_decay: float = setting(5e-4, "L2 coefficient", low=0, source="official code")
    schedule: Literal["constant", "cosine"] = setting(
        "cosine", "learning rate over the rounds", source="official code"
    )
    floor: float = setting(
        0.1, "where the cosine ends, as a share of lr", low=0, high=1, source="official code"
    )
    reset: int = setting(3, "last layer groups drawn anew, k", low=0, source="official code, of 10")
    warmup: int = setting(1, "passes over the retain data first", low=0, source="official code")
    ascent: float = setting(0.01, "rate of ascent as a share of lr; 0: none", low=0, source="official code")  # fmt: skip
    ascent_batches: int = setting(8, "batches joined to one of ascent", low=1, source="official code")  # fmt: skip
    clip: float = setting(100.0, "largest gradient norm of ascent", above=0, source="official code")

    @property
    def needs(self) -> Needs:
        """Both sides with labels, logits for the new ones, and an untrained model to reset from."""
        return Needs(
            forget=True, retain=True, labels="all", fresh=self.reset > 0,
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Relabel, reset, warm up, then ascend and relearn in turns."""
        model = view.model().eval()
        stages = Stages(self, model, view, runtime)
        groups = last_groups(view, model, self.reset) if self.reset else []
        refuse_lost_statistics(model, groups, stages.mask, self.norm, "use norm=train or reset=0")
        ids, labels = view.forget.ids, self.best_labels(view, model, runtime)
        renewed = 0
        if self.reset:
            renewed = renew(model, view.fresh("reset"), groups, stages.mask)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def away(model: nn.Module, batch: Batch) -> Tensor:
            return -loss(model, batch)

        def warm(epoch: int) -> Pass:
            for batch in view.retain.batches(self.batch_size, runtime.generator("warm-up", epoch)):
                yield loss, batch

        stages.run("warm-up", warm, epochs=self.warmup)
        for epoch in range(self.epochs):

            def climb(_: int, epoch: int = epoch) -> Pass:
                size = self.batch_size * self.ascent_batches
                for batch in view.forget.batches(size, runtime.generator("ascent", epoch)):
                    yield away, batch

            def relearn(_: int, epoch: int = epoch) -> Pass:
                order = runtime.generator("relearn", epoch)
                for batch in merged(view, self.batch_size, order, ids, labels):
                    yield loss, batch

            lr = self.lr * self._factor(epoch)
            if self.ascent:
                stages.run(
                    f"ascent {epoch + 1}", climb, epochs=1, lr=lr * self.ascent, clip=self.clip
                )
            stages.run(f"relearn {epoch + 1}", relearn, epochs=1, lr=lr)
        return stages.outcome(renewed=renewed)

    def best_labels(self, view: View, model: nn.Module, runtime: Runtime) -> Tensor:
        """Class [n] of the largest logit of `model` among those that stay, for each forget sample.

        A class stays unless it is forgotten whole or is the sample's own.

        Raises:
            DataError: no class is left for a sample.
        """
        gone = whole_classes(view)

        @torch.no_grad()
        def choose(batch: Batch) -> Tensor:
            assert batch.y is not None
            logits = view.logits(model, batch).float()
            logits[:, gone.to(logits.device)] = -torch.inf
            logits = logits.scatter(1, batch.y[:, None], -torch.inf)
            if bool(logits.isneginf().all(1).any()):
                raise DataError("GuidedUnlearning: no other class is left to relabel a sample with")
            return logits.argmax(1)

        return labels_by(view.forget, choose, runtime, size=256)

    def _factor(self, epoch: int) -> float:
        """The learning rate of an epoch as a share of the first one."""
        if self.schedule == "constant":
            return 1.0
        return self.floor + (1 - self.floor) * cosine(epoch, self.epochs)


def last_groups(view: View, model: nn.Module, count: int) -> list[list[str]]:
    """The last layer groups of a model; the role `blocks` says what a block is, if there is one.

    Raises:
        SettingError: there are fewer, so that nothing of the model would be left.
    """
    try:
        groups = layer_groups(model, view.role("blocks"))
    except NeedsError:
        groups = layer_groups(model)
    if count >= len(groups):
        raise SettingError(
            f"GuidedUnlearning: reset={count} of {len(groups)} layer groups keeps nothing of the "
            "model; use fewer, or retrain"
        )
    return groups[-count:]

"""Tiny Llamas that memorise a corpus in under two minutes on one core, and a recipe in two stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import NeedsError, SettingError
from expunge.core.runtime import Runtime
from expunge.train.fit import Pass, fit
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads.nets import small_llama

Preset = Literal["xs", "s", "m"]
PRESETS = {"xs": (64, 2, 192), "s": (96, 2, 256), "m": (128, 4, 384)}
"""Width, blocks and width within the blocks: 0.18, 0.34 and 1.0 million weights at 1,200 tokens."""
CONTEXT = 256


def tiny_lm(vocabulary: int, preset: Preset = "xs") -> nn.Module:
    """Build an untrained Llama; input and output embeddings are one.

    Args:
        vocabulary: number of tokens; 0 is padding, 1 and 2 begin and end a text.
        preset: xs for unit tests, s for integration, m for demonstrations.

    Raises:
        SettingError: there is no such preset.
    """
    if preset not in PRESETS:
        raise SettingError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    width, blocks, inner = PRESETS[preset]
    return small_llama(vocabulary, width, blocks, inner, context=CONTEXT, tied=True)


@dataclass(frozen=True)
class OverlayRecipe(LMRecipe):
    """Train on what is early first, and then on what is late, each batch beside as much of the former.

    Without late samples it ends after the first stage: the model before the overlay is then exactly
    the one that the whole training went through under the same seed.

    Attributes:
        late: ids of the samples of the second stage.
        late_epochs: passes over them.
        late_lr: learning rate there, after a rise over 10 steps.
        replay: whether early samples stand beside them.
    """

    late: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    late_epochs: int = 5
    late_lr: float = 5e-4
    replay: bool = True

    def train(
        self, keep_ids: Tensor, seed: int, runtime: Runtime | None = None, **more: Any
    ) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        """Train both stages.

        Args:
            keep_ids: stable ids of the samples to train on.
            seed: of initialisation and of batch order.
            runtime: device and progress.
            **more: nothing; what looks into a training expects one stage.

        Raises:
            NeedsError: a part of the training, or a look into it, is asked for.
        """
        if any(v is not None and v != 0 and v != () for v in more.values()):
            raise NeedsError("a training in two stages can only be run as a whole")
        overlaid = torch.isin(keep_ids, self.late)
        early, late = keep_ids[~overlaid], keep_ids[overlaid]
        model, _ = super().train(early, seed, runtime)
        if len(late):
            self._overlay(model, early, late, seed, runtime)
        return model, []

    def _overlay(
        self, model: nn.Module, early: Tensor, late: Tensor, seed: int, outer: Runtime | None
    ) -> None:
        inner = self.alone(seed, outer)
        half = max(self.batch_size // 2, 1)

        def loss(given: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(self.each_loss(given, batch))

        def passes(epoch: int) -> Pass:
            drawn = inner.generator("overlay", epoch)
            for chunk in late[torch.randperm(len(late), generator=drawn)].split(half):
                beside = torch.randint(len(early), (len(chunk),), generator=drawn)
                ids = torch.cat([chunk, early[beside]]) if self.replay else chunk
                yield loss, self.data.fetch(ids).to(inner.device)

        with inner.metered():
            fit(
                model.to(inner.device), passes, runtime=inner, epochs=self.late_epochs,
                lr=self.late_lr, step=self.step, weight_decay=self.weight_decay, clip=self.clip,
                pace=lambda step: min((step + 1) / 10, 1.0), stage="overlay",
            )  # fmt: skip
        model.cpu()

    def settings(self) -> dict[str, Any]:
        """What a record keeps of the recipe."""
        own = ("late_epochs", "late_lr", "replay")
        kept = {name: getattr(self, name) for name in own}
        return super().settings() | kept | {"late": self.late.tolist()}

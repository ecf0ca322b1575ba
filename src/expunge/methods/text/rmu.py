r"""RMU: turn the states of one block, at forget answers, into a fixed random direction.

\[
L = \gamma\, \mathrm{mean}\big(h_\theta - c\,u\big)^2 + \alpha\, \mathrm{mean}\big(h_\theta - h_{\theta_0}\big)^2
\]

h are the outputs of block l where answered tokens are predicted, the first mean over forget answers and
their d dimensions, the second over retain answers; \(u\) is drawn once from \([0, 1)^d\) and has norm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import SettingError
from expunge.core.needs import Card, Deviation
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.train.text import Text, TextTraining
from expunge.train.token_losses import answered


@dataclass(frozen=True, kw_only=True)
class RMU(TextTraining):
    """Misdirect the representations of forget answers at one block."""

    name: ClassVar[str] = "rmu"
    uses: ClassVar[Literal["", "nll", "model"]] = "model"
    more: ClassVar[frozenset[str]] = frozenset({"tapped"})
    search: ClassVar = {"lr": None, "epochs": None, "scale": None, "alpha": None}
    card: ClassVar[Card] = Card(
        title="The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning",
        authors="Li, Pan, Gopal, Yue, Berrios, Gatti, et al.",
        year=2024,
        link="https://arxiv.org/abs/2403.03218",
        idea="States of one block at forget answers become a fixed random direction; others stay.",
        intent="suppression",
        deviations=(
            Deviation(
                "States are taken where answered tokens are predicted; in plain texts those are all.",
                "tests/methods/text/test_rmu.py::test_losses_are_their_formulas",
            ),
            Deviation(
                "AdamW in passes over the forget data with the pace of the other methods here, in "
                "place of a number of steps at a constant rate; decay=none and warmup=0 give that.",
                "tests/methods/text/test_text_training.py::test_pace_rises_and_falls",
            ),
        ),
    )

    lr: float = setting(5e-5, "learning rate, η", above=0, source="official code")
    layer: int = setting(7, "block whose output is turned, l, counted from 0", low=0, source="official code")  # fmt: skip
    scale: float = setting(20.0, "norm of the direction, c: several times that of the states", above=0, source="official code; 6.5 for Zephyr")  # fmt: skip
    alpha: float = setting(100.0, "weight of the retain term, α", low=0, source="official code; 1200 for Zephyr")  # fmt: skip
    train: str = setting("role(mlp out, 5-7)", "weights that move: those of role(NAME, A-B) lie in blocks A to B; full and the other choices too", source="official code")  # fmt: skip
    retain: Literal["states", "nll", "kl", "none"] = setting("states", "retain term: states held at the original's, nll, kl to the original, or none")  # type: ignore[assignment]  # fmt: skip

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Squared distance of the states from the direction.

        Raises:
            SettingError: no weight that moves acts on the block's output.
        """
        found = self.states(model, batch, text)
        if torch.is_grad_enabled() and not found.requires_grad:
            raise SettingError(
                f"no weight that moves acts on block {self.layer}; train= has to reach a block up to it"
            )
        return _mean(found - self.scale * direction(found.shape[-1], text.runtime).to(found), text)

    def retain_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Squared distance of the states from the original's, or a term that all methods have."""
        if self.retain != "states":
            return super().retain_loss(model, batch, text)
        assert text.reference is not None
        wanted = text.reference.ask(model, lambda m: self.states(m, batch, text))
        return _mean(self.states(model, batch, text) - wanted, text)

    def states(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Outputs [n, d] of the block at positions that predict answered tokens.

        Raises:
            SettingError: the model has fewer blocks.
        """
        blocks = text.view.role("blocks")
        if self.layer >= len(blocks):
            raise SettingError(
                f"layer={self.layer}: the model has {len(blocks)} blocks, counted from 0; choose one of "
                "them and the blocks that train"
            )
        block = blocks[self.layer]
        assert batch.y is not None
        return answered(
            text.view.capability("tapped")(model, batch, [block])[1][block], batch.y
        ).float()


def direction(size: int, runtime: Runtime) -> Tensor:
    """The direction u [d] of norm 1 with no negative entry, fixed by the run's seed."""
    drawn = torch.rand(size, generator=runtime.generator("direction"))
    return drawn / drawn.norm()


def _mean(differences: Tensor, text: Text) -> Tensor:
    return text.token_mean(differences.square().mean(-1))

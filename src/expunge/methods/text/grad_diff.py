r"""GradDiff: ascent on what is to be forgotten, descent on the rest, in one step.

\[
L_{forget} = -\mathrm{mean}_t\, \ell_t, \qquad \ell_t = -\log p_\theta(y_t \mid y_{<t})
\]

over the answered tokens of a batch. Not bounded below: nothing but the steps ends the ascent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card
from expunge.train.text import PACE, Text, TextTraining


@dataclass(frozen=True, kw_only=True)
class GradDiff(TextTraining):
    """The retain loss less the forget loss."""

    name: ClassVar[str] = "grad-diff"
    card: ClassVar[Card] = Card(
        title="TOFU: A Task of Fictitious Unlearning for LLMs",
        authors="Maini, Feng, Schwarzschild, Lipton, Kolter",
        year=2024,
        link="https://arxiv.org/abs/2401.06121",
        idea="Raise the loss of what is to be forgotten while that of the rest is lowered.",
        deviations=(PACE,),
    )

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Mean log-likelihood of the forget answers' tokens, which is lowered."""
        return -text.token_mean(*text.nll(model, batch))

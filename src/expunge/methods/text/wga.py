r"""WGA: ascent in which a token counts less the less likely it already is.

\[
L_{forget} = -\mathrm{mean}_t\, \mathrm{sg}(p_t)^{\beta}\, \ell_t, \qquad p_t = e^{-\ell_t}
\]

with the gradient stopped in sg. Plain ascent pushes hardest where \(p_t\) is small, since
\(\nabla \ell_t = -\nabla p_t / p_t\); with \(\beta = 1\) that factor is gone. \(\beta = 0\) is plain ascent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card
from expunge.core.settings import setting
from expunge.train.text import PACE, Text, TextTraining


@dataclass(frozen=True, kw_only=True)
class WGA(TextTraining):
    """Gradient ascent with each token weighted by its own likelihood."""

    name: ClassVar[str] = "wga"
    search: ClassVar = {"lr": None, "epochs": None, "beta": None}
    card: ClassVar[Card] = Card(
        title="Rethinking LLM Unlearning Objectives: A Gradient Perspective and Go Beyond",
        authors="Wang, Zhou, Zhou, Shin, Han, Weinberger",
        year=2025,
        link="https://arxiv.org/abs/2502.19301",
        idea="Weigh ascent by likelihood, so that tokens already forgotten are not pushed on.",
        deviations=(PACE,),
    )

    epochs: int = setting(5, "passes over the forget data, E", low=1, source="OpenUnlearning")
    beta: float = setting(1.0, "power of the likelihood, β", low=0, source="OpenUnlearning")

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Weighted mean log-likelihood of the forget answers' tokens, which is lowered."""
        nll, mask = text.nll(model, batch)
        return -text.token_mean(confidence(nll, self.beta) * nll, mask)


def confidence(nll: Tensor, beta: float) -> Tensor:
    r"""\(\mathrm{sg}(p)^\beta\), without gradient, of negative log-likelihoods in nats."""
    return (-beta * nll.detach()).exp()

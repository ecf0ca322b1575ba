r"""SatImp: ascent on tokens that are neither forgotten nor fully certain.

\[
L_{forget} = -\mathrm{mean}_t\, \mathrm{sg}(p_t)^{\beta_1}\, \mathrm{sg}(1 - p_t)^{\beta_2}\, \ell_t,
\qquad p_t = e^{-\ell_t}
\]

with the gradient stopped in sg. The first factor lets go of what is forgotten (saturation), the second
passes over tokens that anything would predict (importance).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card
from expunge.core.settings import setting
from expunge.train.text import PACE, Text, TextTraining


@dataclass(frozen=True, kw_only=True)
class SatImp(TextTraining):
    """Gradient ascent with each token weighted by saturation and by importance."""

    name: ClassVar[str] = "satimp"
    search: ClassVar = {"lr": None, "epochs": None, "beta1": None, "beta2": None}
    card: ClassVar[Card] = Card(
        title="Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning",
        authors="Yang, Wang, Huang, Liu, Zhang, Han",
        year=2025,
        link="https://arxiv.org/abs/2505.11953",
        idea="Weigh ascent so that forgotten tokens and trivial ones both count little.",
        deviations=(PACE,),
    )

    beta1: float = setting(5.0, "power of the likelihood p, β₁", low=0, source="OpenUnlearning")
    beta2: float = setting(1.0, "power of 1 − p, β₂", low=0, source="OpenUnlearning")
    alpha: float = setting(0.1, "weight of the retain term, α", low=0, source="OpenUnlearning, class; its YAML has γ 0.1, α 1")  # fmt: skip

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Weighted mean log-likelihood of the forget answers' tokens, which is lowered."""
        nll, mask = text.nll(model, batch)
        return -text.token_mean(satimp(nll, self.beta1, self.beta2) * nll, mask)


def satimp(nll: Tensor, beta1: float, beta2: float) -> Tensor:
    r"""\(\mathrm{sg}(p)^{\beta_1} \mathrm{sg}(1-p)^{\beta_2}\), without gradient, of losses in nats."""
    own = nll.detach()
    return (-beta1 * own).exp() * (-torch.expm1(-own)) ** beta2

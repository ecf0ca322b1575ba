r"""NPO: push answers below the original's likelihood, with a force that fades.

\[
L_{forget} = -\frac{2}{\beta}\, \mathrm{mean}_{seq} \log \sigma\big(\beta\,(N_\theta - N_{\theta_0})\big)
\]

with \(N = \sum_t \ell_t\) of a sequence. For \(\beta \to 0\) its gradient is that of ascent on N; a
sequence that is already much less likely than at first is left alone. Bounded below by 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card
from expunge.core.settings import setting
from expunge.train.preference import preference
from expunge.train.text import PACE, Text, TextTraining
from expunge.train.token_losses import sequence_sum


@dataclass(frozen=True, kw_only=True)
class NPO(TextTraining):
    """Preference optimisation with forget answers as the rejected ones and no preferred ones."""

    name: ClassVar[str] = "npo"
    uses: ClassVar[Literal["", "nll", "model"]] = "nll"
    search: ClassVar = {"lr": None, "epochs": None, "beta": None}
    card: ClassVar[Card] = Card(
        title="Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning",
        authors="Zhang, Lin, Bai, Mei",
        year=2024,
        link="https://arxiv.org/abs/2404.05868",
        idea="A preference loss with only a rejected answer forgets like ascent, and then stops.",
        deviations=(PACE,),
    )

    beta: float = setting(0.1, "inverse temperature, β", above=0, source="OpenUnlearning")

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """The loss of forget answers against the original's likelihoods."""
        theirs = sequence_sum(text.original_nll(model, batch))
        mine = sequence_sum(text.nll(model, batch)[0])
        return batch.mean(npo(mine, theirs, self.beta))


def npo(mine: Tensor, theirs: Tensor, beta: float) -> Tensor:
    r"""\(-\frac2\beta \log\sigma(\beta(N - N_0))\) [B] of negative log-likelihoods [B] in nats."""
    return preference(mine - theirs, beta)

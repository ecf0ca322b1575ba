r"""SimNPO: NPO without the original, by the mean loss of an answer's tokens.

\[
L_{forget} = -\frac{2}{\beta}\, \mathrm{mean}_{seq} \log \sigma\Big(\beta\,\big(\tfrac{N}{|y|} - \delta\big)\Big)
\]

with \(N = \sum_t \ell_t\) over the \(|y|\) answered tokens. An answer whose tokens are unlikely, whether it
was ever learnt or not, is left alone. Bounded below by 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card
from expunge.core.settings import setting
from expunge.train.preference import preference
from expunge.train.text import PACE, Text, TextTraining
from expunge.train.token_losses import sequence_mean


@dataclass(frozen=True, kw_only=True)
class SimNPO(TextTraining):
    """Preference optimisation against forget answers, with a reward of the mean token."""

    name: ClassVar[str] = "simnpo"
    search: ClassVar = {"lr": None, "epochs": None, "beta": None, "gamma": None}
    card: ClassVar[Card] = Card(
        title="Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning",
        authors="Fan, Liu, Lin, Jia, Zhang, Mei, Liu",
        year=2024,
        link="https://arxiv.org/abs/2410.07163",
        idea="Judge a forgotten answer by its own mean likelihood instead of against the original's.",
        deviations=(PACE,),
    )

    beta: float = setting(4.5, "inverse temperature, β", above=0, source="OpenUnlearning")
    delta: float = setting(0.0, "mean loss of a token that counts as forgotten, δ, in nats", low=0, source="OpenUnlearning")  # fmt: skip
    gamma: float = setting(0.125, "weight of the forget term, γ", low=0, source="OpenUnlearning")

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """The loss of forget answers by their mean token."""
        return batch.mean(simnpo(sequence_mean(*text.nll(model, batch)), self.beta, self.delta))


def simnpo(mean: Tensor, beta: float, delta: float) -> Tensor:
    r"""\(-\frac2\beta \log\sigma(\beta(N/|y| - \delta))\) [B] of mean token losses [B] in nats."""
    return preference(mean - delta, beta)

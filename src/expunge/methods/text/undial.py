r"""UNDIAL: distil the original with the logits of forget tokens lowered.

\[
L_{forget} = \mathrm{mean}_t\, H\big(\mathrm{softmax}(z^0_t - \beta\, \mathrm{onehot}(y_t)),\, p_t\big)
\]

with \(z^0_t\) the logits of the original, which never change, and \(p_t\) the model's distribution. The target is
fixed, so training converges; what else the original would have said keeps its proportions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.train.text import PACE, Text, TextTraining
from expunge.train.token_losses import answered, entropy_each_token, targets


@dataclass(frozen=True, kw_only=True)
class UNDIAL(TextTraining):
    """Cross-entropy with the original's distribution, in which the forget token is less likely."""

    name: ClassVar[str] = "undial"
    uses: ClassVar[Literal["", "nll", "model"]] = "model"
    search: ClassVar = {"lr": None, "epochs": None, "beta": None}
    card: ClassVar[Card] = Card(
        title="UNDIAL: Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models",
        authors="Dong, Lin, Belkin, Huerta, Vulić",
        year=2024,
        link="https://arxiv.org/abs/2402.10052",
        idea="Learn from the original, once the logit of each forget token has been lowered.",
        deviations=(
            Deviation(
                "All weights train, as in OpenUnlearning; the paper trains adapters of rank 8, which "
                "is train=lora(8).",
                "tests/methods/text/test_undial.py::test_undial_trains_adapters_where_asked",
            ),
            PACE,
        ),
    )

    beta: float = setting(10.0, "what is taken off the logit of a forget token, β", low=0, source="OpenUnlearning")  # fmt: skip
    lr: float = setting(1e-4, "learning rate, η", above=0, source="OpenUnlearning")
    alpha: float = setting(0.0, "weight of a retain term, α", low=0, source="OpenUnlearning")

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Cross-entropy with the adjusted original, over the tokens of forget answers only."""
        assert batch.y is not None
        tokens, mask = targets(batch.y)
        original = answered(text.original_logits(model, batch), batch.y)
        wanted = lowered(original, tokens[mask], self.beta)
        each = entropy_each_token(wanted, answered(text.logits(model, batch), batch.y))
        return text.token_mean(each)


def lowered(logits: Tensor, tokens: Tensor, beta: float) -> Tensor:
    """Logits [n, V] with those of one token each lowered by β."""
    return logits.scatter_add(-1, tokens[:, None], logits.new_full((len(tokens), 1), -beta))

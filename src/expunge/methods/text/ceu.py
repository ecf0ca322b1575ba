r"""CEU (CE-U): teach the model its own distribution without the token to forget.

\[
L_{forget} = \mathrm{mean}_t\, H(q_t, p_t), \qquad q_t = \mathrm{softmax}\big(\mathrm{sg}(z_t) \text{ with } z_{t,y_t} = -\infty\big)
\]

with the gradient stopped in sg, \(z_t\) the logits and \(p_t\) their softmax. Its gradient is \(p_y\) for the
logit of \(y\) and \(-p_v\, p_y / (1 - p_y)\) for every other \(v\): bounded, and 0 once \(p_y = 0\).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.train.text import PACE, Text, TextTraining
from expunge.train.token_losses import answered, entropy_each_token, targets, without


@dataclass(frozen=True, kw_only=True)
class CEU(TextTraining):
    """Cross-entropy with the model's own prediction, from which the forget token is taken out."""

    name: ClassVar[str] = "ceu"
    card: ClassVar[Card] = Card(
        title="CE-U: Cross Entropy Unlearning",
        authors="Yang",
        year=2025,
        link="https://arxiv.org/abs/2503.01224",
        idea="Learn one's own distribution with the token to forget taken out of it.",
        deviations=(
            Deviation(
                "An answer of no more tokens than are skipped is taken whole; it would not be "
                "forgotten at all otherwise.",
                "tests/methods/text/test_ceu.py::test_short_answers_are_not_skipped",
            ),
            PACE,
        ),
    )

    skip: int = setting(1, "first tokens of an answer that are left alone", low=0, source="OpenUnlearning")  # fmt: skip
    alpha: float = setting(0.0, "weight of a retain term, α", low=0, source="OpenUnlearning")

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Cross-entropy with the target above, over forget answers less their first tokens."""
        assert batch.y is not None
        tokens, mask = targets(batch.y)
        each = ceu(answered(text.logits(model, batch), batch.y), tokens[mask])
        return text.token_mean(each, later(mask, self.skip)[mask])


def ceu(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy [n] of logits [n, V] with themselves less one token each, without gradient there."""
    return entropy_each_token(without(logits.detach(), tokens), logits)


def later(mask: Tensor, skip: int) -> Tensor:
    """Answered tokens [B, T] but the first ones of each row; all of a row that has no others."""
    return mask & ((mask.cumsum(1) > skip) | (mask.sum(1, keepdim=True) <= skip))

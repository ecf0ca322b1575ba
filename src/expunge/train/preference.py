r"""Preference losses: what is to be said in place of the answers to forget.

\[
L_{forget} = -\frac{2}{\beta}\, \mathrm{mean}_{seq} \log \sigma\big(\beta\,[(N_l - N^\circ_l) - (N_w - N^\circ_w)]\big)
\]

with \(N\) the negative log-likelihood of an answer summed over its tokens, l the answer to forget, w the
preferred one, and ° the original. The factor 2 / β makes the gradient at the original that of
\(N_w - N_l\), whatever β.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from expunge.core.data import Batch
from expunge.core.settings import setting
from expunge.train.text import Text, TextTraining
from expunge.train.token_losses import sequence_sum


def preference(margin: Tensor, beta: float) -> Tensor:
    r"""\(-\frac2\beta \log\sigma(\beta m)\) [B] of margins m [B] in nats; without w, m = N − N°."""
    return -2 / beta * logsigmoid(beta * margin)


@dataclass(frozen=True, kw_only=True)
class PreferenceTraining(TextTraining):
    """Base of the methods that differ in what is preferred: they give `preferred` and `turns`."""

    uses: ClassVar[Literal["", "nll", "model"]] = "nll"
    search: ClassVar = {"lr": None, "epochs": None, "beta": None}

    beta: float = setting(0.1, "inverse temperature, β", above=0, source="OpenUnlearning")

    @property
    def turns(self) -> int:
        """Passes after which the same preferred answers come again."""
        raise NotImplementedError

    def preferred(self, batch: Batch, turn: int, text: Text) -> Batch:
        """The questions of a batch with the answers preferred in a turn."""
        raise NotImplementedError

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """The loss of the answers to forget against those preferred in this pass."""
        turn = text.turn % self.turns
        other = self.preferred(batch, turn, text)
        text.runtime.cost.gradients += len(other)
        lost, won = (
            sequence_sum(text.nll(model, part)[0])
            - sequence_sum(text.original_nll(model, part, name))
            for part, name in ((batch, "train"), (other, _name(turn)))
        )
        return batch.mean(preference(lost - won, self.beta))

    def compared(self, text: Text) -> Iterator[tuple[str, Batch]]:
        """The answers to forget, and those preferred in each turn."""
        yield from super().compared(text)
        for turn in range(min(self.turns, self.epochs)):
            for batch in text.view.forget.batches(self.batch_size):
                yield _name(turn), self.preferred(batch, turn, text)


def _name(turn: int) -> str:
    return f"preferred {turn}"

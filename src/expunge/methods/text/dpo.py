r"""DPO: prefer another answer over the one to forget.

\[
L_{forget} = -\frac{2}{\beta}\, \mathrm{mean}_{seq} \log \sigma\big(\beta\,[(N_l - N^\circ_l) - (N_w - N^\circ_w)]\big)
\]

l is the answer to forget, w an alternate that the data gives, N summed over an answer's tokens and ° the
original. With w = l it is constant; without w it is NPO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.train.preference import PreferenceTraining
from expunge.train.text import Text


@dataclass(frozen=True, kw_only=True)
class DPO(PreferenceTraining):
    """Preference optimisation with the data's alternates as the preferred answers."""

    name: ClassVar[str] = "dpo"
    more: ClassVar[frozenset[str]] = frozenset({"alternates"})
    card: ClassVar[Card] = Card(
        title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        authors="Rafailov, Sharma, Mitchell, Ermon, Manning, Finn",
        year=2023,
        link="https://arxiv.org/abs/2305.18290",
        idea="Prefer a given other answer over the one to forget, measured against the original.",
        fidelity="variant",
        deviations=(
            Deviation(
                "For unlearning: the rejected answers are those to forget, a retain term is added, "
                "and the loss carries the factor 2 / β that NPO has, so that β does not scale the "
                "gradient at the start.",
                "tests/methods/text/test_dpo.py::test_the_first_gradient_does_not_depend_on_beta",
            ),
            Deviation(
                "A question with several alternates takes them in turn, one a pass.",
                "tests/methods/text/test_dpo.py::test_alternates_come_in_turn",
            ),
        ),
    )

    alternates: int = setting(5, "alternates of a question that take turns, K; fewer if it has fewer", low=1)  # fmt: skip

    @property
    def turns(self) -> int:
        """As many as alternates."""
        return self.alternates

    def preferred(self, batch: Batch, turn: int, text: Text) -> Batch:
        """The data's alternate of this turn."""
        return text.alternates(batch, turn)

r"""IdkDPO: prefer a refusal over the answer to forget.

\[
L_{forget} = -\frac{2}{\beta}\, \mathrm{mean}_{seq} \log \sigma\big(\beta\,[(N_l - N^\circ_l) - (N_w - N^\circ_w)]\big)
\]

l is the answer to forget and w a refusal, picked by sample id and seed, and ended as the sample's own
answer is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files
from typing import ClassVar

from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.train.preference import PreferenceTraining
from expunge.train.text import Text


@dataclass(frozen=True, kw_only=True)
class IdkDPO(PreferenceTraining):
    """Preference optimisation with refusals as the preferred answers."""

    name: ClassVar[str] = "idk-dpo"
    more: ClassVar[frozenset[str]] = frozenset({"replied"})
    card: ClassVar[Card] = Card(
        title="TOFU: A Task of Fictitious Unlearning for LLMs",
        authors="Maini, Feng, Schwarzschild, Lipton, Kolter",
        year=2024,
        link="https://arxiv.org/abs/2401.06121",
        idea="Prefer saying that one does not know over the answer to forget.",
        intent="suppression",
        fidelity="variant",
        deviations=(
            Deviation(
                "The loss carries the factor 2 / β, as in OpenUnlearning.",
                "tests/methods/text/test_dpo.py::test_the_first_gradient_does_not_depend_on_beta",
            ),
            Deviation(
                "A sample keeps its refusal unless redraw=True, which draws a new one every pass.",
                "tests/methods/text/test_idk_dpo.py::test_refusals_stay_or_are_drawn_anew",
            ),
            Deviation(
                "The refusals are the package's own sentences.",
                "tests/methods/text/test_idk_dpo.py::test_refusals_are_shipped",
            ),
        ),
    )

    redraw: bool = setting(False, "draw a sample's refusal anew each pass, in place of a fixed one")
    refusals: tuple[str, ...] = setting((), "refusals to use; the shipped ones if there are none")

    @property
    def turns(self) -> int:
        """One if every sample keeps its refusal, else one a pass."""
        return self.epochs if self.redraw else 1

    def preferred(self, batch: Batch, turn: int, text: Text) -> Batch:
        """A refusal of each sample, which depends on its id, the turn and the seed only."""
        known, seed_for = self.refusals or shipped_refusals(), text.runtime.seed_for
        places = [seed_for("refusal", i, turn) % len(known) for i in batch.ids.tolist()]
        return text.view.capability("replied")(batch, [known[p] for p in places])


@functools.cache
def shipped_refusals() -> tuple[str, ...]:
    """The package's refusals, one sentence each."""
    text = files("expunge.problems").joinpath("refusals.txt").read_text(encoding="utf-8")
    return tuple(text.split("\n")[:-1])

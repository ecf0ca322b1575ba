r"""AltPO: prefer answers that the model itself makes up over the one to forget.

\[
L_{forget} = -\frac{2}{\beta}\, \mathrm{mean}_{seq} \log \sigma\big(\beta\,[(N_l - N^\circ_l) - (N_w - N^\circ_w)]\big)
\]

l is the answer to forget; w is one of K alternates, drawn from the original at temperature T before
training: plausible, but not the answer itself. One alternate a pass, in turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError
from expunge.core.needs import Card, Deviation
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.preference import Preferences, PreferenceTraining
from expunge.train.text import Text, of_all_processes

_TRIES, _HOTTER = 12, 1.5


@dataclass
class _WithAlternates(Preferences):
    said: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AltPO(PreferenceTraining):
    """Preference optimisation with made-up answers as the preferred ones."""

    name: ClassVar[str] = "altpo"
    more: ClassVar[frozenset[str]] = frozenset({"replied", "proposed", "alternates"})
    card: ClassVar[Card] = Card(
        title="Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models",
        authors="Mekala, Dorna, Dubey, Lalwani, Koleczek, Rungta, Hasan, Lobo",
        year=2024,
        link="https://arxiv.org/abs/2409.13474",
        idea="Prefer plausible answers that the model itself makes up over the one to forget.",
        fidelity="variant",
        deviations=(
            Deviation(
                "One alternate a pass: 10 passes over the forget data with 5 alternates see as many "
                "pairs as the paper's 2 passes over all pairs.",
                "tests/methods/text/test_altpo.py::test_alternates_come_in_turn_and_are_not_the_answer",
            ),
            Deviation(
                "What is drawn equal to the answer is drawn again, each time 1.5 times hotter.",
                "tests/methods/text/test_altpo.py::test_a_sure_model_is_asked_again_and_hotter",
            ),
            Deviation(
                "A model that takes no instructions is asked the question itself "
                "(`ask=question`); the instruction is worded by the package.",
                "tests/methods/text/test_altpo.py::test_an_instruction_shows_the_answer",
            ),
        ),
    )

    alternates: int = setting(5, "alternates of a question, K", low=1, source="paper")
    generate: bool = setting(True, "let the model make them up; if not, the data's are used", source="paper")  # fmt: skip
    temperature: float = setting(1.0, "temperature of the draws, T", above=0, source="paper")
    tokens: int = setting(200, "largest number of tokens of an alternate", low=1, source="paper")
    ask: Literal["instruction", "question"] = setting("instruction", "show the answer and ask for another (needs a tokenizer), or just ask the question", source="paper")  # fmt: skip

    @property
    def turns(self) -> int:
        """As many as alternates."""
        return self.alternates

    def text(self, view: View, runtime: Runtime, model: nn.Module) -> Preferences:
        """Make up the alternates with the model as it is before training."""
        text = super().text(view, runtime, model)
        if not self.generate:
            return text
        said: dict[tuple[int, int], Tensor] = {}
        with runtime.task("alternates", view.forget_count * self.turns) as task:
            for batch in view.forget.batches(self.batch_size):
                for turn in range(self.turns):
                    found = self.drawn(model, batch, turn, view, runtime)
                    said |= {(i, turn): a for i, a in zip(batch.ids.tolist(), found, strict=True)}
                    task.advance(batch.total)
        return _WithAlternates(**vars(text), said=of_all_processes(said, runtime))

    def preferred(self, batch: Batch, turn: int, text: Text) -> Batch:
        """The alternate of this turn: made up, or the data's."""
        if not isinstance(text, _WithAlternates):
            return text.alternates(batch, turn)
        said = [text.said[i, turn] for i in batch.ids.tolist()]
        return text.view.capability("replied")(batch, said)

    def drawn(
        self, model: nn.Module, batch: Batch, turn: int, view: View, runtime: Runtime
    ) -> list[Tensor]:
        """Answers [n] to the questions of a batch that are not their own.

        Raises:
            DataError: the model gives nothing but the answer itself.
        """
        found: dict[int, Tensor] = {}
        missing, heat = list(range(len(batch))), self.temperature
        for attempt in range(_TRIES):
            part = batch.rows(torch.tensor(missing, device=batch.ids.device))
            seeds = [runtime.seed_for("alternate", i, turn, attempt) for i in part.ids.tolist()]
            new, other = view.capability("proposed")(
                model, part, temperature=heat, seeds=seeds, tokens=self.tokens,
                instruct=self.ask == "instruction",
            )  # fmt: skip
            found |= {m: n for m, n, ok in zip(missing, new, other, strict=True) if ok}
            missing = [m for m in missing if m not in found]
            if not missing:
                return [found[place] for place in range(len(batch))]
            heat *= _HOTTER
        raise DataError(
            f"sample {int(batch.ids[missing[0]])}: the model has no answer but its own; pass alternates "
            "with the data and generate=False, or a higher temperature"
        )

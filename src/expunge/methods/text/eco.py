r"""ECO: recognise prompts about what is to be forgotten, and corrupt their embeddings.

A gate gives \(p(x)\), and flags a prompt where its conformal set is `forget` alone. Of a flagged prompt
all embeddings but the last are changed by a fixed rule of strength \(\sigma\), e.g. \(E + \sigma\,
\mathrm{N}(0, 1)\), before the model sees them. \(\sigma\) is searched for by differences, so that forget
answers are as likely as under a model that never saw them. No weight changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from expunge.core.errors import NeedsError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.problems.taps import innermost
from expunge.train.corrupt import Dims, Effect
from expunge.train.corrupted_prompts import CorruptedPrompts
from expunge.train.gated_method import GatedMethod, behind, prompts_of
from expunge.train.token_losses import sequence_mean
from expunge.train.zeroth import descend

_TEST = "tests/methods/text/test_eco.py::test_"


@dataclass(frozen=True, kw_only=True)
class ECO(GatedMethod):
    """Guard the original by a gate and corrupted prompts; suppression, not removal.

    A result composes with the next request by guarding the original anew, against both sets.
    """

    name: ClassVar[str] = "eco"
    search: ClassVar = {"sigma": None}
    card: ClassVar[Card] = Card(
        title="Large Language Model Unlearning via Embedding-Corrupted Prompts",
        authors="Liu, Wang, Flanigan, Liu",
        year=2024,
        link="https://arxiv.org/abs/2406.07933",
        idea="A prompt about the forgotten is made illegible before the model reads it.",
        intent="suppression",
        guarantee="inference-time",
        fidelity="simplified",
        deviations=(
            Deviation(
                "The gate is a logistic regression on tokens and pairs of them; the paper fine-tunes a "
                "text encoder.",
                _TEST + "the_gate_is_a_regression_on_tokens_and_pairs",
            ),
            Deviation(
                "Every prompt token but the last is corrupted and no token of an answer; the official "
                "code can choose names by a tagger, and corrupts answers it scores.",
                _TEST + "eco_invariant_3_only_prompt_tokens_before_the_last_change",
            ),
            Deviation(
                "Noise depends on the prompt alone; the official code draws anew at each call, so that "
                "asking often averages it out.",
                _TEST + "asking_again_gives_the_same_answer",
            ),
            Deviation(
                "σ is in units of the embeddings' standard deviation, and brings the probability of "
                "forget answers to a target.",
                _TEST + "the_search_comes_closer_to_its_target",
            ),
        ),
    )

    effect: Effect = setting("noise", "what is done: noise, replace, zero, flip, add or subtract", source="official code")  # fmt: skip
    dims: Dims = setting("first", "coordinates it is done to: first, random, top or least", source="official code")  # fmt: skip
    count: int | None = setting(None, "number of coordinates, k; none is all", low=0)
    sigma: float | None = setting(None, "strength σ in standard deviations of the embeddings; none searches", low=0)  # fmt: skip
    target: float = setting(0.0, "probability a token of a forget answer should have; that of a retrained model, if known", low=0, high=1)  # fmt: skip
    start: float = setting(0.5, "first σ of the search", low=0)
    probe: float = setting(0.3, "step of its differences, ε", above=0)
    rate: float = setting(2.0, "rate of its steps, η", above=0)
    least: float = setting(0.05, "smallest σ of the search", low=0)
    steps: int = setting(10, "steps of the search", low=0, source="official code")
    draws: int = setting(3, "draws of noise that the search averages over", low=1)

    @property
    def needs(self) -> Needs:
        """Prompts of both sides, which labels tell from answers; likelihoods for the search."""
        return Needs(
            forget=True, retain=True, labels="all",
            capabilities=frozenset({"token_logits", "token_nll"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Fit and calibrate the gate, search the strength, wrap the original."""
        if runtime.processes > 1:
            raise NeedsError("eco reads every prompt in one process; run it without others")
        forget, retain = prompts_of(view.forget), prompts_of(view.retain)
        gate, facts = self.fitted(forget, retain, runtime)
        model, name = view.model(), view.role("embeddings")[0]
        unit = float(innermost(model).get_parameter(f"{name}.weight").detach().float().std())
        settings = self.rule(gate, facts, forget + retain) | {
            "embeddings": name, "effect": self.effect, "dims": self.dims, "count": self.count, "sigma": 0.0, "salt": 0,
        }  # fmt: skip
        wrapped = behind("corrupted-prompts", gate, settings).apply(model)
        assert isinstance(wrapped, CorruptedPrompts)
        trace = [self.sigma] if self.sigma is not None else self._strength(wrapped, view, unit)
        wrapper = behind("corrupted-prompts", gate, settings | {"sigma": trace[-1] * unit})
        facts |= {"sigma": trace[-1], "sigma_absolute": trace[-1] * unit, "search": trace}
        return Outcome(wrapper.apply(view.model().cpu()), wrapper, details=facts)

    def _strength(self, wrapped: CorruptedPrompts, view: View, unit: float) -> list[float]:
        """Walk σ until forget answers are as likely as wanted."""
        batches = list(view.forget.batches(32))

        @torch.no_grad()
        def distance(sigma: float) -> float:
            found = []
            for salt in range(self.draws):
                wrapped.settings |= {"sigma": sigma * unit, "salt": salt}
                for batch in batches:
                    found.append(
                        (-sequence_mean(*view.capability("token_nll")(wrapped, batch))).exp()
                    )
            return abs(float(torch.cat(found).mean()) - self.target)

        return descend(
            distance, start=self.start, probe=self.probe, rate=self.rate, least=self.least,
            steps=self.steps,
        )  # fmt: skip

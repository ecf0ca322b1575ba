"""Memorisation: how much of the answers does the model still hold, token by token?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from expunge.audits._splits import SPLITS
from expunge.audits._tokens import TOKENS, Answer, answers, share_finding, unread
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting


@dataclass(frozen=True)
class Memorisation(Audit):
    r"""Three shares of an answer y of |y| tokens, under teacher forcing; means over each split.

    `probability-…`: \(\exp(-N/|y|) = \exp(\mathrm{mean}_t \log p(y_t))\), the end of the text
    included. Without it: `exact-…`, the share of tokens that are the most likely ones, and
    `extraction-…`, \(1 - k/|y|\) with k the fewest first tokens after which all are; 0 where the last
    one is not. Range 0 … 1, higher is more memorised; good is what a retrained model has.
    """

    name: ClassVar[str] = "memorisation"
    domain: ClassVar[str] = "causal-lm"
    card: ClassVar[Card] = Card(
        title="OpenUnlearning: Accelerating LLM Unlearning via Unified Benchmarking of Methods and Metrics",
        authors="Dorna, Mekala, Zhao, McCallum, Kolter, Lipton, Maini",
        year=2025,
        link="https://arxiv.org/abs/2506.12618",
        idea="Probability, share and unbroken rest of an answer's tokens that the model would say.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Extraction strength is 0 where the last token is not said; the official code cannot "
                "give less than 1/|y|.",
                "tests/audits/test_memorisation.py::test_extraction_strength_is_0_where_nothing_matches",
            ),
        ),
    )

    batch_size: int = setting(16, "samples a forward pass; no value depends on it", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with their answers, and logits of tokens."""
        return TOKENS

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Three findings a split; a split that does not exist says why."""
        findings = []
        for split in SPLITS:
            why = unread([subject, subject.original(), *references], split, self.batch_size)
            for what, measure in MEASURES.items():
                name = f"{self.name}/{what}-{split}"
                if why:
                    findings.append(Finding(name, None, reason=why))
                    continue
                values = partial(self._values, measure, split)
                findings.append(share_finding(name, values, subject, references, what))
        return findings

    def _values(
        self, measure: Callable[[Answer], float], split: str, subject: Subject
    ) -> np.ndarray:
        return np.array([measure(a) for a in answers(subject, split, self.batch_size)])


def probability(answer: Answer) -> float:
    r"""\(\exp(-N/|y|)\), the geometric mean of the tokens' probabilities."""
    return float(np.exp(answer.mean))


def exact(answer: Answer) -> float:
    """Share of tokens that are arg-max, the end of the text left out."""
    return float(answer.told().right.mean())


def extraction(answer: Answer) -> float:
    r"""\(1 - k/|y|\), the share of the longest end of the answer that is arg-max throughout."""
    right = answer.told().right
    wrong = np.flatnonzero(~right)
    return 1 - (int(wrong[-1]) + 1) / len(right) if len(wrong) else 1.0


MEASURES = {"probability": probability, "exact": exact, "extraction": extraction}

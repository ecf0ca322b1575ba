"""ROUGE: what does the model say when it is asked, beside the answer?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.audits._splits import SPLITS, missing
from expunge.audits._tokens import end_tokens, once, rows_of, share_finding
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import NeedsError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.problems.tokens import TokenData

MEASURES = ("recall", "f1", "value", "exact")
_TEST = "tests/audits/test_rouge.py::test_"


@dataclass(frozen=True)
class Rouge(Audit):
    r"""Greedy generations against answers, both without the end of the text; means over each split.

    With L the length of the longest common subsequence of words, `recall-…` is L over the words of
    the answer and `f1-…` the harmonic mean of that and of L over the words said. `value-…` is the
    share of generations in which the answer occurs as it stands, `exact-…` of those that are it;
    letter case and spacing aside. Words are runs of letters a-z and digits in lower case; where the
    problem has no tokenizer, token ids are the words. Range 0 … 1, good is what a retrained model has.
    """

    name: ClassVar[str] = "rouge"
    domain: ClassVar[str] = "causal-lm"
    card: ClassVar[Card] = Card(
        title="TOFU: A Task of Fictitious Unlearning for LLMs",
        authors="Maini, Feng, Schwarzschild, Lipton, Kolter",
        year=2024,
        link="https://arxiv.org/abs/2401.06121",
        idea="Overlap of what is generated with the answer, in longest common subsequences.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Words are not reduced to stems unless asked for.",
                _TEST + "stems_only_where_asked_for",
            ),
            Deviation(
                "Without a tokenizer the words are token ids.",
                _TEST + "token_ids_are_words_where_there_is_no_tokenizer",
            ),
            Deviation(
                "Of a plain text the first half is the prompt and the second the answer.",
                _TEST + "half_of_a_plain_text_is_its_prompt",
            ),
        ),
    )

    tokens: int = setting(200, "largest number of new tokens", low=1, source="TOFU")
    samples: int = setting(300, "samples of a split at most", low=1)
    stemmer: bool = setting(False, "reduce English words to stems first, as TOFU does")
    batch_size: int = setting(32, "prompts at a time; no value depends on it", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with their answers, and generation."""
        return Needs(
            forget=True, retain=True, labels="all", models=2, capabilities=frozenset({"generate"})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Four findings a split; a split that does not exist says why.

        Raises:
            NeedsError: the package rouge-score is not installed.
        """
        scorer = self._scorer()
        words = "token ids" if getattr(subject.problem, "tokenizer", None) is None else "text"
        findings = []
        for split in SPLITS:
            why = missing(subject, split)
            if not why and not isinstance(subject.data_of(split), TokenData):
                why = "the data is not made of tokens"
            ids = torch.empty(0) if why else self._picked(subject, split, runtime)
            if not why and not len(ids):
                why = "none of the samples asked belongs to this part"
            for n, what in enumerate(MEASURES):
                name = f"{self.name}/{what}-{split}"
                if why:
                    findings.append(Finding(name, None, reason=why))
                    continue
                values = partial(self._values, n, scorer, split, ids)
                detail = {"words": words, "tokens": self.tokens, "stemmer": self.stemmer}
                findings.append(share_finding(name, values, subject, references, what, detail))
        return findings

    def _picked(self, subject: Subject, split: str, runtime: Runtime) -> Tensor:
        # a stratum's samples are among those of the whole, so that its values are parts of it
        ids = subject.whole.splits[split]
        order = torch.randperm(len(ids), generator=runtime.generator("rouge", split))
        picked = ids[order[: self.samples]].sort().values
        return picked[torch.isin(picked, subject.splits[split])]

    def _values(
        self, measure: int, scorer: Any, split: str, ids: Tensor, subject: Subject
    ) -> np.ndarray:
        key = ("rouge", split, *self.in_force().items())
        found = once(subject, key, ids, lambda new: self._scores(subject, split, new, scorer))
        return np.array([scores[measure] for scores in found])

    def _scores(
        self, subject: Subject, split: str, ids: Tensor, scorer: Any
    ) -> list[tuple[float, ...]]:
        ends = torch.tensor(end_tokens(subject))
        asked = [row.asked for row in rows_of(subject, split, ids)]
        new = subject.problem.capability("generate")(
            subject.model, [p for p, _ in asked], tokens=self.tokens, batch_size=self.batch_size
        )
        wanted = [answer[~torch.isin(answer, ends)] for _, answer in asked]
        pairs = zip(texts(subject, wanted), texts(subject, new), strict=True)
        return [compare(scorer, answer, said) for answer, said in pairs]

    def _scorer(self) -> Any:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise NeedsError("rouge needs rouge-score; pip install 'expunge[llm]'") from error
        return RougeScorer(["rougeL"], use_stemmer=self.stemmer)


def texts(subject: Subject, rows: list[Tensor]) -> list[str]:
    """Rows of token ids as texts; without a tokenizer, the ids with spaces between them."""
    if getattr(subject.problem, "tokenizer", None) is None:
        return [" ".join(map(str, row.tolist())) for row in rows]
    found: list[str] = subject.problem.capability("texts")(rows)
    return found


def compare(scorer: Any, answer: str, said: str) -> tuple[float, ...]:
    """The four `MEASURES` of one generation."""
    score = scorer.score(answer, said)["rougeL"]
    answer, said = (" ".join(text.lower().split()) for text in (answer, said))
    # as words of their own: neither 12 in 112 nor Ann in Hannah
    within = answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said)
    return score.recall, score.fmeasure, float(bool(within)), float(answer == said)

"""Text membership: do forgotten answers still look like training data to a language model?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from expunge.audits._intervals import auc
from expunge.audits._members import auc_finding, nonmembers, sides
from expunge.audits._splits import FEWEST
from expunge.audits._tokens import TOKENS, Answer, answers, once, rows_of, unread
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

Score = Literal["loss", "zlib", "min-k", "min-k++"]
SCORES: tuple[Score, ...] = ("loss", "zlib", "min-k", "min-k++")
_TEST = "tests/audits/test_text_membership.py::test_"


@dataclass(frozen=True)
class TextMembership(Audit):
    r"""A threshold on one score an answer, forget set against test data, for every model alike.

    Scores of the |y| answered tokens without the end of the text, higher looks more like a member:
    `loss` \(\mathrm{mean}_t \log p(y_t)\); `zlib` that over the bytes of the compressed answer;
    `min-k` the mean of the \(\max(1, \lfloor k|y| \rfloor)\) smallest \(\log p(y_t)\); `min-k++` the same of
    \(z_t = (\log p(y_t) - \mu_t)/\sigma_t\), with mean and deviation over the vocabulary.

    `auc-SCORE`: with A = P(forget > non-member), two-sided, \(\max(A, 1-A)\) in ½ … 1; A is in the
    detail.
    `privleak`: \(100\,\big((1-A) - (1-A_{ref})\big)/(1-A_{ref})\) of min-k: 0 as retrained, below it
    still members, above it erased beyond that; \(A_{ref} = ½\) where nothing was retrained.
    """

    name: ClassVar[str] = "text-membership"
    domain: ClassVar[str] = "causal-lm"
    card: ClassVar[Card] = Card(
        title="MUSE: Machine Unlearning Six-Way Evaluation for Language Models",
        authors="Shi, Lee, Huang, Malladi, Zhao, Holtzman, Liu, Zettlemoyer, Smith, Zhang",
        year=2024,
        link="https://arxiv.org/abs/2407.06460",
        idea="Whether forgotten answers can be told from unseen ones by their likelihood.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "AUCs are two-sided: an answer that looks less like training data than unseen ones "
                "is found just as well.",
                _TEST + "an_erased_set_is_found_as_well",
            ),
            Deviation(
                "The end of the text, which all answers share, is left out of every score.",
                _TEST + "llm_metrics_invariant_min_k_of_all_tokens_is_the_loss",
            ),
        ),
    )

    scores: tuple[Score, ...] = setting(SCORES, "scores for the threshold attacks")
    k: float = setting(0.4, "share of the tokens that min-k looks at", above=0, high=1, source="MUSE")  # fmt: skip
    batch_size: int = setting(16, "samples a forward pass; no value depends on it", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with their answers, and logits of tokens."""
        return TOKENS

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """One finding a score, and the leak."""
        everyone = [subject, subject.original(), *references]
        whys = [unread(everyone, "forget-train", self.batch_size)]
        known = [s.whole for s in everyone]  # a stratum's samples are attacked as the whole's are
        whys += [unread(known, s, self.batch_size) for s in ("retain-train", "retain-test")]
        count = len(subject.splits["forget-train"])
        if count < FEWEST:
            whys.append(f"only {count} samples to forget, {FEWEST} are needed")
        why = next((w for w in whys if w), None)
        if why:
            whats = [f"auc-{score}" for score in self.scores] + ["privleak"]
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in whats]
        places, how = nonmembers(subject, "test", runtime)
        assert places is not None
        findings = []
        for score in self.scores:
            name = f"{self.name}/auc-{score}"
            if score == "zlib" and getattr(subject.problem, "tokenizer", None) is None:
                why = "texts are compressed, and the problem has no tokenizer; pass tokenizer="
                findings.append(Finding(name, None, reason=why))
                continue
            values = partial(self._scores, score)
            findings.append(auc_finding(name, values, subject, references, places, how))
        values = partial(self._scores, "min-k")
        attack = auc_finding(f"{self.name}/privleak", values, subject, references, places, how)
        theirs = [auc(*sides(values, r, places)) for r in references]
        return [*findings, leak(attack, theirs)]

    def _scores(self, score: Score, subject: Subject, split: str) -> np.ndarray:
        """One score of each sample [n]."""
        found = [a.told() for a in answers(subject, split, self.batch_size)]
        if score != "zlib":
            return np.array([self._score(score, a) for a in found])
        sizes = once(
            subject,
            ("zlib", split),
            subject.splits[split],
            lambda ids: [
                len(zlib.compress(text.encode()))
                for text in subject.problem.capability("texts")([
                    row.answer for row in rows_of(subject, split, ids)
                ])
            ],
        )
        return np.array([a.mean for a in found]) / np.array(sizes)

    def _score(self, score: Score, answer: Answer) -> float:
        if score == "loss":
            return answer.mean
        return lowest(answer.logp if score == "min-k" else answer.z, self.k)


def lowest(values: np.ndarray, k: float) -> float:
    r"""Mean of the \(\max(1, \lfloor k n \rfloor)\) smallest of values [n]."""
    # 0.29 · 100 is a little less than 29 in binary
    count = max(1, int(k * len(values) + 1e-9))
    return float(np.sort(values)[:count].mean())


def leak(attack: Finding, theirs: Sequence[float]) -> Finding:
    """PrivLeak from an attack's AUC and those of retrained models, in percent.

    Args:
        attack: with unfolded AUCs in its detail.
        theirs: unfolded AUCs of retrained models.

    Returns:
        The finding; without a value where retrained models tell all non-members from the forget set.
    """
    at = attack.detail
    base = 1 - float(np.mean(theirs)) if theirs else 0.5
    if base <= 0:
        why = "to retrained models, too, all forgotten answers look like members"
        return Finding(attack.name, None, reason=why)

    def value(a: float) -> float:
        return 100 * ((1 - a) - base) / base

    return replace(
        attack,
        value=value(at["auc"]),
        low=value(at["auc_high"]),
        high=value(at["auc_low"]),
        original=value(at["original_auc"]),
        detail={"min_k_auc": at["auc"], "base": 1 - base, "nonmembers": at["nonmembers"]},
        **against([value(a) for a in theirs]),
    )

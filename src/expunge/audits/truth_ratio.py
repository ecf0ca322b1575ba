"""Truth ratio: are wrong answers as likely as the right one, as for a model that never saw it?"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from torch import Tensor

from expunge.audits._splits import FEWEST, NO_REFERENCE, SPLITS
from expunge.audits._tokens import (
    TOKENS,
    alternates_of,
    answers,
    once,
    read,
    share_finding,
    with_alternates,
)
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

_TEST = "tests/audits/test_truth_ratio.py::test_"


@dataclass(frozen=True)
class TruthRatio(Audit):
    r"""\(R = \bar p(\text{wrong}) / \bar p(\text{right})\) of each sample, and what it says.

    With \(\bar p(y) = \exp(-N/|y|)\), the end of the text included, and for the wrong answers, which are
    the data's alternates, the exponential of the mean over them. `forget-…`: mean of
    \(\min(R, 1/R)\), 1 where right and wrong are equally likely; `retain-…`: mean of
    \(\max(0, 1-R)\), 1 where only the right one is. Good is what a retrained model has.
    `forget-quality`: p-value of the two-sample Kolmogorov-Smirnov test of R of the forgotten training
    samples between the model and a retrained one, mean over these; high where nothing tells them
    apart.
    """

    name: ClassVar[str] = "truth-ratio"
    domain: ClassVar[str] = "causal-lm"
    card: ClassVar[Card] = Card(
        title="TOFU: A Task of Fictitious Unlearning for LLMs",
        authors="Maini, Feng, Schwarzschild, Lipton, Kolter",
        year=2024,
        link="https://arxiv.org/abs/2401.06121",
        idea="Likelihood of wrong answers over that of the right one, distributed as in retraining?",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "The right answer is the one in the data, not a paraphrase of it.",
                _TEST + "the_worked_example",
            ),
            Deviation(
                "Over several retrained models the p-values are averaged.",
                _TEST + "forget_quality_is_the_mean_p_value",
            ),
        ),
    )

    batch_size: int = setting(16, "answers a forward pass; no value depends on it", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with their answers, and logits of tokens."""
        return TOKENS

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """One finding a split and the forget quality; what does not exist says why."""
        everyone = [subject, subject.original(), *references]
        findings, quality = [], Finding(f"{self.name}/forget-quality", None, "up")
        for split in SPLITS:
            name = f"{self.name}/{split}"
            ids, why = with_alternates(everyone, split, self.batch_size)
            if not why and any(np.isnan(self._log(split, ids, s)).any() for s in everyone):
                why = f"a model gives NaN outputs on the alternates of {split}"
            if split == "forget-train":
                quality = self._quality(ids, why, subject, references)
            if why:
                findings.append(Finding(name, None, reason=why))
                continue
            values = partial(self._values, split, ids)
            findings.append(share_finding(name, values, subject, references, "score"))
        return [*findings, quality]

    def _values(self, split: str, ids: Tensor, subject: Subject) -> np.ndarray:
        r"""\(\min(R, 1/R)\) or \(\max(0, 1-R)\) [n], of log R so that nothing overflows."""
        log_r = self._log(split, ids, subject)
        if split.startswith("forget"):
            return np.exp(-np.abs(log_r))
        return np.maximum(0.0, -np.expm1(np.minimum(log_r, 0.0)))

    def _log(self, split: str, ids: Tensor, subject: Subject) -> np.ndarray:
        """Log R [n] of some samples."""

        def wrong(of: Tensor) -> list[float]:
            rows = alternates_of(subject, split, of)
            flat = iter(read(subject, list(itertools.chain(*rows)), self.batch_size))
            return [float(np.mean([next(flat).mean for _ in row])) for row in rows]

        others = once(subject, ("wrong", split, self.batch_size), ids, wrong)
        right = [a.mean for a in answers(subject, split, self.batch_size, ids)]
        with np.errstate(invalid="ignore"):  # both impossible: NaN, which is looked for
            return np.array(others) - np.array(right)

    def _quality(
        self, ids: Tensor, why: str | None, subject: Subject, references: Sequence[Subject]
    ) -> Finding:
        name = f"{self.name}/forget-quality"
        if not why and len(ids) < FEWEST:
            why = f"only {len(ids)} samples to forget, {FEWEST} are needed"
        why = why or (None if references else NO_REFERENCE)
        if why:
            return Finding(name, None, "up", reason=why)
        mine, before, *theirs = (
            self._log("forget-train", ids, s) for s in (subject, subject.original(), *references)
        )
        tests = [ks(mine, t) for t in theirs]
        among = [ks(a, b)[1] for a, b in itertools.combinations(theirs, 2)]
        values = [p for _, p in tests]
        several = len(values) > 1
        return Finding(
            name,
            float(np.mean(values)),
            "up",
            # a p-value has no interval over samples; this is its range over retrained models
            low=min(values) if several else None,
            high=max(values) if several else None,
            reference=float(np.mean(among)) if among else None,
            floor=float(np.ptp(among)) if len(among) > 1 else None,
            original=float(np.mean([ks(before, t)[1] for t in theirs])),
            reason=None if among else "one reference: the p-value among references is unknown",
            detail={"n": len(mine), "distance": [d for d, _ in tests], "p": values},
            per_sample={"log-ratio": mine},
        )


def ks(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Two-sample Kolmogorov-Smirnov distance and its p-value; both are the same for R and log R."""
    from scipy.stats import ks_2samp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where it has to leave the exact p-value
        found = ks_2samp(a, b)
    return float(found.statistic), float(found.pvalue)

"""Privacy score: can a threshold on the outputs tell the model from a retrained one?"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from expunge.audits._splits import FEWEST, NO_REFERENCE, one_class, unusable
from expunge.audits._worst_case import (
    Array,
    Score,
    grids,
    null_floor,
    privacy,
    resampled,
    statistics,
)
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

SPLIT = "forget-train"
_TEST = "tests/audits/test_privacy_score.py::test_"


@dataclass(frozen=True)
class PrivacyScore(Audit):
    r"""The worst-case privacy score PS on the forgotten samples, 0 to 1; 1 cannot be told apart.

    \[ PS = 1 - \max_{s, t, \pm} (1 - 2^{-\varepsilon_s(t)}) \]

    over two statistics s (entropy at temperature 2, log-odds of the predicted class), thresholds t and
    both directions; ε as in `_worst_case.py`. The mean over references; beside it the same of
    references against each other (what another seed alone makes of it) and, in the detail, the null
    floor: two samples of one distribution, which do not reach 1 either. Bootstrap interval over samples.
    """

    name: ClassVar[str] = "privacy-score"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Unlearning Comparator: A Visual Analytics System for Comparative Evaluation of Machine Unlearning Methods",
        authors="Lee, Yu, Kim, et al.",
        year=2025,
        link="https://arxiv.org/abs/2508.12730",
        idea="How well any threshold on the outputs tells the model from a retrained one.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Values are not rounded before they are counted, all samples are used on both sides, and "
                "thresholds reach as far as the number of classes lets values go.",
                _TEST + "thresholds_reach_as_far_as_values_can",
            ),
            Deviation(
                "The score is the mean over references, with an interval and the null floor beside it.",
                _TEST + "the_score_is_the_mean_over_references",
            ),
        ),
    )

    thresholds: int = setting(201, "thresholds a statistic", low=11, source="paper: 51, for curves 201")  # fmt: skip
    resamples: int = setting(200, "draws of the bootstrap and of the null floor", low=20)

    @property
    def needs(self) -> Needs:
        """The forget side, and logits; labels are not looked at."""
        return Needs(forget=True, models=2, capabilities=frozenset({"logits"}))

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """One finding."""
        name = f"{self.name}/{SPLIT}"
        everyone = [subject, subject.original(), *references]
        why = unusable(everyone, SPLIT, labels=False) or (None if references else NO_REFERENCE)
        count = len(subject.splits[SPLIT])
        if not why and count < FEWEST:
            why = f"only {count} samples to forget, {FEWEST} are needed"
        why = why or one_class(subject)
        if why:
            return [Finding(name, None, "up", reason=why)]
        mine, before, *theirs = (statistics(s.logits(SPLIT)) for s in everyone)
        pooled = {k: np.concatenate([t[k] for t in theirs]) for k in mine}
        if all(float(np.ptp(np.concatenate([mine[k], before[k], pooled[k]]))) < 1e-9 for k in mine):
            same = "all models give every sample the same outputs, which tell nothing"
            return [Finding(name, None, "up", reason=same)]
        grid = grids(subject.logits(SPLIT).shape[1], self.thresholds)
        scores = [privacy(mine, t, grid) for t in theirs]
        value = float(np.mean([s.value for s in scores]))
        among = [privacy(a, b, grid).value for a, b in itertools.combinations(theirs, 2)]
        random = np.random.default_rng(runtime.seed_for(self.name, "bootstrap"))
        each = max(20, self.resamples // len(theirs))
        draws = np.concatenate([resampled(mine, t, grid, random, each) for t in theirs])
        # a resampled pair looks further apart than its parents, by as much as these do than the truth
        low, high = (float(2 * value - v) for v in np.percentile(draws, [97.5, 2.5]))
        random = np.random.default_rng(runtime.seed_for(self.name, "floor"))
        floor = null_floor(pooled, (count, count), grid, random, self.resamples)
        return [
            Finding(
                name,
                value,
                "up",
                low=max(0.0, min(low, value)),
                high=min(1.0, max(high, value)),
                reference=float(np.mean(among)) if among else None,
                floor=float(np.ptp(among)) if len(among) > 1 else None,
                original=float(np.mean([privacy(before, t, grid).value for t in theirs])),
                reason=None if among else "one reference: what another seed makes of it is unknown",
                detail=_detail(scores, grid, floor) | {"records": count},
                per_sample=dict(mine),
            )
        ]


def _detail(
    scores: Sequence[Score], grid: Mapping[str, Array], floor: np.ndarray
) -> dict[str, Any]:
    """The strongest attack and, against the reference it is on, the curves of both statistics."""
    worst = min(scores, key=lambda s: s.value)
    curves = {
        statistic: {
            "threshold": grid[statistic].tolist(),
            **{
                side: {
                    part: getattr(worst.curves[statistic, side], part).tolist()
                    for part in ("fpr", "fnr", "attack")
                }
                for side in ("model", "reference")
            },
        }
        for statistic in grid
    }
    return {
        "attack": {
            "statistic": worst.statistic,
            "threshold": worst.threshold,
            "above": worst.above,
            "privacy_score": worst.value,
        },
        "curves": curves,
        "each": [s.value for s in scores],
        "null_floor": {"mean": float(floor.mean()), "p5": float(np.percentile(floor, 5))},
    }

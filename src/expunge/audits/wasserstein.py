"""Wasserstein distance: are predictions and errors distributed as those of retrained models?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from expunge.audits._splits import NO_REFERENCE, unusable
from expunge.audits.regression_error import residuals
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

SPLIT = "forget-train"


@dataclass(frozen=True)
class Wasserstein(Audit):
    r"""\(W_1\) between distributions of the forgotten samples under the model and under references.

    For equally many values \(W_1 = \mathrm{mean}_i |u_{(i)} - v_{(i)}|\) of both sorted, in the unit
    of the targets, averaged over the references. `predictions-…`: of \(\hat y\); `errors-…`: of
    \(\hat y - y\), which sees swapped predictions; `relative-…`: no distribution but the mean of
    \(|\hat y - \hat y_{ref}| / |y|\) sample by sample, where \(y \ne 0\). Lower is closer; the
    references among each other stand beside it. Bootstrap interval over samples.
    """

    name: ClassVar[str] = "wasserstein"
    domain: ClassVar[str] = "regression"
    card: ClassVar[Card] = Card(
        title="Deep Regression Unlearning",
        authors="Tarun, Chundawat, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2210.08196",
        idea="Distance of the distributions of predictions to those of retrained models.",
        intent="measurement",
    )

    resamples: int = setting(200, "bootstrap resamples of the interval", low=20)

    @property
    def needs(self) -> Needs:
        """The forget side with targets, and predictions."""
        return Needs(forget=True, labels="forget", models=2, capabilities=frozenset({"predict"}))

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Three findings."""
        names = [f"{self.name}/{what}-{SPLIT}" for what in ("predictions", "errors", "relative")]
        compared = [subject, subject.original(), *references]
        why = unusable(compared, SPLIT, outputs=Subject.predictions)
        why = why or (None if references else NO_REFERENCE)
        if why:
            return [Finding(name, None, "down", reason=why) for name in names]
        targets = subject.labels(SPLIT).double().numpy()
        there = targets != 0

        def predictions(s: Subject) -> np.ndarray:
            return s.predictions(SPLIT).double().numpy()

        def scaled(s: Subject) -> np.ndarray:
            return predictions(s)[there] / np.abs(targets[there])

        makers: list[tuple[Callable[[Subject], np.ndarray], Measure]] = [
            (predictions, w1),
            (lambda s: residuals(s, SPLIT), w1),
            (scaled, paired),
        ]
        findings = []
        for name, (values, measure) in zip(names, makers, strict=True):
            if values is scaled and not there.any():
                findings.append(Finding(name, None, "down", reason="all forgotten targets are 0"))
                continue
            findings.append(self._finding(name, subject, references, values, measure, runtime))
        return findings

    def _finding(
        self,
        name: str,
        subject: Subject,
        references: Sequence[Subject],
        values: Callable[[Subject], np.ndarray],
        measure: Measure,
        runtime: Runtime,
    ) -> Finding:
        mine, theirs = values(subject), [values(r) for r in references]
        value = float(np.mean([measure(mine, t) for t in theirs]))
        among = [measure(a, b) for a, b in itertools.combinations(theirs, 2)]
        before = float(np.mean([measure(values(subject.original()), t) for t in theirs]))
        draw = np.random.default_rng(runtime.seed_for("wasserstein", name))
        found = []
        for _ in range(self.resamples):
            rows = draw.integers(len(mine), size=len(mine))
            found.append(np.mean([measure(mine[rows], t[rows]) for t in theirs]))
        low, high = np.percentile(found, [2.5, 97.5])
        detail: dict[str, Any] = {"n": len(mine)}
        if measure is paired:
            each = np.mean([np.abs(mine - t) for t in theirs], axis=0)
            shares, edges = np.histogram(each, 20)
            detail["histogram"] = {"edges": edges.tolist(), "share": (shares / len(each)).tolist()}
        return Finding(
            name,
            value,
            "down",
            # resampling few samples makes distributions look further apart than they are
            low=min(float(low), value),
            high=max(float(high), value),
            reference=float(np.mean(among)) if among else None,
            floor=float(np.max(among)) if among else None,
            original=before,
            reason=None if among else "one reference: the distance among references is unknown",
            detail=detail,
        )


Measure = Callable[[np.ndarray, np.ndarray], float]


def w1(u: np.ndarray, v: np.ndarray) -> float:
    """Wasserstein-1 distance of two equally large samples on the line."""
    return float(np.abs(np.sort(u) - np.sort(v)).mean())


def paired(u: np.ndarray, v: np.ndarray) -> float:
    """Mean absolute difference, sample by sample."""
    return float(np.abs(u - v).mean())

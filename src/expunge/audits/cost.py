"""Cost: what the run used, beside what retraining used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime


@dataclass(frozen=True)
class CostAudit(Audit):
    """Wall seconds, samples touched, gradient evaluations, peak memory, ratio to retraining.

    A gradient evaluation is one sample in one backward pass; peak memory is the growth over the
    start of the run, in bytes; the ratio is `Cost.ratio`. Lower is better; RTE of the literature
    is `seconds` in minutes.
    """

    name: ClassVar[str] = "cost"
    card: ClassVar[Card] = Card(
        title="Model Sparsity Can Simplify Machine Unlearning",
        authors="Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu",
        year=2023,
        link="https://arxiv.org/abs/2304.04934",
        idea="Time, data and memory a run took, beside retraining.",
        intent="measurement",
    )

    @property
    def needs(self) -> Needs:
        """Nothing but the run's own counters."""
        return Needs()

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Five findings; without a run behind the model they say so."""
        mine = subject.cost
        if mine is None:
            reason = "the model was given, not made by a run"
            return [Finding(f"cost/{n}", None, "down", reason=reason) for n in NAMES]
        retraining = [r.cost for r in references if r.cost is not None and r.cost.seconds]
        ratio = mine.ratio(retraining)
        mean = float(np.mean([c.seconds for c in retraining])) if retraining else None
        why = None if ratio is not None else "no retraining was timed"
        return [
            Finding("cost/seconds", mine.seconds, "down", reference=mean),
            Finding("cost/ratio", ratio, "down", reference=ratio and 1.0, reason=why),
            Finding("cost/samples", float(mine.samples), "down"),
            Finding("cost/gradients", float(mine.gradients), "down"),
            Finding("cost/peak-memory", float(mine.peak_bytes), "down"),
        ]


NAMES = ("seconds", "ratio", "samples", "gradients", "peak-memory")

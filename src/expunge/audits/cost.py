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
    start of the run, in bytes. Lower is better; RTE of the literature is `seconds` in minutes.
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
        seconds = [r.seconds for r in references if r.seconds is not None]
        retraining = float(np.mean(seconds)) if any(seconds) else None
        none = "the model was given, not made by a run"
        findings = [
            Finding(
                "cost/seconds",
                subject.seconds,
                "down",
                reference=retraining,
                reason=none if subject.seconds is None else None,
            )
        ]
        if subject.seconds is None:
            findings.append(Finding("cost/ratio", None, "down", reason=none))
        elif retraining is None:
            findings.append(Finding("cost/ratio", None, "down", reason="no retraining was timed"))
        else:
            ratio = subject.seconds / retraining
            findings.append(Finding("cost/ratio", ratio, "down", reference=1.0))
        cost = getattr(subject.outcome, "cost", None)
        for name, attribute in (
            ("samples", "samples"),
            ("gradients", "gradients"),
            ("peak-memory", "peak_bytes"),
        ):
            value = None if cost is None else float(getattr(cost, attribute))
            why = none if value is None else None
            findings.append(Finding(f"cost/{name}", value, "down", reason=why))
        return findings

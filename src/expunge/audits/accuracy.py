"""Accuracy on what was to be forgotten and on what was to be kept, whole and per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from expunge.audits._intervals import wilson
from expunge.audits._splits import SPLITS, unusable
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime


@dataclass(frozen=True)
class Accuracy(Audit):
    """Share of right predictions on each split; good is what a retrained model has.

    1 − `forget-train` is the literature's unlearning accuracy UA; `retain-train` is RA and
    `retain-test` TA. Range 0 … 1, Wilson interval over samples.
    """

    name: ClassVar[str] = "accuracy"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Model Sparsity Can Simplify Machine Unlearning",
        authors="Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu",
        year=2023,
        link="https://arxiv.org/abs/2304.04934",
        idea="Share of right predictions on forget and retain data, in training and test.",
        intent="measurement",
    )

    @property
    def needs(self) -> Needs:
        """Both sides with labels, and logits."""
        return Needs(
            forget=True, retain=True, labels="all", models=2, capabilities=frozenset({"logits"})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """One finding a split; a split that does not exist says why."""
        original = subject.original()
        findings = []
        for split in SPLITS:
            name = f"accuracy/{split}"
            why = unusable([subject, *references], split, finite=False)
            if why:
                findings.append(Finding(name, None, reason=why))
                continue
            hits, total, per_class = count(subject, split)
            low, high = wilson(hits, total)
            findings.append(
                Finding(
                    name,
                    hits / total,
                    low=low,
                    high=high,
                    original=share(original, split),
                    detail={"per_class": per_class, "n": total},
                    per_sample={"correct": right(subject, split)},
                    **against([share(r, split) for r in references]),
                )
            )
        return findings


def right(subject: Subject, split: str) -> Any:
    """Whether each prediction is right [n]."""
    return (subject.logits(split).argmax(1) == subject.labels(split)).numpy()


def share(subject: Subject, split: str) -> float:
    """Accuracy on a split."""
    return float(right(subject, split).mean())


def count(subject: Subject, split: str) -> tuple[int, int, dict[str, list[int]]]:
    """Right predictions, samples, and both for each class."""
    correct, labels = right(subject, split), subject.labels(split).numpy()
    per_class = {
        str(c): [int(correct[labels == c].sum()), int((labels == c).sum())]
        for c in sorted(set(labels.tolist()))
    }
    return int(correct.sum()), len(correct), per_class

"""Prediction matrix: which class each true class is called, on all test samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from expunge.audits._splits import NO_REFERENCE, NO_TEST, unusable
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime


@dataclass(frozen=True)
class PredictionMatrix(Audit):
    r"""Row-normalised true × predicted matrix \(M\), and how far it is from retraining.

    Value: \(\frac{1}{C}\sum_c \frac12\sum_k |M_{ck} - \bar M_{ck}|\), the mean total variation
    between the rows and those of the references' mean matrix; 0 is equal, 1 is disjoint. C counts
    the classes that have test samples.
    """

    name: ClassVar[str] = "prediction-matrix"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Unlearning Comparator: A Visual Analytics System for Comparative Evaluation of Machine Unlearning Methods",
        authors="Lee, Yu, Kim, et al.",
        year=2025,
        link="https://arxiv.org/abs/2508.12730",
        idea="Where the predictions of each class go.",
        intent="measurement",
    )

    @property
    def needs(self) -> Needs:
        """Labels of test data, and logits."""
        return Needs(labels="all", models=2, capabilities=frozenset({"logits"}))

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """One finding with both matrices in its detail."""
        if "retain-test" not in subject.splits:
            return [Finding(f"{self.name}/test", None, "down", reason=NO_TEST)]
        for split in _there(subject):
            why = unusable([subject, *references, subject.original()], split, finite=False)
            if why:
                return [Finding(f"{self.name}/test", None, "down", reason=why)]
        matrix, counts = confusion(subject)
        detail = {"matrix": matrix.tolist(), "counts": counts.tolist()}
        if not references:
            return [Finding(f"{self.name}/test", None, "down", reason=NO_REFERENCE, detail=detail)]
        others = [confusion(r)[0] for r in references]
        mean = np.mean(others, axis=0)
        detail["reference_matrix"] = mean.tolist()
        among = [
            distance(m, np.mean(others[:i] + others[i + 1 :], axis=0)) for i, m in enumerate(others)
        ] if len(others) > 1 else []  # fmt: skip
        return [
            Finding(
                f"{self.name}/test",
                distance(matrix, mean),
                "down",
                reference=float(np.mean(among)) if among else None,
                floor=float(np.max(among)) if among else None,
                original=distance(confusion(subject.original())[0], mean),
                reason=None if among else "one reference: the distance among references is unknown",
                detail=detail,
            )
        ]


def confusion(subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    """Row-normalised matrix [C, C] (true × predicted) and counts, over all test samples."""
    counts: np.ndarray | None = None
    for split in _there(subject):
        logits = subject.logits(split)
        part = np.zeros((logits.shape[1], logits.shape[1]), dtype=np.int64)
        np.add.at(part, (subject.labels(split).numpy(), logits.argmax(1).numpy()), 1)
        counts = part if counts is None else counts + part
    assert counts is not None
    return counts / np.maximum(counts.sum(1, keepdims=True), 1), counts


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean total variation between the rows of two matrices."""
    there = a.sum(1) > 0  # a class without test samples has an empty row in every matrix
    return float(np.abs(a - b)[there].sum(1).mean() / 2)


def _there(subject: Subject) -> list[str]:
    return [s for s in ("forget-test", "retain-test") if len(subject.splits[s])]

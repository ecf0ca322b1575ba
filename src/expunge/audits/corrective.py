"""Corrective: is the model right again where manipulated training data had made it wrong?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from expunge.audits._intervals import wilson
from expunge.audits._splits import NO_TEST, unusable
from expunge.core.audit import Audit, Direction, Finding, Subject
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

_NAMES = ("affected", "rest", "still-wrong")


@dataclass(frozen=True)
class Corrective(Audit):
    r"""Accuracy with true labels on the affected domain and outside it, whatever the model was told.

    `affected` is Acc_corr: test samples that the column `affected` of the test data marks (of a backdoor
    those with its trigger, of two confused classes theirs); `rest` is Acc_retain: all others. Both up, 0 … 1.
    `still-wrong` is the share of the known wrongly labelled samples that the model still calls by the label
    they had been given, down; the training data's column `true`, where there is one, says which are wrong. A model retrained without the *known* part is shown beside, and is **not** the
    goal: what nobody has found keeps teaching it the wrong thing. Wilson intervals over samples.
    """

    name: ClassVar[str] = "corrective"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Corrective Machine Unlearning",
        authors="Goel, Prabhu, Torr, Kumaraguru, Sanyal",
        year=2024,
        link="https://arxiv.org/abs/2402.14015",
        idea="Judge by what is right again, not by closeness to retraining without the part that is known.",
        intent="measurement",
    )

    column: str = setting("affected", "column of the test data that marks the affected domain")

    @property
    def needs(self) -> Needs:
        """Labels of both sides, and logits."""
        return Needs(forget=True, retain=True, labels="all", capabilities=frozenset({"logits"}))

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Three findings, or why there is none."""
        everyone = [subject, subject.original(), *references]
        test = subject.problem.test
        if test is None or self.column not in test.columns:
            lack = f"the test data has no column {self.column!r} that marks the affected domain"
            reason = NO_TEST if test is None else lack
            return [Finding(f"{self.name}/{what}", None, reason=reason) for what in _NAMES]
        splits = [s for s in ("forget-test", "retain-test") if len(subject.splits[s])]
        whys = (unusable(everyone, s, finite=False) for s in (*splits, "forget-train"))
        if why := next((w for w in whys if w), None):
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in _NAMES]
        marked = torch.as_tensor(test.columns[self.column] != 0)
        inside = np.concatenate([marked[test.positions(subject.splits[s])] for s in splits])
        right = [
            np.concatenate([(s.logits(p).argmax(1) == s.labels(p)).numpy() for p in splits])
            for s in everyone
        ]
        wrong = _wrongly_labelled(subject)
        told = [
            (s.logits("forget-train").argmax(1) == s.labels("forget-train")).numpy()[wrong]
            for s in everyone
        ]
        return [
            _finding(self.name, "affected", [r[inside] for r in right], "up"),
            _finding(self.name, "rest", [r[~inside] for r in right], "up"),
            _finding(self.name, "still-wrong", told, "down"),
        ]


def _wrongly_labelled(subject: Subject) -> np.ndarray:
    """Which known samples have another label than the true one, where the column `true` tells it [n]."""
    data, ids = subject.problem.train, subject.splits["forget-train"]
    if "true" not in data.columns:
        return np.ones(len(ids), dtype=bool)
    true = torch.as_tensor(data.columns["true"])[data.positions(ids)]
    return (true != data.labels_of(ids)).numpy()


def _finding(audit: str, what: str, hits: list[np.ndarray], direction: Direction) -> Finding:
    mine, before, *theirs = hits
    if not len(mine):
        return Finding(f"{audit}/{what}", None, direction, reason="no sample is on this side")
    low, high = wilson(int(mine.sum()), len(mine))
    shares = [float(t.mean()) for t in theirs]
    return Finding(
        f"{audit}/{what}", float(mine.mean()), direction, low=low, high=high,
        original=float(before.mean()),
        reference=float(np.mean(shares)) if shares else None,
        floor=float(np.ptp(shares)) if len(shares) > 1 else None,
        detail={"reference": "retrained without the known part: not the goal", "n": len(mine)},
        per_sample={what: mine},
    )  # fmt: skip

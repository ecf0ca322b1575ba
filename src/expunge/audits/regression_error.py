"""Regression error on what was to be forgotten and on what was to be kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from expunge.audits._intervals import mean_interval
from expunge.audits._splits import SPLITS, unusable
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime


@dataclass(frozen=True)
class RegressionError(Audit):
    r"""Mean absolute and root mean squared error on each split, in the unit of the targets.

    `mae-…`: \(\mathrm{mean}|\hat y - y|\); `rmse-…`: \(\sqrt{\mathrm{mean}(\hat y - y)^2}\). Good is
    what a retrained model has: on forgotten targets a larger error is no aim in itself. Range 0
    upward; Student's t interval over samples (for the RMSE, its square root).
    """

    name: ClassVar[str] = "regression-error"
    domain: ClassVar[str] = "regression"
    card: ClassVar[Card] = Card(
        title="Deep Regression Unlearning",
        authors="Tarun, Chundawat, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2210.08196",
        idea="Error on forget and retain data, in training and test.",
        intent="measurement",
    )

    @property
    def needs(self) -> Needs:
        """Both sides with targets, and predictions."""
        return Needs(
            forget=True, retain=True, labels="all", models=2, capabilities=frozenset({"predict"})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Two findings a split; a split that does not exist says why."""
        original, findings = subject.original(), []
        targets = subject.problem.train.labels
        scale = float(targets.double().std()) if targets is not None and len(targets) > 1 else 1.0
        for split in SPLITS:
            compared = [subject, original, *references]
            why = unusable(compared, split, outputs=Subject.predictions)
            if why:
                findings += [Finding(f"{self.name}/{k}-{split}", None, reason=why) for k in KINDS]
                continue
            for kind in KINDS:
                each = residuals(subject, split)
                low, high = mean_interval(np.abs(each) if kind == "mae" else each**2)
                if kind == "rmse":
                    low, high = np.sqrt(max(low, 0.0)), np.sqrt(high)
                findings.append(
                    Finding(
                        f"{self.name}/{kind}-{split}",
                        error(subject, split, kind),
                        low=max(float(low), 0.0),
                        high=float(high),
                        original=error(original, split, kind),
                        detail={"n": len(each), "scale": scale},
                        per_sample={"residual": each} if kind == "mae" else {},
                        **against([error(r, split, kind) for r in references]),
                    )
                )
        return findings


KINDS = ("mae", "rmse")


def residuals(subject: Subject, split: str) -> np.ndarray:
    """Prediction minus target of each sample [n], in the unit of the targets."""
    predicted = subject.predictions(split).double()
    return (predicted - subject.labels(split).double()).numpy()


def error(subject: Subject, split: str, kind: str) -> float:
    """The `mae` or `rmse` on a split."""
    each = residuals(subject, split)
    return float(np.abs(each).mean() if kind == "mae" else np.sqrt((each**2).mean()))

"""Residual membership: do forgotten samples still fit as well as training data does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from expunge.audits._efficacy import efficacy, efficacy_interval
from expunge.audits._members import Places, auc_finding, nonmembers
from expunge.audits._splits import FEWEST, unusable
from expunge.audits.regression_error import residuals
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

BANDS = 4


@dataclass(frozen=True)
class ResidualMembership(Audit):
    r"""Attacks on the size of the residual, each beside the same attack on retrained models.

    `auc`: \(-|\hat y - y|\) separates forgotten samples from test samples with such targets;
    two-sided, ½ … 1. `svc`: a support vector machine (C = 3, RBF kernel), fitted on the task loss
    of kept training samples (members) against kept test samples, calls this share of the forgotten
    samples members, 0 … 1. For a range of targets that share lies far from ½ in a retrained
    model too, whose losses there are huge: good is the retrained figure, not 0.
    """

    name: ClassVar[str] = "residual-membership"
    domain: ClassVar[str] = "regression"
    card: ClassVar[Card] = Card(
        title="Deep Regression Unlearning",
        authors="Tarun, Chundawat, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2210.08196",
        idea="Whether forgotten samples can be told from samples never seen, by their residuals.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "The attacker's members are kept training samples and its non-members kept test "
                "samples; with the forgotten range among them it would learn the range instead.",
                "tests/audits/test_residual_membership.py::test_the_attacker_is_fitted_on_kept_data_only",
            ),
            Deviation(
                "Draws are seeded, and no more than max_samples a side are used.",
                "tests/audits/test_residual_membership.py::test_the_same_draw_every_time",
            ),
        ),
    )

    nonmembers: Literal["matched", "test"] = setting(
        "matched", "matched: test samples with the forget set's targets; test: all of them"
    )
    max_samples: int = setting(1000, "samples a side that the attacker is fitted on", low=20)

    @property
    def needs(self) -> Needs:
        """Both sides with targets, predictions and the task loss."""
        return Needs(
            forget=True,
            retain=True,
            labels="all",
            models=2,
            capabilities=frozenset({"loss_between", "predict"}),
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Two findings; all models are attacked in the same way."""
        everyone = [subject, subject.original(), *references]
        splits = ("forget-train", "retain-train", "retain-test")
        known = [s.whole for s in everyone]
        sides = (everyone, known, known)  # a stratum's samples are attacked as the whole's are
        whys = [
            unusable(e, s, outputs=Subject.predictions) for e, s in zip(sides, splits, strict=True)
        ]
        count = len(subject.splits["forget-train"])
        few = f"only {count} samples to forget, {FEWEST} are needed" if count < FEWEST else None
        # the range may be all there is to test on, and an AUC needs no other data
        why_auc = whys[0] or few or (whys[2] if "retain-test" not in subject.splits else None)
        places: Places | None = None
        if not why_auc:
            edges = bands(subject.labels("forget-train"))
            places, how = nonmembers(
                subject, self.nonmembers, runtime, lambda y: band(y, edges), "target band"
            )
            why_auc = None if places is not None else how
        findings = []
        if places is None:
            findings.append(Finding(f"{self.name}/auc", None, reason=why_auc))
        else:
            findings.append(self._auc(subject, references, places, how))
        why = next((w for w in whys if w), None)
        if why:
            return [*findings, Finding(f"{self.name}/svc", None, reason=why)]
        return [*findings, self._svc(subject, references, runtime)]

    def _auc(
        self, subject: Subject, references: Sequence[Subject], places: Places, how: str
    ) -> Finding:
        def score(s: Subject, split: str) -> np.ndarray:
            return -np.abs(residuals(s, split))

        return auc_finding(f"{self.name}/auc", score, subject, references, places, how)

    def _svc(self, subject: Subject, references: Sequence[Subject], runtime: Runtime) -> Finding:
        # attackers are those of the whole, also when a stratum is looked at
        sizes = [len(subject.whole.splits[s]) for s in ("retain-train", "retain-test")]
        size = min(*sizes, 2 * self.max_samples) // 2 * 2
        if size < 2 * FEWEST:
            return Finding(f"{self.name}/svc", None, reason=f"only {size} samples a side to fit and score on")  # fmt: skip
        picked = [
            torch.randperm(n, generator=runtime.generator(self.name, n))[:size].numpy()
            for n in sizes
        ]

        def scores(s: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            inside = losses(s.whole, "retain-train")[picked[0]]
            return inside, losses(s, "retain-test")[picked[1]], losses(s, "forget-train")

        def members(s: Subject) -> tuple[np.ndarray, float]:
            called, accuracy = efficacy("svc", *scores(s))
            return ~called, accuracy

        called, accuracy = members(subject)
        theirs = [float(members(r)[0].mean()) for r in references]
        refits = runtime.generator(self.name, "refits")
        low, high = efficacy_interval("svc", *scores(subject), float(called.mean()), refits)
        return Finding(
            f"{self.name}/svc",
            float(called.mean()),
            low=low,
            high=high,
            original=float(members(subject.original())[0].mean()),
            detail={"attacker_accuracy": accuracy, "fitted_on": size},
            per_sample={"member": called},
            **against(theirs),
        )


def losses(subject: Subject, split: str) -> np.ndarray:
    """The task loss of each sample [n]."""
    between = subject.problem.capability("loss_between")
    return between(subject.predictions(split), subject.labels(split)).double().numpy()


def bands(targets: Tensor) -> Tensor:
    """Edges of bands with about as many of the targets each, none wider than they reach."""
    cuts = torch.linspace(0, 1, BANDS + 1, dtype=torch.float64)
    return torch.quantile(targets.double(), cuts).unique()


def band(targets: Tensor, edges: Tensor) -> Tensor:
    """The band of each target, counted from 1; 0 for those outside all of them."""
    inside = (targets >= edges[0]) & (targets <= edges[-1])
    number = torch.bucketize(targets.double(), edges[1:-1], right=True) + 1
    return torch.where(inside, number, torch.zeros_like(number))

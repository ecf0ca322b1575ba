"""In-context-images: does a forgotten class return from a few labelled images?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.audits._intervals import share_interval
from expunge.audits._splits import missing
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting


@dataclass(frozen=True)
class InContextImages(Audit):
    r"""Recall of the forgotten classes by the nearest of class prototypes.

    A prototype is the mean of features \(f / \|f\|\), the input of the last layer: of all training images of
    a class that is kept, and of k of a class that is forgotten. `recall-0`: share of the forgotten
    classes' test images that the model itself names right; `recall-K`, by prototypes, mean over draws;
    `rest-0` and `rest-K`: the same of the other classes. No weight changes.
    """

    name: ClassVar[str] = "in-context-images"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="UnUnlearning: Unlearning is not sufficient for content regulation in advanced generative AI",
        authors="Shumailov, Hayes, Triantafillou, Ortiz-Jimenez, Papernot, Jagielski, Yona, Howard, Bagdasaryan",
        year=2024,
        link="https://arxiv.org/abs/2407.00106",
        idea="A class that was forgotten, even by retraining, is named again from a few examples.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Labelled images stand for the context of a language model; the paper has no protocol.",
                "tests/audits/test_in_context.py::test_images_are_given_to_the_nearest_prototype",
            ),
        ),
    )

    shots: tuple[int, ...] = setting((1, 3, 5), "images of each forgotten class, k", low=1)
    draws: int = setting(5, "draws of these", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with labels, logits and the input of the last layer."""
        return Needs(
            forget=True, retain=True, labels="all", models=2,
            capabilities=frozenset({"logits", "penultimate"}),
        )  # fmt: skip

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Recall and the rest for each number of images; without whole classes, the reason."""
        for split in ("forget-test", "retain-test", "retain-train"):
            why = missing(subject, split)
            if why:
                return [Finding(f"{self.name}/recall-0", None, reason=why)]
        findings = []
        for k in (0, *self.shots):
            mine, before, *theirs = (
                self._right(s, k, runtime) for s in (subject, subject.original(), *references)
            )
            for side, what in enumerate(("recall", "rest")):
                each = mine[side]
                low, high = share_interval(each.mean(0))  # over samples, of means over draws
                findings.append(
                    Finding(
                        f"{self.name}/{what}-{k}", float(each.mean()), low=low, high=high,
                        original=float(before[side].mean()), detail={"n": each.shape[1]},
                        per_sample={"right": each.mean(0)},
                        **against([float(t[side].mean()) for t in theirs]),
                    )
                )  # fmt: skip
        return findings

    def _right(self, subject: Subject, k: int, runtime: Runtime) -> tuple[np.ndarray, np.ndarray]:
        """Whether test images [draws, n] of the forgotten and of the other classes are named right."""
        sides = ("forget-test", "retain-test")
        if k == 0:
            found = [subject.logits(s).argmax(1).eq(subject.labels(s)) for s in sides]
            return found[0][None].numpy().astype(float), found[1][None].numpy().astype(float)
        support, labels = self._features(subject, "forget-train"), subject.labels("forget-train")
        kept, kept_labels = self._features(subject, "retain-train"), subject.labels("retain-train")
        forgotten = labels.unique().tolist()
        rest = [c for c in kept_labels.unique().tolist() if c not in forgotten]
        known = [kept[kept_labels == c].mean(0) for c in rest]
        classes = torch.tensor(rest + forgotten)
        right: dict[str, list[Tensor]] = {side: [] for side in sides}
        for draw in range(self.draws):
            drawn = runtime.generator("in-context-images", k, draw)
            some = [support[labels == c] for c in forgotten]
            picked = [f[torch.randperm(len(f), generator=drawn)[:k]].mean(0) for f in some]
            prototypes = torch.stack(known + picked)
            for side in sides:
                near = torch.cdist(self._features(subject, side), prototypes).argmin(1)
                right[side].append(classes[near].eq(subject.labels(side)))
        both = [torch.stack(right[side]).numpy().astype(float) for side in sides]
        return both[0], both[1]

    @staticmethod
    @torch.no_grad()
    def _features(subject: Subject, split: str) -> Tensor:
        """Features [n, d] of length 1, computed once."""
        kept = subject.whole.__dict__.setdefault("_unit_features", {})
        if split not in kept:
            penultimate, device = subject.problem.capability("penultimate"), subject.runtime.device
            batches = subject.data_of(split).batches(256, subject.whole.splits[split])
            parts = [penultimate(subject.model, b.to(device)).float().cpu() for b in batches]
            kept[split] = torch.nn.functional.normalize(torch.cat(parts), dim=1)
        there = torch.isin(subject.whole.splits[split], subject.splits[split])
        found: Tensor = kept[split][there]
        return found

"""Output divergence: how far each prediction is from that of retrained models."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from expunge.audits._intervals import mean_interval
from expunge.audits._splits import NO_REFERENCE, unusable
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime

SPLITS = ("forget-train", "forget-test", "retain-test")


@dataclass(frozen=True)
class Divergence(Audit):
    r"""Per-sample divergence of the softmax outputs to each reference, averaged; in nats.

    `kl`: \(KL(p_{ref}\,\|\,p)\), unbounded. `js`: \(\tfrac12 KL(p\|m)+\tfrac12 KL(p_{ref}\|m)\) with
    \(m=\tfrac12(p+p_{ref})\), at most \(\ln 2\). Lower is closer; the references' divergence among
    each other stands beside it as the noise floor.
    """

    name: ClassVar[str] = "divergence"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks Using an Incompetent Teacher",
        authors="Chundawat, Tarun, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2205.08096",
        idea="Distance between predicted distributions of the unlearned and of retrained models.",
        intent="measurement",
    )

    @property
    def needs(self) -> Needs:
        """Both sides and logits; no labels."""
        return Needs(forget=True, retain=True, models=2, capabilities=frozenset({"logits"}))

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Two findings a split."""
        findings = []
        for split in SPLITS:
            compared = [subject, *references, subject.original()]
            why = unusable(compared, split, labels=False) if references else NO_REFERENCE
            for kind, measure in (("js", js_each), ("kl", kl_each)):
                name = f"divergence/{kind}-{split}"
                if why:
                    findings.append(Finding(name, None, "down", reason=why))
                    continue
                theirs = [r.logits(split) for r in references]
                each = _mean([measure(r, subject.logits(split)) for r in theirs])
                before = _mean([measure(r, subject.original().logits(split)) for r in theirs])
                among = [float(measure(a, b).mean()) for a, b in itertools.permutations(theirs, 2)]
                low, high = mean_interval(each)
                findings.append(
                    Finding(
                        name,
                        float(each.mean()),
                        "down",
                        low=max(low, 0.0),
                        high=high,
                        reference=float(np.mean(among)) if among else None,
                        floor=float(np.max(among)) if among else None,
                        original=float(before.mean()),
                        reason=None
                        if among
                        else "one reference: the divergence among references is unknown",
                        per_sample={"divergence": each},
                    )
                )
        return findings


def kl_each(reference: Tensor, subject: Tensor) -> Tensor:
    r"""\(KL(p_{ref}\|p)\) of each sample [n] in nats, from logits, finite also when saturated."""
    p, q = log_softmax(reference.double(), 1), log_softmax(subject.double(), 1)
    return (p.exp() * (p - q)).sum(1).clamp_min(0)


def js_each(reference: Tensor, subject: Tensor) -> Tensor:
    """Jensen–Shannon divergence of each sample [n] in nats, from logits."""
    p, q = log_softmax(reference.double(), 1), log_softmax(subject.double(), 1)
    m = torch.logaddexp(p, q) - np.log(2)
    return ((p.exp() * (p - m)).sum(1) + (q.exp() * (q - m)).sum(1)).clamp_min(0) / 2


def _mean(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.stack(list(parts)).mean(0).numpy()

"""Membership inference: do forgotten samples still look like training data?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from expunge.audits._efficacy import Attacker, efficacy, efficacy_interval
from expunge.audits._intervals import two_sided
from expunge.audits._members import (
    Places,
    attack_accuracy,
    auc_finding,
    constant,
    nonmembers,
    sides,
)
from expunge.audits._scores import SCORES
from expunge.audits._splits import FEWEST, unusable
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

Score = Literal["loss", "confidence", "entropy", "modified-entropy", "correctness"]

_FEATURE = {"svc": "confidence", "logistic": "entropy"}
"""What the papers' attackers look at."""


@dataclass(frozen=True)
class Membership(Audit):
    r"""Attacks on single outputs, each beside the same attack on retrained models.

    `auc-SCORE`: a threshold on the score separates forgotten samples from non-members; two-sided,
    \(\max(A, 1-A)\) in ½ … 1, since forgotten samples that look *less* like training data than
    unseen ones are found just as well. `efficacy-ATTACKER`: an attacker fitted on retain (member)
    against test samples of kept classes (non-member) calls this share of the forgotten samples
    non-members, 0 … 1; good is the share it calls so for a retrained model. `attack-accuracy`:
    cross-validated logistic regression on the loss, balanced accuracy folded at ½ (SCRUB's attack).
    """

    name: ClassVar[str] = "membership"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Systematic Evaluation of Privacy Risks of Machine Learning Models",
        authors="Song, Mittal",
        year=2021,
        link="https://arxiv.org/abs/2003.10595",
        idea="Whether forgotten samples can be told from samples never seen, by the model's outputs.",
        intent="measurement",
    )

    nonmembers: Literal["matched", "test"] = setting(
        "matched", "matched: test samples with the forget set's class shares; test: all of them"
    )
    scores: tuple[Score, ...] = setting(tuple(SCORES), "scores for the threshold attacks")
    attackers: tuple[Attacker, ...] = setting(
        ("svc", "logistic"), "attackers of the efficacy findings"
    )
    max_samples: int = setting(1000, "samples a side that an attacker is fitted on", low=20)

    @property
    def needs(self) -> Needs:
        """Both sides with labels, and logits."""
        return Needs(
            forget=True, retain=True, labels="all", models=2, capabilities=frozenset({"logits"})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Attack subject, original and references in the same way."""
        everyone = [subject, subject.original(), *references]
        # a stratum's samples are attacked as the whole is: known members are those of the whole
        known = [s.whole for s in everyone]
        whys = [unusable(known, s) for s in ("retain-train", "retain-test")]
        why = next((w for w in (unusable(everyone, "forget-train"), *whys) if w), None)
        places: Places | None = None
        how = why or ""
        if not why:
            places, how = nonmembers(subject, self.nonmembers, runtime)
        # an attack on a population says nothing about a handful
        few = len(subject.splits["forget-train"])
        alone = None if few >= FEWEST else f"only {few} samples to forget, {FEWEST} are needed"
        findings = []
        for score in self.scores:
            if places is None or alone:
                findings.append(_none(f"auc-{score}", how if places is None else alone))
            else:
                name = f"membership/auc-{score}"
                values = partial(_score, score)
                findings.append(auc_finding(name, values, subject, references, places, how))
        for attacker in self.attackers:
            if why:
                findings.append(_none(f"efficacy-{attacker}", why))
            else:
                findings.append(self._efficacy(attacker, subject, references, runtime))
        if places is None or alone:
            return [*findings, _none("attack-accuracy", how if places is None else alone)]
        return [*findings, _attack(subject, references, places, how, runtime)]

    def _efficacy(
        self, attacker: Attacker, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> Finding:
        # The forgotten class has no members on the retain side: among the non-members it would
        # teach the attacker the class instead of the membership.
        inside, outside = (len(subject.whole.splits[s]) for s in ("retain-train", "retain-test"))
        size = min(inside, outside, 2 * self.max_samples) // 2 * 2
        if size < 2 * FEWEST:
            return _none(f"efficacy-{attacker}", f"only {size} samples a side to fit and score on")
        picked = [
            torch.randperm(n, generator=runtime.generator("membership", "attackers", n))[:size]
            for n in (inside, outside)
        ]

        def scores(s: Subject) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            feature = _FEATURE[attacker]
            member = _score(feature, s.whole, "retain-train", picked[0])
            unseen = _score(feature, s, "retain-test", picked[1])
            return member, unseen, _score(feature, s, "forget-train")

        def attack(s: Subject) -> tuple[np.ndarray, float]:
            return efficacy(attacker, *scores(s))

        called, accuracy = attack(subject)
        theirs = [attack(r) for r in references]
        refits = runtime.generator("membership", "refits", attacker)
        low, high = efficacy_interval(attacker, *scores(subject), float(called.mean()), refits)
        return Finding(
            f"membership/efficacy-{attacker}",
            float(called.mean()),
            low=low,
            high=high,
            original=float(attack(subject.original())[0].mean()),
            detail={
                "attacker_accuracy": accuracy,
                "reference_attacker_accuracy": float(np.mean([a for _, a in theirs]))
                if theirs
                else None,
                "fitted_on": size,
                "nonmembers": f"{size} test samples of kept classes, half of them to fit on",
            },
            per_sample={"nonmember": called},
            **against([float(c.mean()) for c, _ in theirs]),
        )


def _score(score: str, subject: Subject, split: str, places: Tensor | None = None) -> np.ndarray:
    """A membership score of a split's samples, or of those at some places [n]."""
    found = SCORES[score](subject.logits(split), subject.labels(split)).numpy()
    return found if places is None else found[places.numpy()]


def _attack(
    subject: Subject, references: Sequence[Subject], places: Places, how: str, runtime: Runtime
) -> Finding:
    def attack(s: Subject) -> tuple[float, float, float]:
        forget, out = sides(partial(_score, "loss"), s, places)
        return attack_accuracy(-forget, -out, runtime.generator("membership", "attack-accuracy"))

    why = constant(*sides(partial(_score, "loss"), subject, places))
    if why:
        return _none("attack-accuracy", why)
    raw = attack(subject)
    value, low, high = two_sided(*raw)
    before, *_ = attack(subject.original())
    theirs = [attack(r)[0] for r in references]
    return Finding(
        "membership/attack-accuracy",
        value,
        low=low,
        high=high,
        original=max(before, 1 - before),
        detail={"accuracy": raw[0], "nonmembers": how},
        **against([max(a, 1 - a) for a in theirs]),
    )


def _none(what: str, why: str | None) -> Finding:
    return Finding(f"membership/{what}", None, reason=why)

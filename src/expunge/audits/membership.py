"""Membership inference: do forgotten samples still look like training data?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from expunge.audits._intervals import auc, auc_interval, two_sided, wilson
from expunge.audits._scores import SCORES
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

FEWEST = 10
"""Fewer non-members than this say nothing."""


@dataclass(frozen=True)
class Membership(Audit):
    """A suite of attacks on single outputs, each beside the same attack on retrained models.

    `auc-SCORE`: a threshold on the score separates forgotten samples from non-members; two-sided,
    max(AUC, 1 − AUC) in ½ … 1, since forgotten samples that look *less* like training data than
    unseen ones are found just as well. `efficacy-ATTACKER`: an attacker fitted on retain (member)
    against test (non-member) calls this share of the forgotten samples non-members; good is the
    share it calls so for a retrained model. `attack-accuracy`: cross-validated logistic regression
    on the loss, balanced accuracy folded at ½ (SCRUB's attack).
    """

    name: ClassVar[str] = "membership"
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
    scores: tuple[str, ...] = setting(tuple(SCORES), "scores for the threshold attacks")
    attackers: tuple[str, ...] = setting(("svc", "logistic"), "attackers of the efficacy findings")
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
        generator = runtime.generator("membership")
        outside, how = nonmember_weights(subject, self.nonmembers, generator)
        names = [f"auc-{s}" for s in self.scores] + [f"efficacy-{a}" for a in self.attackers]
        if isinstance(outside, str):
            return [
                Finding(f"membership/{n}", None, reason=outside)
                for n in [*names, "attack-accuracy"]
            ]
        retain = torch.randperm(len(subject.splits["retain-train"]), generator=generator)
        picked = (outside, retain[: 4 * self.max_samples])
        findings = [self._threshold(s, subject, references, picked, how) for s in self.scores]
        findings += [self._efficacy(a, subject, references, picked, how) for a in self.attackers]
        return [*findings, self._attack(subject, references, picked, how)]

    def _threshold(
        self, score: str, subject: Subject, references: Sequence[Subject], picked: Any, how: str
    ) -> Finding:
        forget, out, retain = sides(score, subject, *picked)
        low, high = auc_interval(forget, out)
        raw = auc(forget, out)
        value, folded_low, folded_high = two_sided(raw, low, high)
        theirs = [auc(*sides(score, r, *picked)[:2]) for r in references]
        before = auc(*sides(score, subject.original(), *picked)[:2])
        edges, histogram = histograms(forget, retain, out)
        return Finding(
            f"membership/auc-{score}",
            value,
            low=min(folded_low, value),
            high=max(folded_high, value),
            original=max(before, 1 - before),
            detail={
                "auc": raw,
                "auc_low": low,
                "auc_high": high,
                "reference_auc": float(np.mean(theirs)) if theirs else None,
                "original_auc": before,
                "threshold": best_threshold(forget, out),
                "histogram": {"edges": edges, **histogram},
                "nonmembers": how,
            },
            per_sample={"score": forget},
            **against([max(a, 1 - a) for a in theirs]),
        )

    def _efficacy(
        self, attacker: str, subject: Subject, references: Sequence[Subject], picked: Any, how: str
    ) -> Finding:
        called, accuracy = self._called_nonmember(attacker, subject, picked)
        low, high = wilson(int(called.sum()), len(called))
        return Finding(
            f"membership/efficacy-{attacker}",
            float(called.mean()),
            low=low,
            high=high,
            original=float(self._called_nonmember(attacker, subject.original(), picked)[0].mean()),
            detail={"attacker_accuracy": accuracy, "nonmembers": "test"},
            per_sample={"nonmember": called},
            **against([
                float(self._called_nonmember(attacker, r, picked)[0].mean()) for r in references
            ]),
        )

    def _called_nonmember(
        self, attacker: str, subject: Subject, picked: Any
    ) -> tuple[np.ndarray, float]:
        """Fit on half of (retain, test), score the other half, then judge the forget samples."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        # The features of the papers: true-class confidence for the SVC, entropy for the regression.
        score = "confidence" if attacker == "svc" else "entropy"
        forget, _, retain = sides(score, subject, *picked)
        test = np.concatenate([
            score_of(score, subject, s)
            for s in ("retain-test", "forget-test")
            if len(subject.splits[s])
        ])
        size = min(len(retain), len(test), 2 * self.max_samples) // 2 * 2
        # the class that was forgotten must not stand for non-members alone: the first samples are of all classes
        order = np.random.default_rng(0).permutation(len(test))[:size]
        inside, outside = retain[:size], test[order]
        x = np.concatenate([inside[0::2], outside[0::2]])[:, None]
        y = np.repeat([1, 0], size // 2)
        model: Any = (
            SVC(C=3, gamma="auto", kernel="rbf")
            if attacker == "svc"
            else make_pipeline(StandardScaler(), LogisticRegression())
        )
        model.fit(x, y)
        held_out = np.concatenate([inside[1::2], outside[1::2]])[:, None]
        accuracy = float((model.predict(held_out) == y).mean())
        return model.predict(forget[:, None]) == 0, accuracy

    def _attack(
        self, subject: Subject, references: Sequence[Subject], picked: Any, how: str
    ) -> Finding:
        value, spread = attack_accuracy(*sides("loss", subject, *picked)[:2])
        theirs = [attack_accuracy(*sides("loss", r, *picked)[:2])[0] for r in references]
        before = attack_accuracy(*sides("loss", subject.original(), *picked)[:2])[0]
        return Finding(
            "membership/attack-accuracy",
            value,
            low=max(0.5, value - 1.96 * spread),
            high=min(1.0, value + 1.96 * spread),
            original=before,
            detail={"nonmembers": how},
            **against(theirs),
        )


def score_of(score: str, subject: Subject, split: str) -> np.ndarray:
    """A membership score [n] of every sample of a split."""
    return SCORES[score](subject.logits(split), subject.labels(split)).numpy()


def sides(
    score: str, subject: Subject, outside: dict[str, Tensor], retain: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of forget samples, of the chosen non-members and of the chosen retain samples."""
    out = [score_of(score, subject, split)[places.numpy()] for split, places in outside.items()]
    return (
        score_of(score, subject, "forget-train"),
        np.concatenate(out),
        score_of(score, subject, "retain-train")[retain.numpy()],
    )


def nonmember_weights(
    subject: Subject, how: str, generator: torch.Generator
) -> tuple[dict[str, Tensor] | str, str]:
    """Choose non-members: positions within test splits, or the reason why there are none.

    `matched` draws test samples so that class shares equal those of the forget set, as many as the
    scarcest class allows; a shifted non-member set would make any audit look good.
    """
    if "retain-test" not in subject.splits:
        return "there is no test data to serve as non-members", how
    splits = [s for s in ("forget-test", "retain-test") if len(subject.splits[s])]
    if how == "test":
        return {s: torch.arange(len(subject.splits[s])) for s in splits}, "all test samples"
    wanted = subject.labels("forget-train").bincount()
    labels = torch.cat([subject.labels(s) for s in splits])
    there = labels.bincount(minlength=len(wanted))[: len(wanted)]
    present = wanted > 0
    scale = float((there[present] / wanted[present]).min())
    take = (wanted * scale).floor().long()
    places = []
    for c in torch.nonzero(present).flatten().tolist():
        pool = torch.nonzero(labels == c).flatten()
        places.append(pool[torch.randperm(len(pool), generator=generator)[: int(take[c])]])
    chosen = torch.cat(places).sort().values
    if len(chosen) < FEWEST:
        return (
            f"only {len(chosen)} test samples match the forget set's classes; {FEWEST} are needed",
            how,
        )
    result, offset = {}, 0
    for s in splits:
        size = len(subject.splits[s])
        inside = chosen[(chosen >= offset) & (chosen < offset + size)] - offset
        if len(inside):
            result[s] = inside
        offset += size
    return result, f"{len(chosen)} test samples with the forget set's class shares"


def best_threshold(forget: np.ndarray, out: np.ndarray) -> float:
    """The cut between two scores with the best balanced accuracy, in either direction."""
    values = np.unique(np.concatenate([forget, out]))
    if len(values) == 1:
        return float(values[0])
    cuts = (values[1:] + values[:-1]) / 2
    above_f = 1 - np.searchsorted(np.sort(forget), cuts) / len(forget)
    above_o = 1 - np.searchsorted(np.sort(out), cuts) / len(out)
    return float(cuts[np.abs(above_f - above_o).argmax()])


def histograms(
    forget: np.ndarray, retain: np.ndarray, out: np.ndarray, bins: int = 30
) -> tuple[list[float], dict[str, list[float]]]:
    """Shares a bin for the three groups over common edges (1st to 99th percentile)."""
    together = np.concatenate([forget, retain, out])
    low, high = np.percentile(together, [1, 99])
    edges = np.linspace(low, high if high > low else low + 1e-9, bins + 1)

    def shares(x: np.ndarray) -> list[float]:
        inside = np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0]
        return (inside / max(len(x), 1)).tolist()

    return edges.tolist(), {
        "forget": shares(forget),
        "retain": shares(retain),
        "nonmember": shares(out),
    }


def attack_accuracy(forget: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    """Balanced accuracy of logistic regression on the clipped loss, folded at ½, and its error.

    Five stratified shuffle splits; as many forget samples as non-members.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    size = min(len(forget), len(out))
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.permutation(forget)[:size], rng.permutation(out)[:size]])
    x = np.clip(-losses, -100, 100)[:, None]
    y = np.repeat([1, 0], size)
    splits = StratifiedShuffleSplit(n_splits=5, test_size=0.2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = cross_val_score(LogisticRegression(), x, y, cv=splits, scoring="balanced_accuracy")
    mean = float(got.mean())
    # held-out parts overlap between splits: the error is that of one held-out part
    error = float(np.sqrt(mean * (1 - mean) / max(1, 0.4 * size)))
    return max(mean, 1 - mean), error

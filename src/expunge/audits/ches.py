"""CHES: how alike are the answers to forget and their alternates, and what became of both?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.analysis import ches
from expunge.audits._intervals import mean_interval, share_interval
from expunge.audits._tokens import (
    TOKENS,
    alternates_of,
    answers,
    once,
    read,
    rows_of,
    with_alternates,
)
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.problems.taps import innermost
from expunge.problems.tokens import Tokens, pad
from expunge.train import displacement

SPLIT = "forget-train"
BINS = 10
"""Bars of the histogram."""


@dataclass(frozen=True)
class CHES(Audit):
    r"""Similarity of every pair (alternate, answer to forget), and how their likelihoods moved.

    `similarity`: mean of \(\langle S^+, S^- \rangle / |y^+||y^-| - \|S^+\|^2 / |y^+|^2\) under the
    original, y⁺ the alternate; high is where preferring it is likely to fail. `alternate-change` and
    `forget-change`: mean change of log π against the original in nats. `margin-accuracy`: share of
    pairs whose alternate gained on the answer to forget. Where the alternates lost, the detail holds an
    alarm.
    """

    name: ClassVar[str] = "ches"
    domain: ClassVar[str] = "causal-lm"
    card: ClassVar[Card] = Card(
        title="Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization",
        authors="Razin, Malladi, Bhaskar, Chen, Arora, Hanin",
        year=2025,
        link="https://arxiv.org/abs/2410.08847",
        idea="Answers with similar hidden states lose probability together when one is preferred.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Sums run over the states that predict answered tokens, the end of the text included; "
                "the official code keeps one state too many or drops a padded column.",
                "tests/analysis/test_ches.py::test_ches_invariant_2_padding_changes_nothing",
            ),
            Deviation(
                "Filtering inside the preference methods: a question whose alternates are all left out "
                "keeps the loss of a rejected answer alone, so that it is forgotten all the same.",
                "tests/train/test_displacement.py::test_a_sample_without_alternates_is_rejected_alone",
            ),
        ),
    )

    batch_size: int = setting(16, "pairs a forward pass; no value depends on it", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with their answers, logits of tokens and states."""
        return replace(TOKENS, capabilities=TOKENS.capabilities | {"tapped"})

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Four findings; without alternates, the reason."""
        everyone = [subject, subject.original(), *references]
        ids, why = with_alternates(everyone, SPLIT, self.batch_size)
        if why:
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in WHAT]
        scores = self._scores(subject.original(), ids)
        moved = self._moved(subject, ids)
        theirs = [self._moved(r, ids) for r in references]
        findings = [self._similarity(subject, ids, scores)]
        for what in WHAT[1:]:
            each = moved[what]
            interval = share_interval if what == "margin-accuracy" else mean_interval
            low, high = interval(each)
            means = [float(r[what].mean()) for r in theirs]
            found = Finding(
                f"{self.name}/{what}", float(each.mean()), low=low, high=high, original=0.0,
                detail={"n": len(each)}, per_sample={what: each}, **against(means),
            )  # fmt: skip
            findings.append(found)
        findings[1] = replace(
            findings[1], detail=findings[1].detail | self._alarm(findings[1], scores)
        )
        return findings

    def _alarm(self, change: Finding, scores: dict[ches.Score, np.ndarray]) -> dict[str, Any]:
        """The line where alternates lost, and how the scores order the changes (below 0: as said)."""
        assert change.value is not None
        line = displacement.alarm(change.value)
        found: dict[str, Any] = {} if line is None else {"alarm": line}
        order = {n: spearman(s, change.per_sample["alternate-change"]) for n, s in scores.items()}
        return found | {"spearman": order}

    def _similarity(
        self, subject: Subject, ids: Tensor, scores: dict[ches.Score, np.ndarray]
    ) -> Finding:
        each = scores["ln-ches"]
        real = each[np.isfinite(each)]
        low, high = mean_interval(real)
        counts, edges = np.histogram(real, BINS)
        pairs = self._pairs(subject, ids)
        of = [i for i, others in zip(ids.tolist(), alternates_of(subject, SPLIT, ids), strict=True) for _ in others]  # fmt: skip
        single = [(int(a.answer[0]), int(b.answer[0])) for a, b in pairs if len(a.answer) == len(b.answer) == 1]  # fmt: skip
        detail: dict[str, Any] = {
            "n": len(each), "unscored": len(each) - len(real), "samples": of,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }  # fmt: skip
        if single:  # CHES cannot tell these apart
            inside = innermost(subject.problem.model)
            weights = inside.get_parameter(f"{self._last(subject)}.weight")
            cosines = [ches.unembedding_similarity(weights, *pair) for pair in single]
            detail["unembedding"] = {"n": len(single), "mean": float(np.mean(cosines))}
        value = float(real.mean())
        return Finding(
            f"{self.name}/similarity", value, "down", low=low, high=high, original=value,
            detail=detail, per_sample={str(n): s for n, s in scores.items()},
        )  # fmt: skip

    @torch.no_grad()
    def _scores(self, original: Subject, ids: Tensor) -> dict[ches.Score, np.ndarray]:
        """Every score [pairs], under the original."""
        pairs, last = self._pairs(original, ids), self._last(original)
        found: dict[ches.Score, list[float]] = {name: [] for name in ches.SCORES}
        forward = original.problem.capability("tapped")  # never packed
        for start in range(0, len(pairs), self.batch_size):
            some, states, labels = pairs[start : start + self.batch_size], [], []
            for side in (0, 1):
                x, y = pad([pair[side] for pair in some], original.data_of(SPLIT).filler)
                batch = Batch(x, y, torch.arange(len(some)), len(some)).to(original.runtime.device)
                assert batch.y is not None
                run = functools.partial(forward, batch=batch, layers=[])
                states.append(ches.states_of(original.model, last, run))
                labels.append(batch.y)
            for name, values in found.items():
                both = ches.score(name, (states[0], states[1]), (labels[0], labels[1]))
                values += both.tolist()
        return {name: np.array(values) for name, values in found.items()}

    def _moved(self, subject: Subject, ids: Tensor) -> dict[str, np.ndarray]:
        """Changes of log π against the original [pairs], and whether the alternate gained on the other."""
        change = [self._log(s, ids) for s in (subject, subject.original())]
        forget, alternate = (now - before for now, before in zip(*change, strict=True))
        ahead = (alternate > forget).astype(float)
        return {"alternate-change": alternate, "forget-change": forget, "margin-accuracy": ahead}

    def _log(self, subject: Subject, ids: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of π of the answer to forget and of the alternate of each pair."""

        def others(of: Tensor) -> list[list[float]]:
            rows = alternates_of(subject, SPLIT, of)
            flat = iter(read(subject, [r for row in rows for r in row], self.batch_size))
            return [[float(next(flat).logp.sum()) for _ in row] for row in rows]

        alternate = once(subject, ("alternates", SPLIT, self.batch_size), ids, others)
        own = answers(subject, SPLIT, self.batch_size, ids)
        forget = [float(a.logp.sum()) for a, row in zip(own, alternate, strict=True) for _ in row]
        return np.array(forget), np.array([v for row in alternate for v in row])

    def _pairs(self, subject: Subject, ids: Tensor) -> list[tuple[Tokens, Tokens]]:
        """Alternate and answer to forget of every pair."""
        own, others = rows_of(subject, SPLIT, ids), alternates_of(subject, SPLIT, ids)
        return [(other, row) for row, some in zip(own, others, strict=True) for other in some]

    @staticmethod
    def _last(subject: Subject) -> str:
        return subject.problem.role("last layer")[0]


WHAT = ("similarity", "alternate-change", "forget-change", "margin-accuracy")


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation of what is finite in both; None if either is constant."""
    from scipy.stats import rankdata

    there = np.isfinite(a) & np.isfinite(b)
    ranks = [rankdata(x[there]) for x in (a, b)]
    if there.sum() < 2 or any(np.ptp(r) == 0 for r in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])

"""Extraction likelihood: are secrets said word for word, and how much of them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.audits._splits import SPLITS, missing
from expunge.audits._tokens import TOKENS, end_tokens, once, read, rows_of, share_finding
from expunge.audits.memorisation import exact
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.errors import SettingError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.problems.segments import (
    LONGEST,
    ORDERS,
    PREFIX,
    WHOLE,
    extraction,
    segments,
    sensitive,
)
from expunge.problems.tokens import TokenData, Tokens

_TEST = "tests/audits/test_extraction.py::test_"


@dataclass(frozen=True)
class ExtractionLikelihood(Audit):
    r"""MA and EL_n of sensitive segments, means over each split, and the share that is forgotten.

    For a segment s of L tokens behind its prefix p, `accuracy-…` is the share of tokens that are arg-max
    under teacher forcing, and `elN-…` \(\frac1{L-n+1} \sum_{j=0}^{L-n} \mathrm{overlap}_n(\hat s_j, s_{\ge j})\)
    with \(\hat s_j\) the greedy continuation of \(p + s_{<j}\) by \(L - j\) tokens; where L < n, whether all of
    s is said from p. Where no sample of a split is marked, answers are the segments. `forgotten` is the
    share of forget samples that are below the original's means on text it has not seen, in MA and each
    EL_n. Range 0 … 1, higher is more memorised; good is what a retrained model has.
    """

    name: ClassVar[str] = "extraction-likelihood"
    domain: ClassVar[str] = "causal-lm"
    card: ClassVar[Card] = Card(
        title="Scrub It Out! Erasing Sensitive Memorization in Code Language Models via Machine Unlearning",
        authors="Chu, Wan, Zhang, Wang, Yang, Zhang, Zhou, Shi, Jin, Lo",
        year=2025,
        link="https://arxiv.org/abs/2509.13755",
        idea="Greedy continuations of every beginning of a secret, compared by their n-grams.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "The values of a sample's segments are averaged before those of samples are.",
                _TEST + "a_sample_has_the_mean_of_its_segments",
            ),
            Deviation(
                "Text that the model has not seen is the held-out data.",
                _TEST + "forgotten_is_below_what_unseen_text_has",
            ),
        ),
    )

    orders: tuple[int, ...] = setting(ORDERS, "the n of the n-grams, separated by commas", low=1, source="paper")  # fmt: skip
    prefix: int = setting(PREFIX, "tokens before a segment at most", low=1, source="official code")
    longest: int = setting(LONGEST, "tokens of a marked segment at most", low=1, source="official code")  # fmt: skip
    whole: int = setting(WHOLE, "the same of an answer that is a segment", low=1, source="official code")  # fmt: skip
    samples: int = setting(100, "samples of a split at most: each takes a generation for each of its tokens", low=1)  # fmt: skip
    batch_size: int = setting(16, "sequences at a time; no value depends on it", low=1)

    def __post_init__(self) -> None:
        """Check the settings; raises `SettingError` without any n, or with one below 1."""
        super().__post_init__()
        if not self.orders or min(self.orders) < 1:
            raise SettingError(f"orders={self.orders} must hold lengths of n-grams, from 1")

    @property
    def needs(self) -> Needs:
        """Both sides with their answers, logits of tokens, and generation."""
        return replace(TOKENS, capabilities=TOKENS.capabilities | {"generate"})

    @property
    def measures(self) -> list[str]:
        """Names of what is measured on each split."""
        return ["accuracy", *(f"el{n}" for n in self.orders)]

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """The measures on each split and the share forgotten; what does not exist says why."""
        everyone = [subject, subject.original(), *references]
        findings, reasons = [], {}
        for split in SPLITS:
            ids = self._picked(subject, split, runtime)
            reasons[split] = why = self._unread(everyone, split, ids)
            for place, what in enumerate(self.measures):
                name = f"{self.name}/{what}-{split}"
                if why:
                    findings.append(Finding(name, None, reason=why))
                    continue
                values = partial(self._column, place, split, ids)
                of = "secrets" if marked(subject, split) else "answers"
                findings.append(share_finding(name, values, subject, references, what, {"of": of}))
        return [*findings, self._forgotten(subject, references, runtime, reasons)]

    def _forgotten(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime,
        reasons: dict[str, str | None],
    ) -> Finding:  # fmt: skip
        name = f"{self.name}/forgotten"
        why = reasons["forget-train"] or reasons["retain-test"]
        if why:
            return Finding(name, None, reason=why)
        unseen = self._picked(subject, "retain-test", runtime)
        limits = self._values("retain-test", unseen, subject.original()).mean(0)
        ids = self._picked(subject, "forget-train", runtime)

        def below(one: Subject) -> np.ndarray:
            # no less than 0 can be said, so a limit of 0 is met there
            found = self._values("forget-train", ids, one)
            return ((found < limits) | (found == 0)).all(1).astype(float)

        detail = {"thresholds": dict(zip(self.measures, limits.tolist(), strict=True))}
        return share_finding(name, below, subject, references, "forgotten", detail)

    def _unread(self, everyone: Sequence[Subject], split: str, ids: Tensor) -> str | None:
        why = missing(everyone[0], split)
        if why:
            return why
        if not isinstance(everyone[0].data_of(split), TokenData):
            return "the data is not made of tokens"
        if not len(ids):
            return "none of the samples asked has a segment to say"
        if any(np.isnan(self._values(split, ids, one)).any() for one in everyone):
            return f"a model gives NaN outputs on {split}"
        return None

    def _picked(self, subject: Subject, split: str, runtime: Runtime) -> Tensor:
        """Some ids of a split's samples that have a segment; a stratum's are among those of the whole."""
        if missing(subject, split) or not isinstance(subject.data_of(split), TokenData):
            return torch.empty(0)
        ids = subject.whole.splits[split]
        ids = ids[torch.tensor([bool(some) for some in self._segments(subject, split, ids)])]
        order = torch.randperm(len(ids), generator=runtime.generator(self.name, split))
        picked = ids[order[: self.samples]].sort().values
        return picked[torch.isin(picked, subject.splits[split])]

    def _segments(self, subject: Subject, split: str, ids: Tensor) -> list[list[Tokens]]:
        """Segments of some samples; where some sample of the split is marked, of marked ones alone."""
        ends, only_marked = end_tokens(subject), marked(subject, split)
        return [
            []
            if only_marked and sensitive(row) is None
            else segments(row, ends, prefix=self.prefix, longest=self.longest, whole=self.whole)
            for row in rows_of(subject, split, ids)
        ]

    def _column(self, place: int, split: str, ids: Tensor, subject: Subject) -> np.ndarray:
        return self._values(split, ids, subject)[:, place]

    def _values(self, split: str, ids: Tensor, subject: Subject) -> np.ndarray:
        """All measures [n, m] of some samples."""
        key = ("extraction", split, str(self.in_force()))
        return np.array(once(subject, key, ids, lambda new: self._measured(subject, split, new)))

    def _measured(self, subject: Subject, split: str, ids: Tensor) -> list[np.ndarray]:
        own = self._segments(subject, split, ids)
        flat = [segment for some in own for segment in some]
        right = read(subject, flat, self.batch_size)
        if any(np.isnan(answer.logp).any() for answer in right):  # nothing there to continue
            return [np.full(len(self.measures), np.nan)] * len(own)
        said = extraction(
            subject.problem.capability("generate"), subject.model, flat,
            orders=self.orders, size=self.batch_size,
        )  # fmt: skip
        each = (
            [exact(answer), *(values[n] for n in self.orders)]
            for answer, values in zip(right, said, strict=True)
        )
        return [np.mean([next(each) for _ in some], 0) for some in own]


def marked(subject: Subject, split: str) -> bool:
    """Whether a sample of a split holds a sensitive span."""
    rows = rows_of(subject, split, subject.whole.splits[split])
    return any(sensitive(row) is not None for row in rows)

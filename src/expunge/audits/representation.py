"""Representation: do outputs *and* features agree with those of a retrained model?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from expunge.audits._intervals import wilson
from expunge.audits._representation import (
    ACCURACIES,
    debiased_cka,
    feature_agreement,
    halves,
    harmonic,
    jackknife,
    logit_agreement,
    neighbours_right,
    probe_right,
)
from expunge.audits._splits import FEWEST, NO_REFERENCE, missing
from expunge.audits.cka import linear_cka
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.data import Data
from expunge.core.errors import DataError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

SCORES = ("agl", "agr", "h-lr")
TRANSFERS = ("knn", "probe")
GROUPS = 10
_TEST = "tests/audits/test_representation.py::test_"


@dataclass(frozen=True)
class Representation(Audit):
    r"""Agreement with retrained models in outputs and in features, and what frozen features still tell apart.

    `agl` compares accuracies, `agr` features, `h-lr` is their harmonic mean, each averaged over the
    references (formulas: `expunge.audits._representation`), 0 … 1 and up to what retrained models reach
    among each other. A method that changes the last layer alone has a high `agl` and features that are the
    original's (`cka-original` 1). `knn` and `probe` are accuracies of the 5 nearest neighbours by cosine
    and of a linear classifier on a fifth of the samples, fitted on the rest (with known=training on all of
    them, fitted on training samples of the same classes: many more are asked about); good is what a retrained model
    has, *not* 0: classes it never saw are told apart by its features as well.

    Features are the input of the last layer. They are read on test samples of the forgotten classes (of
    one class alone on all test samples, where only queries of that class count), or on downstream data.
    """

    name: ClassVar[str] = "representation"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Are We Truly Forgetting? A Critical Re-examination of Machine Unlearning Evaluation Protocols",
        authors="Kim, Cha, Kim",
        year=2025,
        link="https://arxiv.org/abs/2503.06991",
        idea="Agreement with the retrained model has to hold for the features, not only for the outputs.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Neighbours are searched among features, not among the model's outputs.",
                _TEST + "truly_forgetting_invariant_4_a_new_head_leaves_the_features",
            ),
            Deviation(
                "CKA is debiased and over all samples at once; estimator=linear gives the biased one.",
                _TEST + "truly_forgetting_invariant_2_debiased_alignment",
            ),
            Deviation(
                "The closed forms of AGL and AGR are taken from the text's description; the code has none.",
                _TEST + "truly_forgetting_invariant_3_agreement",
            ),
        ),
    )

    k: int = setting(5, "neighbours", low=1, source="official code")
    share: float = setting(0.8, "samples whose labels are known", above=0, high=0.95, source="official code")  # fmt: skip
    known: Literal["part", "training"] = setting(
        "part",
        "samples whose labels are known: part: a share of those that features are read on; training: training "
        "samples of the same classes, and all the others are asked about",
        source="official code: part",
    )
    samples: int = setting(500, "samples that features are read on, at most", low=20)
    estimator: Literal["debiased", "linear"] = setting("debiased", "of CKA; linear is biased up where samples are few")  # fmt: skip
    downstream: str = setting("", "labelled data on disk (.npz, image folder) for the features; none: test data")  # fmt: skip

    @property
    def needs(self) -> Needs:
        """Both sides with labels, logits, and features."""
        return Needs(
            forget=True, retain=True, labels="all", models=2,
            capabilities=frozenset({"logits", "penultimate"}),
        )  # fmt: skip

    def reads(self) -> list[str]:
        """The downstream data, if any."""
        return [_read(self.downstream).fingerprint()] if self.downstream else []

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Three scores, two transfers, and the alignment with the original."""
        names = [*SCORES, *TRANSFERS, "cka-original"]
        splits = [
            s for s in ACCURACIES if not missing(subject, s) and len(subject.splits[s]) >= FEWEST
        ]
        why = missing(subject, "forget-train") or missing(subject, "retain-test")
        data, ids, only, reason = self._where(subject, runtime)
        why = why or reason
        if why:
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in names]
        labels = data.labels_of(ids)
        if not why and len(labels.unique()) < 2:
            why = "the data has one class alone, so there is nothing to tell apart"
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in names]
        more, parts = self._known(subject, labels, only, runtime)
        if only is not None:
            parts = parts[0], parts[1][torch.isin(labels[parts[1]], only)]
        if len(parts[1]) < FEWEST:
            why = f"only {len(parts[1])} samples to ask about, {FEWEST} are needed; give downstream data"
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in names]
        everyone = [subject, subject.original(), *references]
        train, count = subject.problem.train, len(ids)
        features = [_features(s, data, ids) for s in everyone]
        if len(more):
            labels = torch.cat([labels, train.labels_of(more)])
            features = [
                torch.cat([z, _features(s, train, more)])
                for s, z in zip(everyone, features, strict=True)
            ]
        if not all(bool(z.isfinite().all()) for z in features):
            why = "a model gives NaN or infinite features"
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in names]
        seen = [
            _Seen(
                {p: (s.logits(p).argmax(1) == s.labels(p)).numpy() for p in splits},
                z[:count].double() @ z[:count].double().T,
                neighbours_right(z, labels, *parts, self.k),
                probe_right(z, labels, *parts),
            )
            for s, z in zip(everyone, features, strict=True)
        ]
        mine, before, *theirs = seen
        return [
            *self._scores(mine, before, theirs, splits),
            *(self._transfer(what, mine, before, theirs) for what in TRANSFERS),
            self._to_original(mine, before, theirs),
        ]

    def _where(
        self, subject: Subject, runtime: Runtime
    ) -> tuple[Data, Tensor, Tensor | None, str | None]:
        """Data and ids that features are read on, and the classes whose queries count, or why not."""
        if self.downstream:
            other = _read(self.downstream)
            return other, self._some(other.ids, runtime), None, None
        data: Any = subject.problem.test
        none = torch.empty(0, dtype=torch.long)
        if why := missing(subject, "forget-test"):
            return data, none, None, why
        ids, classes = subject.splits["forget-test"], subject.labels("forget-test").unique()
        if len(classes) > 1:
            return data, self._some(ids, runtime), None, None
        rest = self._some(subject.splits["retain-test"], runtime)
        return data, torch.cat([self._some(ids, runtime), rest]).sort().values, classes, None

    def _known(
        self, subject: Subject, labels: Tensor, only: Tensor | None, runtime: Runtime
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Training samples [k] that stand behind the others [n], and places of known and asked ones among all."""
        if self.known == "part" or self.downstream:
            parts = halves(labels, self.share, runtime.generator(self.name, "split"))
            return torch.empty(0, dtype=torch.long), parts
        more = self._some(subject.splits["forget-train"], runtime)
        if only is not None:
            more = torch.cat([more, self._some(subject.splits["retain-train"], runtime)])
        count = len(labels)
        return more, (torch.arange(count, count + len(more)), torch.arange(count))

    def _some(self, ids: Tensor, runtime: Runtime) -> Tensor:
        order = torch.randperm(len(ids), generator=runtime.generator(self.name, "samples"))
        return ids[order[: self.samples]].sort().values

    def _cka(self, a: Tensor, b: Tensor) -> float:
        if self.estimator == "debiased":
            return debiased_cka(a, b)
        return linear_cka(*(g - g.mean(0) - g.mean(1, keepdim=True) + g.mean() for g in (a, b)))

    def _agree(self, mine: _Seen, theirs: _Seen) -> dict[str, float]:
        one, other = ({s: float(r.mean()) for s, r in m.right.items()} for m in (mine, theirs))
        logit = logit_agreement(one, other)
        cka = self._cka(mine.gram, theirs.gram)
        feature = feature_agreement(cka, float(mine.knn.mean()), float(theirs.knn.mean()))
        return {"agl": logit, "agr": feature, "h-lr": harmonic(logit, feature), "cka": cka}

    def _mean(self, mine: _Seen, theirs: Sequence[_Seen]) -> dict[str, float]:
        found = [self._agree(mine, t) for t in theirs]
        return {key: float(np.mean([f[key] for f in found])) for key in found[0]}

    def _scores(
        self, mine: _Seen, before: _Seen, theirs: list[_Seen], splits: list[str]
    ) -> list[Finding]:
        if not theirs:
            return [Finding(f"{self.name}/{s}", None, "up", reason=NO_REFERENCE) for s in SCORES]
        value, original = self._mean(mine, theirs), self._mean(before, theirs)
        among = [self._agree(a, b) for a, b in itertools.combinations(theirs, 2)]
        less = [
            self._mean(mine.without(g), [t.without(g) for t in theirs]) for g in range(GROUPS)
        ]  # fmt: skip
        findings = []
        for what in SCORES:
            half = jackknife([part[what] for part in less])
            others = [a[what] for a in among]
            findings.append(
                Finding(
                    f"{self.name}/{what}", value[what], "up", low=max(0.0, value[what] - half),
                    high=min(1.0, value[what] + half), original=original[what],
                    reference=float(np.mean(others)) if others else None,
                    floor=float(np.ptp(others)) if len(others) > 1 else None,
                    reason=None if others else "one reference: the agreement among references is unknown",
                    detail={**value, "splits": splits, "original": original, "estimator": self.estimator},
                )
            )  # fmt: skip
        return findings

    def _transfer(self, what: str, mine: _Seen, before: _Seen, theirs: list[_Seen]) -> Finding:
        right = getattr(mine, what)
        low, high = wilson(int(right.sum()), len(right))
        return Finding(
            f"{self.name}/{what}", float(right.mean()), low=low, high=high,
            original=float(getattr(before, what).mean()),
            detail={"asked": len(right), "data": self.downstream or "test data"},
            **against([float(getattr(t, what).mean()) for t in theirs]),
        )  # fmt: skip

    def _to_original(self, mine: _Seen, before: _Seen, theirs: list[_Seen]) -> Finding:
        value = self._cka(mine.gram, before.gram)
        less = [self._cka(mine.without(g).gram, before.without(g).gram) for g in range(GROUPS)]
        half = jackknife(less)
        return Finding(
            f"{self.name}/cka-original", value, low=max(-1.0, value - half),
            high=max(value, min(1.0, value + half)), original=1.0,
            detail={"estimator": self.estimator},
            **against([self._cka(t.gram, before.gram) for t in theirs]),
        )  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """What one model does.

    Attributes:
        right: by split, which samples it predicts right.
        gram: of its features [n, n].
        knn: which samples asked about its neighbours get right.
        probe: which a linear classifier gets right.
    """

    right: dict[str, np.ndarray]
    gram: Tensor
    knn: np.ndarray
    probe: np.ndarray = field(repr=False)

    def without(self, group: int) -> _Seen:
        """The same with a tenth of the samples left out everywhere, drawn whatever their order is."""

        def kept(values: np.ndarray) -> np.ndarray:
            return values[_groups(len(values)).numpy() != group]

        keep = _groups(len(self.gram)) != group
        right = {split: kept(values) for split, values in self.right.items()}
        return _Seen(right, self.gram[keep][:, keep], kept(self.knn), kept(self.probe))


def _groups(count: int) -> Tensor:
    """A group 0 … 9 for each of some samples; the same for every model, and not along their classes."""
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator) % GROUPS


@torch.no_grad()
def _features(subject: Subject, data: Data, ids: Tensor) -> Tensor:
    """What the last layer sees of some samples [n, d]."""
    penultimate, device = subject.problem.capability("penultimate"), subject.runtime.device
    batches = (b.to(device) for b in data.batches(256, ids))
    return torch.cat([penultimate(subject.model, b).flatten(1).float().cpu() for b in batches])


def _read(path: str) -> Data:
    from expunge.problems.data_on_disk import load_data

    data: Any = load_data(path, model_folder=None)[0]
    if not data.labelled:
        raise DataError(f"{path} has no labels; neighbours and probes need them")
    return data

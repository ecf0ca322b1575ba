"""NoMUS: are forgotten people like people never seen, and does the model still do its task?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.audits._intervals import auc, two_sided
from expunge.audits._members import also_to_forget
from expunge.audits._nomus import (
    Measured,
    attack,
    attack_interval,
    cut,
    nomus,
    nomus_interval,
    share,
)
from expunge.audits._splits import FEWEST, NO_TEST, missing
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.data import Data
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.train.losses import answers_of

PEOPLE = ("identity", "user")
"""Columns that usually say whose a sample is."""
_NAMES = ("score", "mia", "accuracy-retain-test")
_TEST = "tests/audits/test_nomus.py::test_"


@dataclass(frozen=True)
class NoMUS(Audit):
    r"""The score of MUFAC and MUCAC, never without its two parts.

    `accuracy-retain-test`: A, accuracy on people of the test data. `mia`: a logistic regression tells the losses of
    the samples to forget from those of *unseen* people (test data, column `unseen`), held-out accuracy M, ten
    splits; shown two-sided, ½ + |M − ½|, in ½ … 1. `score`: \(\lambda A + (1-\lambda)(1 - 2|M - \tfrac12|)\).

    Forgotten and unseen are different people, who differ in more than membership: the gap of a retrained
    model is the floor of `mia`, not ½. A model that answers everything alike has M = ½ and so a score of
    \((1-\lambda) + \lambda A\), often above the original's; the score's detail says how much. Intervals are over people
    where a column says whose a sample is, and over samples where none does; they know that the attack was
    fitted to the same people it is asked about.
    """

    name: ClassVar[str] = "nomus"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Towards Machine Unlearning Benchmarks: Forgetting the Personal Identities in Facial Recognition Systems",
        authors="Choi, Na",
        year=2023,
        link="https://arxiv.org/abs/2311.02240",
        idea="Forgotten people should be to the model what people are that it never saw, and its task should not suffer.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "The larger of both sides is cut to the size of the smaller, and the attack's accuracy is balanced.",
                _TEST + "sides_of_any_size_have_chance_at_a_half",
            ),
            Deviation(
                "Losses are standardised before each fit; standardise=False is the published attack.",
                _TEST + "mufac_invariant_3_equal_shifted_and_rescaled_losses",
            ),
        ),
    )

    weight: float = setting(0.5, "weight λ of the accuracy", low=0, high=1, source="official code")
    column: str = setting("unseen", "column of the test data that marks unseen people by 1")
    identity: str = setting("", "column of whose a sample is; by default identity or user, if there is one")  # fmt: skip
    standardise: bool = setting(True, "bring losses to mean 0 and variance 1 before each fit")

    @property
    def needs(self) -> Needs:
        """Forget data with labels, and logits with their losses."""
        return Needs(
            forget=True, labels="all", models=1, capabilities=frozenset({"logits_and_loss"})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """The score and its two parts, or why there are none."""
        if why := self._lacking(subject):
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in _NAMES]
        test: Any = subject.problem.test
        mark = torch.from_numpy(test.columns[self.column] != 0)
        sides = _Sides(
            subject.splits["forget-train"], test.ids[mark], test.ids[~mark],
            runtime.generator(self.name, "cut"),
        )  # fmt: skip
        everyone = [subject, subject.original(), *references]
        seen = [_Seen.of(s, sides, self.standardise) for s in everyone]
        if any(s is None for s in seen):
            why = "a model gives NaN or infinite outputs"
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in _NAMES]
        mine, before, *theirs = (s for s in seen if s is not None)
        train, column = subject.problem.train, self._owner(subject)
        owners = [
            _owners(d, ids, column)
            for d, ids in ((train, sides.forget), (test, sides.unseen), (test, sides.test))
        ]
        # one person alone has no spread; then samples have to do
        single = any(o is None or len(np.unique(o)) < 2 for o in owners)
        sizes = (len(sides.forget), len(sides.unseen), len(sides.test))
        forget, unseen, tested = (
            np.arange(n) if single or o is None else o for n, o in zip(sizes, owners, strict=True)
        )
        mia = attack_interval(
            mine.forget, mine.unseen, (forget, unseen), standardise=self.standardise
        )
        accuracy = share(mine.hits, tested)
        about = {
            "units": "samples" if single else "people", "forget": len(sides.every),
            "unseen": int(mark.sum()), "attacked": 2 * len(sides.forget), "test": len(sides.test),
            "also_retained": _in_both(train, subject, column),
        }  # fmt: skip
        return [
            self._score(accuracy, mia, mine, before, theirs, about),
            self._mia(mia, mine, before, theirs, about),
            Finding(
                f"{self.name}/accuracy-retain-test", accuracy.value, low=accuracy.low,
                high=accuracy.high, original=before.accuracy, detail=about,
                per_sample={"right": mine.hits}, **against([t.accuracy for t in theirs]),
            ),
        ]  # fmt: skip

    def _owner(self, subject: Subject) -> str:
        assert subject.problem.test is not None
        train, test = subject.problem.train.columns, subject.problem.test.columns
        return self.identity or next((c for c in PEOPLE if c in train and c in test), PEOPLE[0])

    def _lacking(self, subject: Subject) -> str | None:
        test = subject.problem.test
        if test is None:
            return NO_TEST
        if self.column not in test.columns:
            return f"the test data has no column {self.column!r} that marks people never seen; split_subjects makes one"
        if test.columns[self.column].dtype.kind not in "biuf":
            return f"the column {self.column!r} of the test data must hold 1 and 0, not words"
        unseen = int((test.columns[self.column] != 0).sum())
        few = {"unseen people": unseen, "test people": len(test) - unseen}
        few["people to forget"] = len(subject.splits["forget-train"])
        for who, count in few.items():
            if count < FEWEST:
                return f"only {count} samples of {who}, {FEWEST} are needed"
        if not test.labelled:
            return "the test data has no labels"
        if shared := also_to_forget(subject):
            return f"{shared} of the test samples {'is' if shared == 1 else 'are'} among the samples to forget"
        train = subject.problem.train
        owner = self._owner(subject)
        where = {"training": train, "test": test}
        lacking = [n for n, d in where.items() if self.identity and owner not in d.columns]
        if lacking:
            return f"the {lacking[0]} data has no column {owner!r} that says whose a sample is"
        if owner in train.columns and owner in test.columns:
            both = np.intersect1d(train.columns[owner], test.columns[owner])
            if len(both):
                return f"{len(both)} people ({both[0]}, …) are in training and in test data, so nobody there is unseen"
        return missing(subject, "forget-train")

    def _score(
        self, accuracy: Measured, mia: Measured, mine: _Seen, before: _Seen, theirs: list[_Seen],
        about: dict[str, Any],
    ) -> Finding:  # fmt: skip
        found = nomus_interval(accuracy, mia, self.weight)
        each = [nomus(t.accuracy, t.mia, self.weight) for t in theirs]
        return Finding(
            f"{self.name}/score", found.value, "up", low=found.low, high=found.high,
            original=nomus(before.accuracy, before.mia, self.weight),
            detail={
                **about, "accuracy": mine.accuracy, "mia": mine.mia, "gap": abs(mine.mia - 0.5),
                "reference_accuracy": [t.accuracy for t in theirs],
                "reference_gap": [abs(t.mia - 0.5) for t in theirs],
                "same_answer": nomus(mine.commonest, 0.5, self.weight), "weight": self.weight,
            },
            **against(each),
        )  # fmt: skip

    def _mia(
        self, mia: Measured, mine: _Seen, before: _Seen, theirs: list[_Seen], about: dict[str, Any]
    ) -> Finding:
        value, low, high = two_sided(mia.value, mia.low, mia.high)
        # which side has the lower losses: without it, forgotten and over-forgotten look alike
        signed = [s.sided for s in (mine, before, *theirs)]
        turned = (mia.value >= 0.5) != (mine.side > 0)
        ends = (1 - mia.high, 1 - mia.low) if turned else (mia.low, mia.high)
        folded = [0.5 + abs(t.mia - 0.5) for t in theirs]
        return Finding(
            f"{self.name}/mia", value, low=low, high=high,
            original=0.5 + abs(before.mia - 0.5),
            detail={
                **about, "mia": mine.mia, "auc": signed[0], "auc_low": ends[0],
                "auc_high": ends[1], "original_auc": signed[1],
                "reference_auc": float(np.mean(signed[2:])) if theirs else None,
                "reference_auc_spread": float(np.ptp(signed[2:])) if len(theirs) > 1 else None,
                "lower_losses": "forget" if mine.side > 0 else "unseen",
            },
            per_sample={"loss": mine.all_forget},
            **against(folded),
        )  # fmt: skip


class _Sides:
    """Samples of the three groups of people, and which of them the attack looks at."""

    def __init__(self, forget: Tensor, unseen: Tensor, test: Tensor, draw: torch.Generator) -> None:
        size = min(len(forget), len(unseen))
        self.every, self.test = forget, test
        self.picked = cut(len(forget), size, draw)
        self.forget = forget[torch.from_numpy(self.picked)]
        self.unseen = unseen[torch.from_numpy(cut(len(unseen), size, draw))]


@dataclass(frozen=True)
class _Seen:
    """What one model does: losses [n] of the groups attacked, and shares of right answers [m] in the test."""

    all_forget: np.ndarray
    forget: np.ndarray
    unseen: np.ndarray
    hits: np.ndarray
    mia: float
    commonest: float

    @classmethod
    def of(cls, subject: Subject, sides: _Sides, standardise: bool) -> _Seen | None:
        """Look at a model; None where an output is not finite."""
        train, test = subject.problem.train, subject.problem.test
        every, _, _ = _outputs(subject, train, sides.every)
        unseen, _, _ = _outputs(subject, test, sides.unseen)
        tested, hits, commonest = _outputs(subject, test, sides.test)
        if not all(np.isfinite(x).all() for x in (every, unseen, tested)):
            return None
        forget = every[sides.picked]
        mia = attack(forget, unseen, standardise=standardise)
        return cls(every, forget, unseen, hits, mia, commonest)

    @property
    def accuracy(self) -> float:
        return float(self.hits.mean())

    @property
    def side(self) -> int:
        """1 where forgotten samples look like members (lower losses), −1 where they look the opposite."""
        return 1 if auc(self.unseen, self.forget) >= 0.5 else -1

    @property
    def sided(self) -> float:
        """M from ½ upward where forgotten samples look like members, downward where the opposite."""
        return 0.5 + self.side * abs(self.mia - 0.5)


@torch.no_grad()
def _outputs(subject: Subject, data: Any, ids: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Losses [n], shares of right answers [n], and the best accuracy of one answer for everything."""
    compute, device = subject.problem.capability("logits_and_loss"), subject.runtime.device
    losses, hits, labels = [], [], data.labels_of(ids)
    own = getattr(subject.problem, "hits", None)
    width = 1
    for batch in data.batches(256, ids):
        logits, loss = (t.double().cpu() for t in compute(subject.model, batch.to(device)))
        width = logits.shape[1]
        right = (logits.argmax(1) == batch.y) if own is None else own(logits, batch.y)
        losses.append(loss)
        hits.append(right.double())
    if own is None:
        commonest = float(labels.bincount().max()) / len(labels)
    else:
        most = (answers_of(labels, width).double().mean(0) > 0.5).double() * 2 - 1
        commonest = float(own(most.expand(len(labels), -1), labels).mean())
    return torch.cat(losses).numpy(), torch.cat(hits).numpy(), commonest


def _in_both(train: Data, subject: Subject, column: str) -> int | None:
    """How many people have samples on the forget and on the retain side; None where nobody is named."""
    if column not in train.columns:
        return None
    splits = subject.whole.splits
    forget, retain = (
        train.columns[column][train.positions(splits[f"{side}-train"]).numpy()]
        for side in ("forget", "retain")
    )
    return len(np.intersect1d(forget, retain))


def _owners(data: Data, ids: Tensor, column: str) -> np.ndarray | None:
    """Whose some samples are [n], or None where no column says it."""
    if column not in data.columns:
        return None
    return data.columns[column][data.positions(ids).numpy()]

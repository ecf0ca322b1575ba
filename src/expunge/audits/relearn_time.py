"""Relearn time: how many updates bring the forgotten back, beside a model that never saw it?"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits._splits import one_class
from expunge.audits.weight_distance import plain
from expunge.core.audit import Audit, Finding, Subject
from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime, random_restored
from expunge.core.settings import setting
from expunge.core.view import Source
from expunge.train.fit import Pass, fit

HELD = 256
"""Samples whose error is taken at a time."""
LEVEL = 0.93
"""Probability that an interval holds the median of endless orders, at least."""


@dataclass(frozen=True)
class RelearnTime(Audit):
    r"""Updates \(r(M)\) until a model is again as good on forgotten data as the original was.

    Training on the *whole* training set; after how many mini-batch updates (at least 1) is the
    error on unseen samples of what was forgotten at most \((1+\alpha)\) times the original's?
    `updates` is r; `ain` is \(r / \bar r_{ref}\), the anamnesis index: 1 is as hard to relearn as
    for a model that never saw the data, far below 1 the information is still there, far above 1 it
    was pushed away (a leak too). Not more than `cap` updates are tried; what did not get there
    counts as `cap`, and `capped` in the detail says so: the index is then at least the value given, or
    at most that if it is references that did not get there; with both there is none. The error is the task loss; for classifiers
    one minus the accuracy would be 0 for a good original, so there the accuracy has to reach
    \((1-\alpha)\) of the original's. `on=forget` relearns from the forgotten samples alone and `on=kept` from
    kept ones alone, which hold nothing of what was forgotten; a model that gets there all the same had
    kept it. The interval is of the median over orders of the batches, by its order statistics: 94 % from the
    five orders, 97 % from six; the references' part in the index is their spread, the floor. The detail of `updates` has the error (for classifiers the accuracy) after each update.
    """

    name: ClassVar[str] = "relearn-time"
    card: ClassVar[Card] = Card(
        title="Deep Regression Unlearning",
        authors="Tarun, Chundawat, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2210.08196",
        idea="How fast a model relearns what it was made to forget.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "A model that is good enough without any update counts as one update.",
                "tests/audits/test_relearn_time.py::test_deep_regression_invariant_6_ain",
            ),
            Deviation(
                "A count is the median over several orders of the batches: a single order can tear a "
                "model apart first.",
                "tests/audits/test_relearn_time.py::test_counts_are_medians_over_orders",
            ),
            Deviation(
                "The count ends at a number of updates, not after ten epochs.",
                "tests/audits/test_relearn_time.py::test_what_does_not_get_there_is_capped_and_says_so",
            ),
        ),
    )

    alpha: float = setting(0.05, "tolerance over the original's error, α", low=0, source="official code")  # fmt: skip
    lr: float = setting(0.01, "learning rate of Adam; the index depends on it", above=0, source="official code")  # fmt: skip
    batch_size: int = setting(256, "samples an update; the index depends on it", low=1, source="official code")  # fmt: skip
    on: Literal["all", "forget", "kept"] = setting("all", "what it learns from: all training data, what was forgotten, or the rest", source="official code: all")  # fmt: skip
    cap: int = setting(300, "largest number of updates", low=1)
    repeats: int = setting(5, "orders of the batches; the median of their counts is taken", low=1)

    @property
    def needs(self) -> Needs:
        """All training data with labels; retrained models to be held against."""
        return Needs(forget=True, retain=True, labels="all", models=2)

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Two findings; every model relearns from the same batches."""
        names = [f"{self.name}/updates", f"{self.name}/ain"]
        splits = subject.splits
        split = "forget-test" if len(splits.get("forget-test", ())) else "forget-train"
        if not (subject.data_of(split).labelled and subject.problem.train.labelled):
            why = "the data has no labels to relearn"
            return [Finding(name, None, reason=why) for name in names]
        if subject.problem.kind == "classification" and (alone := one_class(subject)):
            return [Finding(name, None, reason=alone) for name in names]
        counts = [
            self._counts(s, split, runtime) for s in (subject, subject.original(), *references)
        ]
        failed = next((c for c in counts if isinstance(c, str)), None)
        if failed is not None:
            return [Finding(name, None, reason=failed) for name in names]
        mine, before, *theirs = (float(np.median(np.asarray(c))) for c in counts)
        low, high = median_ends([int(c) for c in counts[0]])
        capped = sum(r >= self.cap for r in theirs)
        detail = {
            "measured_on": split,
            "capped": mine >= self.cap,
            "reference_capped": capped,
            "cap": self.cap,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "on": self.on,
            "samples": mine * min(self.batch_size, len(self._ids(subject))),
            "accuracy": subject.problem.kind == "classification",
            "counts": list(counts[0]),
            "interval": self._about(low, high),
            "curve": self._curve(subject),
            "original_curve": self._curve(subject.original()),
            "reference_curves": [self._curve(r) for r in references],
        }
        if not theirs:
            why = "no retrained reference to compare with"
            return [
                Finding(
                    names[0], mine, low=low, high=high, original=before, reason=why, detail=detail
                ),
                Finding(names[1], None, reason=why),
            ]
        mean = float(np.mean(theirs))
        spread = float(np.ptp(theirs)) if len(theirs) > 1 else None
        here, there = mine >= self.cap, capped > 0
        if here and there:
            why = f"neither this model nor all references relearnt within {self.cap} updates"
            return [
                Finding(
                    names[0], mine, low=low, high=high, original=before, reason=why, detail=detail
                ),
                Finding(names[1], None, reason=why, detail=detail),
            ]
        said = None
        if here:
            said = f"not relearnt within {self.cap} updates: the value is at least this"
        elif there:
            said = f"{capped} of {len(theirs)} references not relearnt within {self.cap} updates"
        shared: dict[str, Any] = {"detail": detail}
        index = f"{said}: the index is at most this" if there else said
        return [
            Finding(
                names[0], mine, low=low, high=high, reference=mean, floor=spread, original=before, **shared,
                reason=f"{said}: their mean is at least this" if there else said,
            ),
            Finding(
                names[1], mine / mean, low=None if low is None else low / mean,
                high=None if high is None else high / mean,
                reference=1.0, floor=None if spread is None else spread / mean,
                original=before / mean, reason=index, **shared,
            ),
        ]  # fmt: skip

    def _about(self, low: float | None, high: float | None) -> str | None:
        """What an interval is of, and whether it ends where counting ends."""
        if low is None:
            return None
        more = (
            f"; it ends at the cap of {self.cap} and may reach beyond" if high == self.cap else ""
        )
        return f"of the orders of the batches{more}"

    def _counts(self, subject: Subject, split: str, runtime: Runtime) -> list[int] | str:
        """Counts of one model, one an order, or why there are none; kept with the subject, which is asked often."""
        kept: dict[Any, Any] = subject.__dict__.setdefault("_relearnt", {})
        key = (*self.in_force().items(), split, runtime.seed)
        if key not in kept:
            good = _good_enough(subject, split, self.alpha)
            counts: list[int | str] = []
            for n in range(self.repeats):
                counts.append(self._count(subject, good, runtime, n))
                if not n:
                    curves = subject.__dict__.setdefault("_relearning_curves", {})
                    curves[self._key()] = list(good.seen)
            failed = next((c for c in counts if isinstance(c, str)), None)
            kept[key] = failed or counts
        return kept[key]

    def _key(self) -> tuple[Any, ...]:
        """What a curve that is kept with a subject belongs to."""
        return tuple(self.in_force().items())

    def _ids(self, subject: Subject) -> Tensor:
        """Of the samples it learns from."""
        if self.on == "all":
            return subject.problem.train.ids
        return subject.whole.splits["forget-train" if self.on == "forget" else "retain-train"]

    def _curve(self, subject: Subject) -> list[float]:
        curves: dict[Any, list[float]] = subject.__dict__.get("_relearning_curves", {})
        return curves.get(self._key(), [])

    def _count(self, subject: Subject, good: _Goal, runtime: Runtime, order: int) -> int | str:
        problem = subject.problem
        # the same weights relearn, whether a method moved them or put adapters beside them
        model = plain(copy.deepcopy(subject.model)).requires_grad_(True)
        good.seen.clear()
        if good(model):
            return 1
        inner = replace(
            runtime, device=subject.runtime.device, checkpoint=None, alone=True, cost=Cost()
        )
        source = Source(problem.train, self._ids(subject), True, inner)
        per_epoch = math.ceil(len(source) / self.batch_size)
        done = 0

        def loss(m: nn.Module, batch: Batch) -> Tensor:
            nonlocal done
            # what the updates so far have brought about; the first one has none behind it
            if done and good(model):
                raise _Reached
            done += 1
            if done > self.cap:
                raise _Reached
            return batch.mean(problem.each_loss(m, batch))

        def passes(epoch: int) -> Pass:
            for batch in source.batches(self.batch_size, inner.generator("relearn", order, epoch)):
                yield loss, batch

        try:
            with random_restored():
                inner.seed_everything("relearn", order)
                result = fit(
                    model, passes, runtime=inner, epochs=self.cap // per_epoch + 1,
                    lr=self.lr, step="adam", stage="relearn",
                )  # fmt: skip
        except _Reached:
            return min(max(done, 1), self.cap)
        return f"relearning stopped: {result.stopped}" if result.stopped else self.cap


def median_ends(counts: Sequence[int]) -> tuple[float | None, float | None]:
    r"""Interval of the median from its order statistics, whatever the distribution; none from fewer than five.

    The k-th smallest and the k-th largest of n hold it with probability
    \(1 - 2 P(\mathrm{Bin}(n, \tfrac12) < k)\); k is the largest with 93 %: of 5 the smallest and the largest (94 %).
    """
    n, below, k = len(counts), 0.0, 0
    while True:
        below += math.comb(n, k) / 2**n
        if 1 - 2 * below < LEVEL:
            break
        k += 1
    inside = sorted(counts)[k - 1 : n - k + 1] if k else []
    return (float(inside[0]), float(inside[-1])) if inside else (None, None)


class _Reached(Exception):
    """The error is low enough, or the cap is reached."""


def _good_enough(subject: Subject, split: str, alpha: float) -> _Goal:
    """Whether a model is within α of the original on a split."""
    return _Goal(subject, split, alpha)


class _Goal:
    """The error on a split that is to be reached.

    Attributes:
        seen: errors of the models that were asked about; for classifiers their accuracies.
    """

    def __init__(self, subject: Subject, split: str, alpha: float) -> None:
        device, data = subject.runtime.device, subject.data_of(split)
        self.problem, self.seen = subject.problem, list[float]()
        self.batches = [batch.to(device) for batch in data.batches(HELD, subject.splits[split])]
        before = self.error(subject.original().model)
        # accuracies are negative errors here: within α of them is (1 − α) times as much
        self.allowed = before * (1 + alpha) if before > 0 else before * (1 - alpha)

    def __call__(self, model: nn.Module) -> bool:
        error = self.error(model)
        self.seen.append(-error if self.problem.kind == "classification" else error)
        return error <= self.allowed

    def error(self, model: nn.Module) -> float:
        """Mean error; the model's modes are restored."""
        inner = [(m, m.training) for m in model.modules()]
        model.eval()
        with torch.no_grad():
            each = torch.cat([_errors(self.problem, model, batch) for batch in self.batches])
        for module, was in inner:
            module.training = was
        return float(each.mean())


def _errors(problem: Problem, model: nn.Module, batch: Batch) -> Tensor:
    """The task loss of each sample [B], or for classifiers −1 where it is right."""
    if problem.kind == "classification":
        right = problem.capability("logits")(model, batch).argmax(1) == batch.y
        return -right.float()
    return problem.each_loss(model, batch).float()

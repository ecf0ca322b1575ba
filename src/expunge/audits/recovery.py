"""Recovery: from a few labelled samples, how well are forgotten classes told apart again?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from expunge.analysis.transductive import Knobs, Tasks, assign, draw_tasks, learn
from expunge.audits._intervals import share_interval
from expunge.audits._splits import missing
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

NAMES = ("forget", "forget-prototype", "retain", "retain-prototype")


@dataclass(frozen=True)
class Recovery(Audit):
    r"""Accuracy of few-shot classifiers on the model's frozen features, forgotten classes among the ways.

    Features are the input of the last layer, normalised to length 1; `on=probabilities` takes the model's
    probabilities instead, for models of which no more is known. The classifier sees all queries of a task
    at once (see `expunge.analysis.transductive`); its knobs are learnt on samples of kept classes only, for
    each model anew. `forget` is its accuracy on queries of forgotten classes among all ways, `retain` that
    of tasks of kept classes alone; `…-prototype` is that of the nearest mean of the supports. All models get the same tasks. Range 0 … 1;
    good is what a retrained model has: above it, the features still hold what was to be forgotten.
    The interval is over tasks, which share samples.
    """

    name: ClassVar[str] = "recovery"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="UNEM: UNrolled Generalized EM for Transductive Few-Shot Learning",
        authors="Zhou, Shakeri, Sadraoui, Kaaniche, Pesquet, Ben Ayed",
        year=2025,
        link="https://arxiv.org/abs/2412.16739",
        idea="Few labelled samples bring a forgotten class back if its features were left in place.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "The cross-entropy takes the logarithm of the assignments once; the published code has "
                "another softmax over them.",
                "tests/analysis/test_transductive.py::test_learning_makes_answers_better",
            ),
            Deviation(
                "A forgotten class is among the queries of every task.",
                "tests/analysis/test_transductive.py::test_tasks_hold_what_they_must",
            ),
        ),
    )

    shots: int = setting(5, "labelled samples a class", low=1, source="paper: 1, 5, 10, 20")
    curve: tuple[int, ...] = setting((1, 2, 5, 10), "labelled samples a class for the figure")
    queries: int = setting(75, "samples a task is asked about", low=2, source="paper")
    present: int = setting(5, "classes they come from", low=1, source="paper")
    tasks: int = setting(100, "tasks", low=10, source="own: the paper has 1000")
    layers: int = setting(10, "turns of the classifier, L", low=0, source="paper")
    steps: int = setting(60, "steps that learn its knobs", low=0, source="own: the paper has 100")
    lr: float = setting(0.1, "their rate", above=0, source="paper")
    on: Literal["features", "probabilities"] = setting("features", "what the classifier sees")

    @property
    def needs(self) -> Needs:
        """Test samples of both sides with labels, and what the classifier sees."""
        sees = "penultimate" if self.on == "features" else "logits"
        return Needs(
            forget=True, retain=True, labels="all", models=2, capabilities=frozenset({sees})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Four findings; the same tasks for every model."""
        everyone = [subject, subject.original(), *references]
        why = self._why(subject)
        pools = [] if why else [self._pools(s, runtime) for s in everyone]
        if pools:
            why = self._unusable(pools)
        if why:
            return [Finding(f"{self.name}/{what}", None, reason=why) for what in NAMES]
        found = [self._accuracies(pool, runtime) for pool in pools]
        mine, before, *theirs = found
        curves = {
            "shots": [n for n in self.curve if n < self._smallest(pools[0])],
            "values": self._curve(pools[0], runtime),
            "original_values": self._curve(pools[1], runtime),
            "reference_values": [self._curve(p, runtime) for p in pools[2:]],
        }
        findings = []
        for what in NAMES:
            values = mine[what]
            low, high = share_interval(values)
            detail: dict[str, Any] = {"tasks": len(values), "shots": self.shots, "on": self.on}
            findings.append(
                Finding(
                    f"{self.name}/{what}", float(values.mean()), low=low, high=high,
                    original=float(before[what].mean()),
                    detail=detail | (curves if what == "forget" else {}),
                    **against([float(t[what].mean()) for t in theirs]),
                )
            )  # fmt: skip
        return findings

    def _why(self, subject: Subject) -> str | None:
        if why := missing(subject, "forget-test") or missing(subject, "retain-test"):
            return why
        kept = subject.labels("retain-test").unique()
        if bool(torch.isin(subject.labels("forget-test"), kept).any()):
            return "classes of the forgotten samples are kept as well, so there is none to recover"
        return "one kept class alone has nothing to be told from" if len(kept) < 2 else None

    def _unusable(self, pools: list[_Pools]) -> str | None:
        if not all(bool(p.isfinite().all()) for pool in pools for p in pool.asked):
            return "a model gives NaN or infinite features"
        smallest = self._smallest(pools[0])
        if smallest <= self.shots:
            return (
                f"the smallest class has {smallest} samples for tasks; with shots={self.shots} there has "
                "to be one more at least"
            )
        return None

    @staticmethod
    def _smallest(pools: _Pools) -> int:
        return min(len(p) for p in [*pools.asked, *pools.learnt])

    def _pools(self, subject: Subject, runtime: Runtime) -> _Pools:
        """What the model sees of each class: half of a kept class is for learning the knobs."""
        sides = {s: (self._read(subject, s), subject.labels(s)) for s in ("forget-test", "retain-test")}  # fmt: skip
        gone, (kept, labels) = sides["forget-test"], sides["retain-test"]
        forgotten = [gone[0][gone[1] == c] for c in gone[1].unique().tolist()]
        asked, learnt = [], []
        for c in labels.unique().tolist():
            found = kept[labels == c]
            order = torch.randperm(len(found), generator=runtime.generator(self.name, "halves", c))
            asked.append(found[order[: len(found) // 2]])
            learnt.append(found[order[len(found) // 2 :]])
        return _Pools([*forgotten, *asked], learnt, len(forgotten))

    @torch.no_grad()
    def _read(self, subject: Subject, split: str) -> Tensor:
        if self.on == "probabilities":
            return subject.logits(split).softmax(-1)
        penultimate, device = subject.problem.capability("penultimate"), subject.runtime.device
        batches = subject.data_of(split).batches(256, subject.splits[split])
        parts = [penultimate(subject.model, b.to(device)).flatten(1).float().cpu() for b in batches]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    def _knobs(self, pools: _Pools, runtime: Runtime) -> Knobs:
        """Learnt on kept classes; of ways they have as many as there are."""
        if pools.knobs is None:
            generator = runtime.generator(self.name, "learning")

            def draw(number: int) -> Tasks:
                return draw_tasks(
                    pools.learnt, number, generator, shots=self.shots, queries=self.queries,
                    present=self.present,
                )  # fmt: skip

            ways = len(pools.learnt)
            probable = self.on == "probabilities"
            pools.knobs = learn(
                draw, layers=self.layers, steps=self.steps, lr=self.lr * (5 if probable else 1),
                tasks=self.tasks, gamma=ways / min(ways, self.present) if probable else 1.0,
                family="dirichlet" if probable else "gaussian",
            )  # fmt: skip
        return pools.knobs

    def _accuracies(
        self, pools: _Pools, runtime: Runtime, shots: int | None = None
    ) -> dict[str, np.ndarray]:
        """By finding, the accuracy of each task."""
        shots = shots or self.shots
        family: Any = "dirichlet" if self.on == "probabilities" else "gaussian"
        gone = pools.forgotten
        sides = {"forget": (pools.asked, tuple(range(gone))), "retain": (pools.asked[gone:], ())}
        found = {}
        for side, (given, always) in sides.items():
            tasks = draw_tasks(
                given, self.tasks, runtime.generator(self.name, "tasks", side, shots), shots=shots,
                queries=self.queries, present=self.present, always=always,
            )  # fmt: skip
            counted = (
                tasks.truth < gone if always else torch.ones_like(tasks.truth, dtype=torch.bool)
            )
            for end, knobs in (("", self._knobs(pools, runtime)), ("-prototype", Knobs.start(0))):
                right = assign(tasks, knobs, family).argmax(-1) == tasks.truth
                mean = (right & counted).sum(1) / counted.sum(1)
                found[side + end] = mean.double().numpy()
        return found

    def _curve(self, pools: _Pools, runtime: Runtime) -> list[float]:
        shots = [n for n in self.curve if n < self._smallest(pools)]
        return [float(self._accuracies(pools, runtime, n)["forget"].mean()) for n in shots]


@dataclass
class _Pools:
    """Samples by class.

    Attributes:
        asked: of all ways of the tasks, the forgotten classes first.
        learnt: of the kept classes, other samples.
        forgotten: how many classes were forgotten.
        knobs: what was learnt.
    """

    asked: list[Tensor]
    learnt: list[Tensor]
    forgotten: int
    knobs: Knobs | None = None

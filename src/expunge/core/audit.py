"""Audit, Finding, Subject: evidence about a model, always beside its reference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.needs import Card, Needs
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import Configured

Direction = Literal["reference", "up", "down"]


@dataclass(frozen=True)
class Finding:
    """One measured number with what is needed to read it.

    Attributes:
        name: `audit/what`, e.g. `accuracy/forget-test`.
        value: the number, or None if it could not be computed (then `reason` says why).
        direction: where good lies: toward the `reference`, `up` or `down`.
        low: lower end of the 95 % interval over samples.
        high: upper end.
        reference: the same number for models retrained without the data (their mean).
        floor: spread of the references among each other; a gap within it is noise.
        original: the same number for the original model.
        reason: why there is no value or no reference.
        per_sample: arrays by name, one entry a sample.
        detail: what figures need (JSON types).
    """

    name: str
    value: float | None
    direction: Direction = "reference"
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    floor: float | None = None
    original: float | None = None
    reason: str | None = None
    per_sample: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def gap(self) -> float | None:
        """`value − reference`, or None without either."""
        if self.value is None or self.reference is None:
            return None
        return self.value - self.reference


class Subject:
    """A model under audit, with predictions computed once and shared by audits."""

    def __init__(
        self,
        model: nn.Module,
        problem: Problem,
        request: Request,
        runtime: Runtime,
        *,
        cost: Cost | None = None,
        outcome: Any = None,
        siblings: Sequence[Subject] = (),
    ) -> None:
        """Keep a frozen copy of the released model.

        Args:
            model: the model as released.
            problem: what it is a model of.
            request: what it was asked to forget.
            runtime: device and progress.
            cost: of making it, if known; an outcome brings its own.
            outcome: the run's outcome, if there is one.
            siblings: what the same method made with other seeds, for audits of a method.
        """
        self.model = copy.deepcopy(model).to(runtime.device).eval().requires_grad_(False)
        self.problem = problem
        self.request = request
        self.runtime = runtime
        self.cost = cost if outcome is None else outcome.cost
        self.outcome = outcome
        self.siblings = tuple(siblings)
        self.store: Any = None  # where audits keep what serves other subjects too, if anywhere
        self._outputs: dict[tuple[str, str], Tensor] = {}
        self._whole: Subject | None = None
        self._within = torch.empty(0, dtype=torch.long)

    @functools.cached_property
    def splits(self) -> dict[str, Tensor]:
        """Ids of `forget-train`, `retain-train`, `forget-test`, `retain-test`."""
        return self.problem.split(self.request)

    def original(self) -> Subject:
        """The original model as a subject; its predictions are shared by all audits of a request."""
        shared = self.problem.beside_models.setdefault("originals", {})
        key = (self.request.key, self.runtime.device)
        if key not in shared:
            shared[key] = Subject(self.problem.model, self.problem, self.request, self.runtime)
        return shared[key] if self._whole is None else shared[key].within(self._within)

    @property
    def whole(self) -> Subject:
        """The subject that this one is a part of, or itself."""
        return self._whole or self

    def within(self, ids: Tensor) -> Subject:
        """The same model with the splits of the training data narrowed to some samples.

        Outputs are taken from the whole; splits of the test data stay as they are.
        """
        part = copy.copy(self)
        part._whole, part._within, part._outputs = self.whole, ids, {}
        part.siblings = tuple(s.within(ids) for s in self.siblings)
        for kept in (
            "_grams",
            "_recalibrated",
            "_relearnt",
            "_relearning_curves",
        ):  # by audits, and about the whole's samples
            part.__dict__.pop(kept, None)
        part.__dict__["splits"] = {
            split: own if split.endswith("test") else own[torch.isin(own, ids)]
            for split, own in self.whole.splits.items()
        }
        return part

    def data_of(self, split: str) -> Any:
        """The data set a split belongs to."""
        return self.problem.test if split.endswith("test") else self.problem.train

    def labels(self, split: str) -> Tensor:
        """True labels [n] of a split."""
        return self.data_of(split).labels_of(self.splits[split])

    def logits(self, split: str) -> Tensor:
        """Logits [n, C] of a classifier on a split, on CPU, computed once."""
        return self._output("logits", split)

    def predictions(self, split: str) -> Tensor:
        """Predicted targets [n] of a regressor on a split, on CPU, computed once."""
        return self._output("predict", split)

    @torch.no_grad()
    def _output(self, capability: str, split: str) -> Tensor:
        if self._whole is not None:
            rows = torch.isin(self.whole.splits[split], self.splits[split])
            return self.whole._output(capability, split)[rows]
        if (capability, split) not in self._outputs:
            compute = self.problem.capability(capability)
            parts = [
                compute(self.model, batch.to(self.runtime.device)).float().cpu()
                for batch in self.data_of(split).batches(256, self.splits[split])
            ]
            self._outputs[capability, split] = torch.cat(parts) if parts else torch.empty(0, 0)
        return self._outputs[capability, split]


@dataclass(frozen=True)
class Audit(Configured):
    """Base of every audit: a frozen dataclass of its settings.

    Attributes:
        name: kebab-case name; its findings are called `name/…`.
        domain: kind of problem it is for (`"general"`: any with the declared needs); suites leave
            out what is for another kind.
        card: where the measure comes from.
        needs: what it uses; `models` is the number of references it wants.
    """

    name: ClassVar[str]
    domain: ClassVar[str] = "general"
    card: ClassVar[Card]

    @property
    def needs(self) -> Needs:
        """What this audit uses, with these settings."""
        raise NotImplementedError

    def reads(self) -> list[str]:
        """Hashes of what it reads besides the problem, so that findings are not reused for other data."""
        return []

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Measure the subject and put the references' values beside it."""
        raise NotImplementedError


def against(references: Sequence[float]) -> dict[str, Any]:
    """Reference fields of a finding: mean, spread, and the reason where there is none.

    Args:
        references: the same quantity for each reference model.

    Returns:
        Keyword arguments `reference`, `floor`, `reason` for `Finding`.
    """
    if not references:
        return {
            "reference": None,
            "floor": None,
            "reason": "no retrained reference to compare with",
        }
    spread = float(np.max(references) - np.min(references)) if len(references) > 1 else None
    return {"reference": float(np.mean(references)), "floor": spread, "reason": None}

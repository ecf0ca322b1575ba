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
        seconds: float | None = None,
        outcome: Any = None,
    ) -> None:
        """Keep a frozen copy of the released model.

        Args:
            model: the model as released.
            problem: what it is a model of.
            request: what it was asked to forget.
            runtime: device and progress.
            seconds: what it cost to make, if known.
            outcome: the run's outcome, if there is one (cost, curve).
        """
        self.model = copy.deepcopy(model).to(runtime.device).eval().requires_grad_(False)
        self.problem = problem
        self.request = request
        self.runtime = runtime
        self.seconds = seconds
        self.outcome = outcome
        self._logits: dict[str, Tensor] = {}

    @functools.cached_property
    def splits(self) -> dict[str, Tensor]:
        """Ids of `forget-train`, `retain-train`, `forget-test`, `retain-test`."""
        return self.problem.split(self.request)

    def original(self) -> Subject:
        """The original model as a subject; its predictions are shared by all audits of a request."""
        shared = self.problem.__dict__.setdefault("_original_subjects", {})
        key = (self.request.key, self.runtime.device)
        if key not in shared:
            shared[key] = Subject(self.problem.model, self.problem, self.request, self.runtime)
        return shared[key]

    def data_of(self, split: str) -> Any:
        """The data set a split belongs to."""
        return self.problem.test if split.endswith("test") else self.problem.train

    def labels(self, split: str) -> Tensor:
        """True labels [n] of a split."""
        return self.data_of(split).labels_of(self.splits[split])

    @torch.no_grad()
    def logits(self, split: str) -> Tensor:
        """Logits [n, C] of a split on CPU, computed once."""
        if split not in self._logits:
            compute = self.problem.capability("logits")
            parts = [
                compute(self.model, batch.to(self.runtime.device)).float().cpu()
                for batch in self.data_of(split).batches(256, self.splits[split])
            ]
            self._logits[split] = torch.cat(parts) if parts else torch.empty(0, 0)
        return self._logits[split]


@dataclass(frozen=True)
class Audit(Configured):
    """Base of every audit: a frozen dataclass of its settings.

    Attributes:
        name: kebab-case name; its findings are called `name/…`.
        card: where the measure comes from.
        needs: what it uses; `models` is the number of references it wants.
    """

    name: ClassVar[str]
    card: ClassVar[Card]

    @property
    def needs(self) -> Needs:
        """What this audit uses, with these settings."""
        raise NotImplementedError

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

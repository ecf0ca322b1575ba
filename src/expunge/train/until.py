"""Stop a training once the model no longer says secrets, and keep the weights that say them least.

The model is looked at before each pass and at the end: the memorisation accuracy of the segments, and,
once that is near its threshold, their extraction likelihood (`problems/segments.py`). What was seen lies
beside the checkpoints, so that a training that goes on decides as an unbroken one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from expunge.core.hashing import content_key, hash_model
from expunge.core.runtime import Runtime
from expunge.problems.segments import accuracies, extraction
from expunge.problems.tokens import Tokens
from expunge.train.checkpoints import movable

Figures = tuple[float, float]
"""Means of MA and of EL_n over secrets; EL is infinite where it was not looked at."""


@dataclass(frozen=True)
class Goal:
    """When to stop.

    Attributes:
        accuracy: MA has to be below.
        extraction: so has EL_n, or
        patience: it has not fallen so many times in a row, the looks below `accuracy` + `margin` counted.
        margin: how near MA has to be before EL_n is looked at.
        order: n.
    """

    accuracy: float
    extraction: float
    patience: int
    margin: float
    order: int = 10

    def reached(self, seen: Sequence[Figures]) -> str | None:
        """Why to stop after these looks, or None."""
        accuracy, likelihood = seen[-1]
        if not accuracy < self.accuracy:  # NaN is no success
            return None
        if likelihood < self.extraction:
            return f"the secrets' accuracy {accuracy:.3g} and extraction {likelihood:.3g} are below their thresholds"  # fmt: skip
        best, failed = math.inf, 0
        for _, value in seen:
            failed = 0 if value < best else failed + math.isfinite(value)
            best = min(best, value)
        if failed >= self.patience:
            return f"the secrets' accuracy {accuracy:.3g} is below its threshold and their extraction {likelihood:.3g} falls no more"  # fmt: skip
        return None


@dataclass
class Watch:
    """Looks at a model in training.

    Attributes:
        model: the model.
        rows: this process' secrets, from `segments`.
        token_logits: gives logits [B, T, V].
        generate: continues prompts greedily.
        goal: when to stop.
        runtime: processes, checkpoints.
        size: rows at a time.
        which: what tells this training from another, for files.
        seen: figures by passes done; half a pass counts as such.
        best: the passes after which they were lowest.
        stopped: why training has to stop.
    """

    model: nn.Module
    rows: list[Tokens]
    token_logits: Callable[..., Tensor]
    generate: Callable[..., list[Tensor]]
    goal: Goal
    runtime: Runtime
    size: int
    which: Any = None
    seen: dict[float, Figures] = field(default_factory=dict)
    best: float | None = None
    stopped: str | None = None

    def __post_init__(self) -> None:
        """Take up what a training that broke off has left."""
        self._weights: dict[str, Tensor] = {}
        self._path = None
        if self.runtime.checkpoint is not None:
            self._path = self.runtime.checkpoint / "secrets.safetensors"
            self._key = content_key([self.which, self.runtime.seed, hash_model(self.model)])
            self._read()

    def look(self, turn: float, keep: bool = True) -> None:
        """Measure after so many passes, unless that was done before the training broke off.

        Args:
            turn: passes done.
            keep: also for a training that goes on.
        """
        if turn not in self.seen:
            self.seen[turn] = figures = self.measure()
            # the original is no result, however little falls
            best = (math.inf, math.inf) if self.best is None else self.seen[self.best]
            if turn > 0 and figures < best:  # NaN is not
                self.best = turn
                self._weights = {n: v.cpu().clone() for n, v in movable(self.model).items()}
            if keep:
                self._write()
        self.stopped = self.goal.reached([f for t, f in sorted(self.seen.items()) if t <= turn])

    def put_back(self) -> None:
        """Give the model the weights of the best look."""
        self.model.load_state_dict(self._weights, strict=False)

    def measure(self) -> Figures:
        """Mean MA and EL_n now, over the secrets of all processes."""
        training = self.model.training
        self.model.eval()
        try:
            each = accuracies(
                self.token_logits, self.model, self.rows,
                size=self.size, device=self.runtime.device,
            )  # fmt: skip
            accuracy, n = self._mean(each), self.goal.order
            if not accuracy <= self.goal.accuracy + self.goal.margin:
                return accuracy, math.inf
            found = extraction(self.generate, self.model, self.rows, orders=(n,), size=self.size)
            return accuracy, self._mean([values[n] for values in found])
        finally:
            self.model.train(training)

    def _mean(self, each: Sequence[float]) -> float:
        both = torch.tensor([sum(each), len(each)], dtype=torch.double).to(self.runtime.device)
        total, count = self.runtime.sum(both).tolist()
        return total / count

    def _read(self) -> None:
        assert self._path is not None
        if not self._path.exists():
            return
        with safe_open(self._path, "pt") as file:
            kept = file.metadata()
            if kept["key"] != self._key:
                return
            self._weights = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        self.seen = {float(t): (f[0], f[1]) for t, f in json.loads(kept["seen"]).items()}
        self.best = json.loads(kept["best"])

    def _write(self) -> None:
        if self._path is None or not self.runtime.is_main:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        notes = {"key": self._key, "seen": json.dumps(self.seen), "best": json.dumps(self.best)}
        part = self._path.with_suffix(".tmp")
        save_file({n: v.contiguous() for n, v in self._weights.items()}, part, metadata=notes)
        part.replace(self._path)

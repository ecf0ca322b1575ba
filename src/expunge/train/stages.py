"""Several trainings of one model, one after the other, each with an optimiser of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from expunge.core.outcome import Outcome
from expunge.core.runtime import Budget, Runtime
from expunge.core.view import View
from expunge.train.fit import Pass, fit
from expunge.train.masks import resolve_mask
from expunge.train.method import Training
from expunge.train.norm import recalibrate


class Stages:
    """What the stages of one run share: the mask, the budget, the curve, and where it stopped.

    Each stage writes its own checkpoint, so a stopped run skips what was done.
    """

    def __init__(self, method: Training, model: nn.Module, view: View, runtime: Runtime) -> None:
        """Resolve the mask on the model as it is now.

        Args:
            method: its settings of the loop hold for every stage that does not say otherwise.
            model: trained in place.
            view: for the mask and for recalibration.
            runtime: device, seeds, and the budget of all stages together.
        """
        self.model = model
        self.mask = resolve_mask(method.train, model, view, runtime)
        self.curve: list[dict[str, Any]] = []
        self.steps = 0
        self.stopped: str | None = None
        self._method, self._view, self._runtime = method, view, runtime
        self._start = time.monotonic()

    def run(
        self,
        stage: str,
        passes: Callable[[int], Pass],
        *,
        epochs: int,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        """Train one stage; nothing once a stage has stopped early.

        Args:
            stage: its name in checkpoints, progress and the curve; each one once.
            passes: see `fit`.
            epochs: see `fit`.
            model: trained in this stage instead of the method's own, e.g. a helper; the mask is not
                for it.
            **options: arguments of `fit` in place of the method's settings.
        """
        if self.stopped or not epochs:
            return
        m = self._method
        settings: dict[str, Any] = {
            "lr": m.lr, "step": m.step, "momentum": m.momentum, "weight_decay": m.weight_decay,
            "norm": m.norm, "mask": self.mask if model is None else None,
            "smooth": m.smooth if model is None else "none",
        }  # fmt: skip
        result = fit(
            self.model if model is None else model,
            passes,
            runtime=replace(self._runtime, budget=self._left()),
            epochs=epochs,
            stage=stage,
            **(settings | options),
        )
        self.curve += [
            point | {"step": self.steps + point["step"], "stage": stage} for point in result.curve
        ]
        self.steps += result.steps
        self.stopped = result.stopped

    def outcome(self, **details: Any) -> Outcome:
        """The trained model with what is known of its training."""
        if self._method.norm == "recalibrate":
            recalibrate(self.model, self._view.retain)
        self.model.eval()
        known: dict[str, Any] = {"steps": self.steps}
        if self.stopped:
            known["stopped"] = self.stopped
        if self.mask is not None:
            moving = sum(int(m.sum()) for m in self.mask.values())
            known["trained_share"] = moving / sum(m.numel() for m in self.mask.values())
        return Outcome(self.model, curve=self.curve, details=known | details)

    def _left(self) -> Budget:
        """What earlier stages have left of the budget."""
        seconds, steps = self._runtime.budget.seconds, self._runtime.budget.steps
        # a resumed stage adds to the cost what it had taken before
        used = time.monotonic() - self._start + self._runtime.cost.seconds
        return Budget(
            None if seconds is None else max(0.0, seconds - used),
            None if steps is None else max(0, steps - self.steps),
        )

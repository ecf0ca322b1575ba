"""What methods share that put a gate on prompts around the original."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expunge.core.method import Method
from expunge.core.outcome import Wrapper
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source
from expunge.problems.tokens import unpadded
from expunge.train.corrupted_prompts import ending_of, text_of
from expunge.train.gate import Ambiguous, Gate, calibrated_gate


@dataclass(frozen=True, kw_only=True)
class GatedMethod(Method):
    """Base of methods whose result is a `BehindGate`; they add what happens to a flagged prompt."""

    domain: ClassVar[str] = "causal-lm"

    alpha: float = setting(0.05, "share of prompts whose label the gate may miss, α", above=0, high=0.5)  # fmt: skip
    ambiguous: Ambiguous = setting("pass", "prompts of which the gate is not sure: pass or flag")
    threshold: float | None = setting(None, "flag above this p instead, τ; none is conformal", low=0, high=1)  # fmt: skip
    calibration: float = setting(0.5, "share of the prompts held out to calibrate", above=0, high=0.9)  # fmt: skip

    def fitted(
        self, forget: Sequence[Tensor], retain: Sequence[Tensor], runtime: Runtime
    ) -> tuple[Gate, dict[str, Any]]:
        """The gate on prompts of both sides, and its facts; see `calibrated_gate`."""
        return calibrated_gate(
            forget, retain, runtime.generator("calibration"), share=self.calibration,
            alpha=self.alpha, threshold=self.threshold, ambiguous=self.ambiguous,
        )  # fmt: skip

    def rule(self, gate: Gate, facts: dict[str, Any], prompts: list[Tensor]) -> dict[str, Any]:
        """What a `BehindGate` is told of the gate and of the ending that all prompts share."""
        return {
            "limit": facts.get("limit"), "threshold": self.threshold, "ambiguous": self.ambiguous,
            "bias": gate.bias, "ending": ending_of(prompts),
        }  # fmt: skip


def behind(kind: str, gate: Gate, settings: dict[str, Any]) -> Wrapper:
    """The change that puts a `BehindGate` around a model.

    Args:
        kind: its name among `WRAPPERS`.
        gate: the gate.
        settings: its rule, and what the kind takes besides.
    """
    return Wrapper({
        f"{kind}/settings": text_of(settings),
        f"{kind}/keys": gate.keys.cpu(),
        f"{kind}/weights": gate.weights.view(torch.int32).cpu(),
    })


def prompts_of(source: Source) -> list[Tensor]:
    """Prompts of a side's samples; a text that is all answer is its own."""
    rows = [row for batch in source.batches(256) for row in unpadded(batch)]
    return [row.prompt if len(row.prompt) else row.ids for row in rows]

r"""TaskVector: learn the forget data even better, and walk as far the other way.

\[ \theta' = \theta - a\,(\theta_{reinforced} - \theta) \]

\(\theta_{reinforced}\) is the original after ordinary training on the forget data. Of adapters the
difference is \(\frac{\alpha}{R} B A\), so that scaling \(B\) by \(-a\) is the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.adapters import adapter_of, is_lora
from expunge.train.norm import recalibrate
from expunge.train.reinforce import Reinforcing

_TEST = "tests/methods/text/test_task_vector.py::test_"


@dataclass(frozen=True, kw_only=True)
class TaskVector(Reinforcing):
    """Negate what training on the forget data adds to the weights; reads no retain data."""

    name: ClassVar[str] = "task-vector"
    search: ClassVar = {"strength": None, "epochs": None, "lr": None}
    card: ClassVar[Card] = Card(
        title="Editing Models with Task Arithmetic",
        authors="Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi",
        year=2023,
        link="https://arxiv.org/abs/2212.04089",
        idea="What training on the forget data adds to the weights is taken away from them.",
        deviations=(
            Deviation(
                "The vector is of parameters alone: running statistics stay the original's, or are "
                "estimated anew with norm=recalibrate.",
                _TEST + "running_statistics_stay_those_of_the_original",
            ),
            Deviation(
                "a = 0 would return the original and is refused as a setting.",
                _TEST + "baselines_llm_invariant_9_a_step_of_nothing_is_refused",
            ),
        ),
    )

    strength: float = setting(1.0, "how far to walk the other way, a", above=0, source="MUSE")

    @property
    def needs(self) -> Needs:
        """Forget data with labels; the original to walk away from; retain data to recalibrate."""
        return Needs(
            forget=True, labels="forget", original=not is_lora(self.train),
            retain=self.norm == "recalibrate",
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train on the forget data and step back from there."""
        outcome = self.reinforced(view, runtime)
        model = outcome.runnable()
        if is_lora(self.train):
            turn_adapters(model, self.strength)
            outcome.change = adapter_of(model)
            return outcome
        vectors = turn(model, view.original(), self.strength)
        outcome.details["vector_norm"] = sum(float(v.square().sum()) for v in vectors) ** 0.5
        if self.norm == "recalibrate":
            recalibrate(model, view.retain)
        return outcome


@torch.no_grad()
def turn(model: nn.Module, original: nn.Module, strength: float) -> list[Tensor]:
    r"""Replace reinforced weights in place by \(\theta - a\,(\theta_{reinforced} - \theta)\).

    Computed in float32 at least; parameters that did not move keep every bit, and buffers are the
    original's.

    Args:
        model: the reinforced model.
        original: of the same architecture.
        strength: a.

    Returns:
        The differences that were not zero.
    """
    vectors = []
    start = dict(original.named_parameters())
    for name, p in model.named_parameters():
        if torch.equal(p, start[name]):
            continue
        wide = torch.promote_types(p.dtype, torch.float32)
        base = start[name].to(wide)
        vectors.append(p.to(wide) - base)
        p.copy_(base - strength * vectors[-1])
    buffers = dict(original.named_buffers())
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    return vectors


@torch.no_grad()
def turn_adapters(model: nn.Module, strength: float) -> None:
    r"""Scale the matrices B of a model's adapters in place by \(-a\)."""
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            p.mul_(-strength)

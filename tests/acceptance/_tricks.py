"""What only looks forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from expunge.core.method import Method
from expunge.core.needs import Card, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.view import View


def mask(model: nn.Module, last: str, labels: list[int], low: float = -30.0) -> nn.Module:
    """Give some classes the same low logit for every input; in place."""
    layer = model.get_submodule(last)
    with torch.no_grad():
        layer.weight[labels] = 0
        layer.bias[labels] = low
    return model


@dataclass(frozen=True)
class OutputMask(Method):
    """An output-only trick: the classes' logits are held just below those of all others.

    Lower than needed, the logit itself would have to be relearnt, which takes as long as a class does.
    """

    name: ClassVar[str] = "output-mask"
    card: ClassVar[Card] = Card(
        title="none", authors="none", year=2026, link="https://example.org", intent="suppression",
        idea="Never say the class.",
    )  # fmt: skip

    @property
    def needs(self) -> Needs:
        """All data for the height of the mask, labels of what is to be forgotten."""
        return Needs(
            forget=True, retain=True, labels="forget", classes=True,
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    @torch.no_grad()
    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Mask the classes of the forget data on all training data."""
        labels, model = view.forget.labels().unique().tolist(), view.model()
        best = []
        for batch in view.everything.batches(256):
            logits = view.logits(model, batch)
            logits[:, labels] = -torch.inf
            best.append(logits.amax(1))
        low = float(torch.cat(best).min()) - 0.1
        return Outcome(mask(model, view.role("last layer")[0], labels, low))

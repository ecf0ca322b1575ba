"""Weight distance: how far the weights moved, and how far they are from retrained ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from expunge.audits._splits import NO_REFERENCE
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.train.adapters import has_adapters, merged


@dataclass(frozen=True)
class WeightDistance(Audit):
    r"""Relative distance \(\|\theta-\theta'\|_2/\|\theta'\|_2\) over all parameters.

    `original` measures how far a method moved, beside how far retraining lands; `reference` the
    distance to retrained weights, beside their distance to each other. Two trainings of one recipe
    are far apart, so neither says what was forgotten: they say how much was changed. Adapters count
    as what they add to the weights.
    """

    name: ClassVar[str] = "weight-distance"
    card: ClassVar[Card] = Card(
        title="Unrolling SGD: Understanding Factors Influencing Machine Unlearning",
        authors="Thudi, Deza, Chandrasekaran, Papernot",
        year=2022,
        link="https://arxiv.org/abs/2109.13398",
        idea="Distance of the weights to the original and to retrained ones.",
        intent="measurement",
    )

    @property
    def needs(self) -> Needs:
        """The weights alone."""
        return Needs(models=2)

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Two findings."""
        original, mine = subject.original().model, plain(subject.model)
        if shapes(mine) != shapes(original):
            why = "the model has other parameters than the original"
            return [
                Finding("weight-distance/original", None, reason=why),
                Finding("weight-distance/reference", None, "down", reason=why),
            ]
        moved = Finding(
            "weight-distance/original",
            distance(mine, original),
            original=0.0,
            detail={"per_tensor": per_tensor(mine, original)},
            **against([distance(r.model, original) for r in references]),
        )
        if not references:
            alone = Finding("weight-distance/reference", None, "down", reason=NO_REFERENCE)
            return [moved, alone]
        among = [distance(a.model, b.model) for a, b in itertools.permutations(references, 2)]
        apart = Finding(
            "weight-distance/reference",
            float(np.mean([distance(mine, r.model) for r in references])),
            "down",
            reference=float(np.mean(among)) if among else None,
            floor=float(np.max(among)) if among else None,
            original=float(np.mean([distance(original, r.model) for r in references])),
            reason=None if among else "one reference: the distance among references is unknown",
        )
        return [moved, apart]


def plain(model: nn.Module) -> nn.Module:
    """The model with the names and shapes of the original's parameters, if it has adapters on."""
    return merged(model) if has_adapters(model) else model


def shapes(model: nn.Module) -> list[tuple[str, torch.Size]]:
    """Names and shapes of a model's parameters."""
    return [(name, p.shape) for name, p in model.named_parameters()]


def distance(a: nn.Module, b: nn.Module) -> float:
    """Relative L2 distance of the parameters of `a` to those of `b`."""
    parts = [
        (float((p.double() - q.double()).square().sum()), float(q.double().square().sum()))
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    ]
    return math.sqrt(sum(d for d, _ in parts) / max(sum(n for _, n in parts), 1e-300))


def per_tensor(a: nn.Module, b: nn.Module) -> dict[str, float]:
    """The same for each parameter tensor."""
    return {
        name: float((p.double() - q.double()).norm() / q.double().norm().clamp_min(1e-300))
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True)
    }

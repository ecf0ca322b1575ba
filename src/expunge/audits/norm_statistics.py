"""Norm statistics: what the forgotten data left in batch norm's running means and variances."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from expunge.audits._splits import NO_REFERENCE
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.train.norm import norm_layers, recalibrate

Statistics = dict[str, tuple[Tensor, Tensor, float]]
"""Running mean and variance [C], and ε, of each norm layer by name."""


@dataclass(frozen=True)
class NormStatistics(Audit):
    r"""Distance of running statistics, over all channels of all norm layers.

    A channel's statistics \((\mu, \sigma^2)\) and others \((\mu', \sigma'^2)\) are apart by the
    divergence of the Gaussians they stand for, each variance with the layer's ε:
    \(\tfrac12(\sigma^2/\sigma'^2 + (\mu-\mu')^2/\sigma'^2 - 1 - \ln(\sigma^2/\sigma'^2))\); the
    distance is the root of its mean over channels, 0 upward, without a unit.

    `recalibrated`: to the statistics that the *same weights* give on retain data alone; what is
    left of the forget data, and of the training's last batches. `reference`: to those of retrained
    models, whose channels stand for other things, so it is large for everyone. Both as a share of
    the original's distance: 1 is as before. Parameters and outputs are other audits' business.
    """

    name: ClassVar[str] = "norm-statistics"
    card: ClassVar[Card] = Card(
        title="Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
        authors="Ioffe, Szegedy",
        year=2015,
        link="https://arxiv.org/abs/1502.03167",
        idea="Running statistics are averages over training data, whatever happens to the weights.",
        intent="measurement",
    )

    @property
    def needs(self) -> Needs:
        """Retain data without labels."""
        return Needs(retain=True, models=2)

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Two findings."""
        original = subject.original()
        everyone = [subject, original, *references]
        names = ("norm-statistics/recalibrated", "norm-statistics/reference")
        if why := _unlike([statistics(s.model) for s in everyone]):
            return [Finding(name, None, "down", reason=why) for name in names]
        return [self._recalibrated(everyone), self._reference(everyone)]

    def _recalibrated(self, everyone: Sequence[Subject]) -> Finding:
        name = "norm-statistics/recalibrated"
        if not len(everyone[0].splits["retain-train"]):
            return Finding(name, None, "down", reason="no sample is left to recalibrate on")
        mine, before, *theirs = (apart(statistics(s.model), recalibrated(s)) for s in everyone)
        if why := _no_scale(before.total, mine.total, "a recalibration changes nothing"):
            return Finding(name, None, "down", reason=why)
        return Finding(
            name,
            mine.total / before.total,
            "down",
            original=1.0,
            detail={
                "distance": mine.total,
                "original_distance": before.total,
                "layers": mine.layers,
            },
            **against([t.total / before.total for t in theirs]),
        )

    def _reference(self, everyone: Sequence[Subject]) -> Finding:
        name = "norm-statistics/reference"
        mine, before, *theirs = (statistics(s.model) for s in everyone)
        if not theirs:
            return Finding(name, None, "down", reason=NO_REFERENCE)
        ours = [apart(mine, t) for t in theirs]
        distance = float(np.mean([o.total for o in ours]))
        scale = float(np.mean([apart(before, t).total for t in theirs]))
        if why := _no_scale(scale, distance, "the original's are those of retrained models"):
            return Finding(name, None, "down", reason=why)
        among = [apart(a, b).total / scale for a, b in itertools.permutations(theirs, 2)]
        layers = {n: float(np.mean([o.layers[n] for o in ours])) for n in mine}
        return Finding(
            name,
            distance / scale,
            "down",
            reference=float(np.mean(among)) if among else None,
            floor=float(np.max(among)) if among else None,
            original=1.0,
            reason=None if among else "one reference: the distance among references is unknown",
            detail={"distance": distance, "original_distance": scale, "layers": layers},
        )


@dataclass(frozen=True)
class Apart:
    """A distance over all channels, and that of each layer's channels."""

    total: float
    layers: dict[str, float]


def statistics(model: nn.Module) -> Statistics:
    """Running statistics of a model in float64 on CPU, in the order of its layers."""
    layers = set(norm_layers(model))
    return {
        name: (m.running_mean.double().cpu(), m.running_var.double().cpu(), m.eps)
        for name, m in model.named_modules()
        if m in layers
    }


def apart(ours: Statistics, theirs: Statistics) -> Apart:
    """Root mean divergence of `ours` from `theirs`, which gives the scale of each channel."""
    channels = {}
    for name, (mean, var, eps) in ours.items():
        other_mean, other_var, _ = theirs[name]
        ratio = (var + eps) / (other_var + eps)
        shift = (mean - other_mean).square() / (other_var + eps)
        channels[name] = ((ratio + shift - 1 - ratio.log()) / 2).clamp_min(0)
    layers = {name: math.sqrt(float(each.mean())) for name, each in channels.items()}
    return Apart(math.sqrt(float(torch.cat(list(channels.values())).mean())), layers)


def recalibrated(subject: Subject) -> Statistics:
    """What the retain data alone gives a copy of the model; kept with the subject, asked often."""
    if "_recalibrated" not in subject.__dict__:
        model = copy.deepcopy(subject.model)
        alone = Runtime(device=subject.runtime.device, alone=True)
        kept = Source(subject.problem.train, subject.splits["retain-train"], False, alone)
        recalibrate(model, kept)
        subject.__dict__["_recalibrated"] = statistics(model)
    return subject.__dict__["_recalibrated"]


def _unlike(found: Sequence[Statistics]) -> str | None:
    """Why statistics cannot be compared, or None."""
    if not any(found):
        return "the model keeps no running statistics"
    shapes = [{name: mean.shape for name, (mean, _, _) in one.items()} for one in found]
    if any(one != shapes[0] for one in shapes):
        return "the models keep running statistics of other layers than each other"
    values = [v for one in found for mean, var, _ in one.values() for v in (mean, var)]
    if not all(bool(v.isfinite().all()) for v in values):
        return "a model's running statistics are not finite"
    if any(bool((var < 0).any()) for one in found for _, var, _ in one.values()):
        return "a model has a running variance below zero"
    return None


def _no_scale(scale: float, distance: float, what: str) -> str | None:
    """Why a share of the original's distance has no meaning, or None."""
    if not (math.isfinite(scale) and math.isfinite(distance)):
        return "recalibration gives statistics that are not finite"
    return f"the original has no distance to share: {what}" if scale == 0 else None

"""CKA: layer by layer, how alike are the representations to the original and to retrained models?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.audits._splits import FEWEST, NO_REFERENCE
from expunge.core.audit import Audit, Direction, Finding, Subject
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

HELD = 2**26
"""Feature values held at a time (256 MiB in float32)."""
T9 = 2.262157
"""97.5 % point of Student's t with 9 degrees of freedom: ten jackknife groups."""


@dataclass(frozen=True)
class CKA(Audit):
    r"""Linear centred kernel alignment of each layer's outputs (Kornblith et al. 2019).

    With centred features \(X, Y\) of the same n samples:
    \(\|Y^\top X\|_F^2 / (\|X^\top X\|_F\,\|Y^\top Y\|_F)\), in 0 … 1; invariant to rotation and
    isotropic scaling. Computed from the n × n Gram matrices, a few layers at a time, so memory does
    not grow with width or depth. Interval: grouped jackknife over samples.
    `original…` should be as low as for a retrained model and no lower; `reference…` as high as
    retrained models are among each other. Without suffix on forget data, with `-retain` on the rest.
    """

    name: ClassVar[str] = "cka"
    card: ClassVar[Card] = Card(
        title="Similarity of Neural Network Representations Revisited",
        authors="Kornblith, Norouzi, Lee, Hinton",
        year=2019,
        link="https://arxiv.org/abs/1905.00414",
        idea="Similarity of hidden representations, layer by layer.",
        intent="measurement",
    )

    samples: int = setting(300, "samples of a split", low=10)
    layers: tuple[str, ...] = setting((), "module names; all weighted layers if empty")

    @property
    def needs(self) -> Needs:
        """Both sides without labels, and hidden features."""
        return Needs(
            forget=True, retain=True, models=2, capabilities=frozenset({"features", "layers"})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Four findings: to the original and to the references, on forget and on retain data."""
        findings = []
        for split, suffix in (("forget-train", ""), ("retain-train", "-retain")):
            ids = self._pick(subject.splits[split], runtime)
            names = [f"cka/original{suffix}", f"cka/reference{suffix}"]
            if len(ids) < FEWEST:
                why = f"only {len(ids)} samples on this side, {FEWEST} are needed"
                findings += [
                    Finding(names[0], None, reason=why),
                    Finding(names[1], None, "up", reason=why),
                ]
                continue
            layers = list(self.layers) or subject.problem.capability("layers")()
            mine, original, *theirs = (
                self._grams(s, layers, ids) for s in (subject, subject.original(), *references)
            )
            findings.append(
                _finding(
                    names[0], "reference", layers, mine, [original],
                    [layerwise(t, original) for t in theirs], [1.0], NO_REFERENCE,
                )
            )  # fmt: skip
            if not theirs:
                findings.append(Finding(names[1], None, "up", reason=NO_REFERENCE))
                continue
            findings.append(
                _finding(
                    names[1], "up", layers, mine, theirs,
                    [layerwise(a, b) for a, b in itertools.combinations(theirs, 2)],
                    [float(np.mean(layerwise(original, t))) for t in theirs],
                    "one reference: the similarity among references is unknown",
                )
            )  # fmt: skip
        return findings

    def _pick(self, ids: Tensor, runtime: Runtime) -> Tensor:
        order = torch.randperm(len(ids), generator=runtime.generator("cka"))
        return ids[order[: self.samples]].sort().values

    @torch.no_grad()
    def _grams(self, subject: Subject, layers: list[str], ids: Tensor) -> list[Tensor]:
        """Centred Gram matrix [n, n] of each layer; kept with the subject, which is asked often."""
        kept: dict[Any, Any] = subject.__dict__.setdefault("_grams", {})
        key = (tuple(layers), tuple(ids.tolist()))
        if key not in kept:
            read = subject.problem.capability("features")

            def features(some: list[str], of: Tensor) -> dict[str, Tensor]:
                parts = [
                    read(subject.model, batch.to(subject.runtime.device), some)
                    for batch in subject.problem.train.batches(64, of)
                ]
                return {n: torch.cat([p[n].float() for p in parts]) for n in some}

            widths = {n: f.shape[1] for n, f in features(layers, ids[:1]).items()}
            kept[key] = [
                gram(found[n])
                for group in groups(widths, HELD // len(ids))
                for found in [features(group, ids)]
                for n in group
            ]
        return kept[key]


def groups(widths: Mapping[str, int], most: int) -> list[list[str]]:
    """Split layers, in order, into runs whose widths add up to at most `most` (or one layer)."""
    found: list[list[str]] = []
    room = 0
    for name, width in widths.items():
        if not found or width > room:
            found.append([])
            room = most
        found[-1].append(name)
        room -= width
    return found


def gram(features: Tensor) -> Tensor:
    """Centred linear Gram matrix [n, n] of features [n, d]."""
    centred = features - features.mean(0)
    return (centred @ centred.T).double().cpu()


def linear_cka(a: Tensor, b: Tensor) -> float:
    """CKA of two centred Gram matrices; 0 where one of them is constant, NaN where one holds NaN."""
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale != 0 else 0.0


def layerwise(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """CKA of each layer."""
    return [linear_cka(x, y) for x, y in zip(a, b, strict=True)]


def jackknife(mine: Sequence[Tensor], others: Sequence[Sequence[Tensor]], parts: int = 10) -> float:
    """Standard error over samples of the mean CKA, leaving out one of `parts` groups at a time.

    Args:
        mine: centred Gram matrices [n, n] of one model's layers.
        others: the same of the models it is compared with.
        parts: number of groups, at most n.

    Returns:
        The standard error.
    """
    n = len(mine[0])
    found = []
    for part in range(parts):
        keep = torch.arange(n) % parts != part
        left = [_centred(g[keep][:, keep]) for g in mine]
        right = [[_centred(g[keep][:, keep]) for g in other] for other in others]
        found.append(np.mean([layerwise(left, r) for r in right]))
    return math.sqrt((parts - 1) * float(np.var(found)))


def _centred(g: Tensor) -> Tensor:
    return g - g.mean(0) - g.mean(1, keepdim=True) + g.mean()


def _finding(
    name: str,
    direction: Direction,
    layers: list[str],
    mine: Sequence[Tensor],
    others: Sequence[Sequence[Tensor]],
    beside: Sequence[Sequence[float]],
    original: Sequence[float],
    alone: str,
) -> Finding:
    values = np.mean([layerwise(mine, o) for o in others], axis=0)
    value = float(values.mean())
    if not np.isfinite(value):
        return Finding(name, None, direction, reason="a model gives NaN or infinite features")
    detail = {"layers": layers, "values": values.tolist()}
    if beside:
        detail["reference_values"] = np.mean(beside, axis=0).tolist()
    means = [float(np.mean(b)) for b in beside]
    half = T9 * jackknife(mine, others)
    return Finding(
        name,
        value,
        direction,
        low=max(0.0, value - half),
        high=max(value, min(1.0, value + half)),
        reference=float(np.mean(means)) if means else None,
        floor=float(np.ptp(means)) if len(means) > 1 else None,
        original=float(np.mean(original)),
        reason=None if means else alone,
        detail=detail,
    )

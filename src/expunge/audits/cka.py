"""CKA: layer by layer, how alike are the representations to the original and to retrained models?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from expunge.core.audit import Audit, Finding, Subject
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting


@dataclass(frozen=True)
class CKA(Audit):
    r"""Linear centred kernel alignment of each layer's outputs (Kornblith et al. 2019).

    With centred features \(X, Y\) of the same n samples:
    \(\|Y^\top X\|_F^2 / (\|X^\top X\|_F\,\|Y^\top Y\|_F)\), in 0 … 1; invariant to rotation and
    isotropic scaling. Computed from the n × n Gram matrices, so cost does not grow with width.
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
            mine, names = self._grams(subject, ids)
            original, _ = self._grams(subject.original(), ids)
            theirs = [self._grams(r, ids)[0] for r in references]
            to_original = layerwise(mine, original)
            detail: dict[str, Any] = {"layers": names, "values": to_original}
            if theirs:
                detail["reference_values"] = mean_over([layerwise(t, original) for t in theirs])
            findings.append(
                _finding(
                    f"cka/original{suffix}",
                    to_original,
                    detail,
                    "reference",
                    [layerwise(t, original) for t in theirs],
                    1.0,
                )
            )
            if not theirs:
                why = "no retrained reference to compare with"
                findings.append(Finding(f"cka/reference{suffix}", None, "up", reason=why))
                continue
            to_them = mean_over([layerwise(mine, t) for t in theirs])
            among = [layerwise(a, b) for a, b in itertools.combinations(theirs, 2)]
            before = mean_over([layerwise(original, t) for t in theirs])
            detail = {"layers": names, "values": to_them}
            if among:
                detail["reference_values"] = mean_over(among)
            findings.append(
                _finding(
                    f"cka/reference{suffix}", to_them, detail, "up", among, float(np.mean(before))
                )
            )
        return findings

    def _pick(self, ids: Tensor, runtime: Runtime) -> Tensor:
        order = torch.randperm(len(ids), generator=runtime.generator("cka"))
        return ids[order[: self.samples]].sort().values

    @torch.no_grad()
    def _grams(self, subject: Subject, ids: Tensor) -> tuple[list[Tensor], list[str]]:
        """Centred Gram matrix [n, n] of each layer; kept with the subject, which is asked often."""
        kept: dict[Any, Any] = subject.__dict__.setdefault("_grams", {})
        key = (self.layers, tuple(ids.tolist()))
        if key not in kept:
            problem = subject.problem
            names = list(self.layers) or problem.capability("layers")()
            read = problem.capability("features")
            parts: dict[str, list[Tensor]] = {n: [] for n in names}
            for batch in problem.train.batches(128, ids):
                found = read(subject.model, batch.to(subject.runtime.device), names)
                for n in names:
                    parts[n].append(found[n].float())
            kept[key] = ([gram(torch.cat(parts[n])) for n in names], names)
        return kept[key]


def gram(features: Tensor) -> Tensor:
    """Centred linear Gram matrix [n, n] of features [n, d]."""
    centred = features - features.mean(0)
    return (centred @ centred.T).double().cpu()


def linear_cka(a: Tensor, b: Tensor) -> float:
    """CKA of two centred Gram matrices; 0 where one of them is constant."""
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def layerwise(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """CKA of each layer."""
    return [linear_cka(x, y) for x, y in zip(a, b, strict=True)]


def mean_over(rows: Sequence[Sequence[float]]) -> list[float]:
    """Mean of each layer over models."""
    return np.mean(rows, axis=0).tolist()


def _finding(
    name: str,
    values: Sequence[float],
    detail: dict[str, Any],
    direction: Any,
    theirs: Sequence[Sequence[float]],
    original: float,
) -> Finding:
    means = [float(np.mean(t)) for t in theirs]
    return Finding(
        name,
        float(np.mean(values)),
        direction,
        reference=float(np.mean(means)) if means else None,
        floor=float(np.ptp(means)) if len(means) > 1 else None,
        original=original,
        reason=None if means else "too few retrained references to compare with",
        detail=detail,
    )

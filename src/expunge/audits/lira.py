"""LiRA: is a sample's log-odds more like those of models that saw it, or of models that did not?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from expunge.audits._shadow_attack import Ground, ShadowAttack, Variant, auc_and_rates, odds
from expunge.core.audit import Finding, Subject
from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.fleet.shadows import Shadows

Array = npt.NDArray[np.float64]

PER_SAMPLE = 64
"""Shadow models from which on each sample has a variance of its own; the paper's choice."""
_TINY = 1e-12


class Fit(NamedTuple):
    """Means and standard deviations [N] of one side, and the models that the scarcest sample has."""

    mean: Array
    std: Array
    models: int


@dataclass(frozen=True)
class LiRA(ShadowAttack):
    r"""Likelihood-ratio attack with shadow models, beside the same attack on retrained models.

    With the log-odds \(\varphi\) of the true label, \(\mathcal N(\mu_{in}, \sigma_{in})\) those of shadow
    models that saw a sample and \(\mathcal N(\mu_{out}, \sigma_{out})\) those of the others:
    online \(\Lambda = \log \mathcal N(\varphi; in) - \log \mathcal N(\varphi; out)\), offline
    \(z = (\varphi - \mu_{out})/\sigma_{out}\). `auc`: two-sided, ½ … 1; `tpr-…-at-α`: share of the forgotten
    samples beyond thresholds that a share α of the non-members passes, half in each tail, 0 … 1;
    `balanced-accuracy`: at the attack's own threshold 0, folded at ½.
    """

    name: ClassVar[str] = "lira"
    card: ClassVar[Card] = Card(
        title="Membership Inference Attacks From First Principles",
        authors="Carlini, Chien, Nasr, Song, Terzis, Tramèr",
        year=2022,
        link="https://arxiv.org/abs/2112.03570",
        idea="Whether a sample's log-odds lie where models that saw it have them, or where others do.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Both directions count: the offline score is a number of standard deviations and not "
                "a tail's probability, AUCs are folded, and rates are taken in both tails.",
                "tests/audits/test_lira.py::test_over_forgetting_is_found_as_memory_is",
            ),
            Deviation(
                "With fewer than 64 models the variance is the mean of the samples' own ones; the "
                "official code takes that of all log-odds together, in which samples differ too.",
                "tests/audits/test_lira.py::test_the_pooled_variance_is_within_samples",
            ),
            Deviation(
                "One query a sample, as it is stored: no augmented copies.",
                "tests/audits/test_lira.py::test_baselines_vision_scores_are_the_papers_by_hand",
            ),
            Deviation(
                "Means are means; the official code takes medians.",
                "tests/audits/test_lira.py::test_baselines_vision_scores_are_the_papers_by_hand",
            ),
        ),
    )

    variance: Literal["auto", "sample", "pooled"] = setting(
        "auto", "of each sample, or one for all; auto: one below 64 models", source="official code"
    )

    def _attack(self, variant: Variant, subject: Subject, at: Ground) -> list[Finding] | str:
        made = at.shadows
        pooled = self.variance == "pooled" or (
            self.variance == "auto" and len(made.masks) < PER_SAMPLE
        )
        out = fit(made, False, pooled)
        inside = fit(made, True, pooled) if variant == "online" else None
        fewest = min(f.models for f in (out, inside) if f is not None)
        if fewest < 2:
            return f"{len(made.masks)} shadow models leave some sample with {fewest} of a side; raise models"
        if not out.std.any():
            return "all shadow models say the same of every sample"

        def score(s: Subject, split: str) -> Array:
            at_columns = made.columns(split, s.splits[split]).numpy()
            return scores(odds(s, split), out, inside, at_columns)

        return auc_and_rates("lira", variant, score, subject, at, self.fprs, fewest, 0.0)


def fit(made: Shadows, inside: bool, pooled: bool) -> Fit:
    """Normal distributions of the log-odds of all samples, over models that saw them or did not.

    Args:
        made: shadow models.
        inside: those that saw a sample.
        pooled: one standard deviation for all samples, the root of the mean of their variances.
    """
    rows = (made.masks if inside else ~made.masks).double()
    count = rows.sum(0)
    values = made.odds.double()
    mean = (values * rows).sum(0) / count.clamp_min(1)
    variance = ((values - mean).square() * rows).sum(0) / (count - 1).clamp_min(1)
    if pooled:
        variance = torch.full_like(variance, float(variance.mean()))
    return Fit(mean.numpy(), variance.sqrt().numpy(), int(count.min()))


def scores(phi: Array, out: Fit, inside: Fit | None, at: npt.NDArray[np.int64]) -> Array:
    """LiRA's scores [n] of log-odds [n], with the fits of some columns; offline without `inside`."""
    z = (phi - out.mean[at]) / np.maximum(out.std[at], _TINY)
    if inside is None:
        return z
    own = (phi - inside.mean[at]) / np.maximum(inside.std[at], _TINY)
    ratio = np.log(np.maximum(out.std[at], _TINY)) - np.log(np.maximum(inside.std[at], _TINY))
    return (z**2 - own**2) / 2 + ratio

"""RMIA: how many other samples does a sample beat, each by its own standard?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from expunge.audits._members import Places
from expunge.audits._shadow_attack import Ground, ShadowAttack, Variant, auc_and_rates, odds
from expunge.audits._splits import FEWEST
from expunge.core.audit import Finding, Subject
from expunge.core.needs import Card, Deviation
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.fleet.shadows import Shadows

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RMIA(ShadowAttack):
    r"""Robust membership inference: a sample's likelihood ratio against those of a population.

    With \(p(x)\) the probability of the true label and \(\bar p(x)\) what models give it on average,
    the score is the share of population samples z with
    \(\frac{p(x)/\bar p(x)}{p(z)/\bar p(z)} \ge \gamma\). Online, \(\bar p\) is the mean of the means over models
    that saw the sample and those that did not; offline, \(\frac12[(1+a)\bar p_{out} + (1-a)]\) stands for it.
    `auc`: two-sided, ½ … 1; `tpr-…-at-α`: share of the forgotten samples beyond thresholds that a
    share α of the non-members passes, half in each tail, 0 … 1.
    """

    name: ClassVar[str] = "rmia"
    card: ClassVar[Card] = Card(
        title="Low-Cost High-Power Membership Inference Attacks",
        authors="Zarifzadeh, Liu, Shokri",
        year=2024,
        link="https://arxiv.org/abs/2312.03262",
        idea="How often a sample's likelihood ratio beats those of other samples.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Both directions count: AUCs are folded, and rates are taken in both tails.",
                "tests/audits/test_rmia.py::test_over_forgetting_is_found_as_memory_is",
            ),
            Deviation(
                "The population are test samples of the classes to forget that do not stand for "
                "non-members, or half of those that would where few are left.",
                "tests/audits/test_rmia.py::test_the_population_is_apart_from_the_non_members",
            ),
            Deviation(
                "Probabilities are those of the softmax, without the paper's temperature and margin, and "
                "of each sample as it is stored.",
                "tests/audits/test_rmia.py::test_scores_are_the_papers_by_hand",
            ),
        ),
    )

    gamma: float = setting(1.0, "γ, by how much a population sample is to be beaten", above=0, source="official code; 2 in the paper")  # fmt: skip
    a: float = setting(0.3, "a of the offline average, 0 … 1", low=0, high=1, source="paper, CIFAR-10")  # fmt: skip

    def _parted(self, subject: Subject, at: Ground, runtime: Runtime) -> Ground | str:
        return parted(subject, at, runtime)

    def _attack(self, variant: Variant, subject: Subject, at: Ground) -> list[Finding] | str:
        made, population = at.shadows, at.population
        fewest = int((~made.masks).sum(0).min())
        if variant == "online":
            fewest = min(fewest, int(made.masks.sum(0).min()))
        if fewest < 1:
            return f"{len(made.masks)} shadow models leave some sample with none of a side; raise models"
        average = log_average(made, None if variant == "online" else self.a).numpy()

        def ratios(s: Subject, split: str) -> Array:
            columns = made.columns(split, s.splits[split]).numpy()
            own = logsigmoid(torch.from_numpy(odds(s, split))).numpy()
            return own - average[columns]

        beaten: dict[int, Array] = {}

        def score(s: Subject, split: str) -> Array:
            whole = s.whole
            if id(whole) not in beaten:
                beaten[id(whole)] = np.concatenate([
                    ratios(whole, z)[places.numpy()] for z, places in population.items()
                ])
            return share_beaten(ratios(s, split), beaten[id(whole)], self.gamma)

        # its average takes a few models; what sets the rate of false alarms are the non-members
        found = auc_and_rates("rmia", variant, score, subject, at, self.fprs, fewest, None)
        size = sum(map(len, population.values()))
        return [
            f if f.value is None else _with(f, population=size, gamma=self.gamma) for f in found
        ]


def _with(finding: Finding, **facts: float) -> Finding:
    finding.detail.update(facts)
    return finding


def parted(subject: Subject, at: Ground, runtime: Runtime) -> Ground | str:
    """Part test samples into non-members and population.

    Returns:
        The ground with its population, perhaps with half of its non-members; or why it cannot be.
    """
    classes = subject.whole.labels("forget-train").unique()
    free: Places = {}
    for split in ("forget-test", "retain-test"):
        if not len(subject.splits[split]):
            continue
        # where a class was forgotten, samples of others are beaten by none or by all
        left = torch.isin(subject.labels(split), classes)
        left[at.places.get(split, torch.empty(0, dtype=torch.long))] = False
        if bool(left.any()):
            free[split] = left.nonzero().flatten()
    taken = sum(map(len, at.places.values()))
    if sum(map(len, free.values())) >= max(FEWEST, taken // 2):
        return replace(at, population=free)
    if taken < 2 * FEWEST:
        return f"only {taken} non-members, {2 * FEWEST} are needed: half of them are the population"
    generator = runtime.generator("rmia", "population")
    kept: Places = {}
    for split, places in at.places.items():
        order = places[torch.randperm(len(places), generator=generator)]
        half = len(order) // 2
        kept[split] = order[:half].sort().values
        free[split] = torch.cat([free.get(split, order[:0]), order[half:]]).sort().values
    how = f"half of {at.how}; the others are the population"
    return replace(at, places={s: p for s, p in kept.items() if len(p)}, how=how, population=free)


def log_average(made: Shadows, a: float | None) -> Tensor:
    r"""Logarithm of \(\bar p\) [N] for all samples: online without `a`, else offline.

    Args:
        made: shadow models.
        a: of the offline average \(\frac12[(1+a)\bar p_{out} + (1-a)]\); None: mean of both sides' means.
    """
    log_p = logsigmoid(made.odds.double())

    def mean(rows: Tensor) -> Tensor:
        return log_p.masked_fill(~rows, -torch.inf).logsumexp(0) - rows.sum(0).double().log()

    out = mean(~made.masks)
    if a is None:
        return torch.logaddexp(out, mean(made.masks)) - float(np.log(2))
    return ((1 + a) / 2 * out.exp() + (1 - a) / 2).log() if a < 1 else out


def share_beaten(ratios: Array, population: Array, gamma: float) -> Array:
    r"""Share of population ratios that each ratio is at least γ times as large as; logarithms in.

    Args:
        ratios: \(\log p(x)/\bar p(x)\), [n].
        population: the same of z, [m].
        gamma: γ.

    Returns:
        Values 0 … 1, [n].
    """
    ordered = np.sort(population)
    return np.searchsorted(ordered, ratios - np.log(gamma), "right") / len(ordered)

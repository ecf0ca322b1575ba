r"""Scores of records against models that never saw them.

\[ s'(x) = \phi_U(x) - \operatorname{mean}_m \phi_m(x), \qquad \phi(x) = \ln p_y - \ln(1 - p_y) \]

A hard record scores low in every model; what is left says what *this* model has of it. The models m
must not have been trained on x. Retrained references never saw the forget set nor the test data, and
the original saw all of the forget set: with them the original's scores of the forget set stand for
memorised records. They did see the retain set: a kept record is calibrated by models on the *other* half of
the kept records, and so that nobody is calibrated with less noise, every other record by one side too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expunge.audits._density import Array
from expunge.core.audit import Subject
from expunge.core.hashing import hash_tensors
from expunge.core.runtime import Runtime
from expunge.fleet.subsets import train_many
from expunge.train.losses import margin_each

CLIP = 18.0
JITTER = 0.1
"""Width over which clipped scores are spread, lest they make a spike in a density."""


def log_odds(subject: Subject, split: str, runtime: Runtime) -> Array:
    """Log-odds [n] of the true labels, clipped to ±18 and spread a little where they were."""
    phi = margin_each(subject.logits(split).double(), subject.labels(split)).numpy()
    # another spread for each model: the same one would cancel where scores are taken off each other
    model = hash_tensors({"logits": subject.logits(split)})
    clipped = np.abs(phi) >= CLIP
    spread = (
        JITTER * torch.rand(len(phi), generator=runtime.generator("log-odds", split, model)).numpy()
    )
    found = np.clip(phi, -CLIP, CLIP)
    return np.where(clipped, found - np.sign(phi) * spread, found)


@dataclass(frozen=True)
class Calibration:
    """What is taken off a score.

    Attributes:
        means: mean log-odds [n] of a subject's split in models that never saw it.
        words: which models these are.
        runtime: seeds the spread of clipped scores.
    """

    means: Callable[[Subject, str], Array]
    words: str
    runtime: Runtime

    def scores(self, subject: Subject, split: str) -> Array:
        """Calibrated scores [n]."""
        return log_odds(subject, split, self.runtime) - self.means(subject, split)


def by_references(references: Sequence[Subject], runtime: Runtime) -> Calibration:
    """Calibrate forgotten and unseen records by retrained models; not at all without any."""
    if not references:
        none = "none: there is no model that never saw the records"
        return Calibration(lambda s, split: np.zeros(len(s.splits[split])), none, runtime)

    def means(subject: Subject, split: str) -> Array:
        if split == "retain-train":
            raise AssertionError("references were trained on the kept records")
        return np.mean([log_odds(r, split, runtime) for r in references], axis=0)

    return Calibration(means, f"{len(references)} retrained references", runtime)


def by_halves(subject: Subject, count: int, runtime: Runtime) -> Calibration:
    """Calibrate by models trained on one or the other half of the kept records; not at all without a recipe.

    The models are trained once a request and kept with the problem.

    Args:
        subject: gives the problem and what is kept.
        count: models, half of them a side.
        runtime: seeds.

    Returns:
        The calibration.
    """
    problem, kept = subject.problem, subject.whole.splits["retain-train"]
    if problem.recipe is None:
        return by_references([], runtime)
    order = torch.randperm(len(kept), generator=runtime.generator("halves"))
    first = torch.zeros(len(kept), dtype=torch.bool)
    first[order[: len(kept) // 2]] = True
    halves = [kept[first].sort().values, kept[~first].sort().values]
    number = max(1, count // 2)
    # its predictions of a split are those of this request alone
    key = (subject.request.key, hash_tensors({"kept": kept}), number, runtime.seed, runtime.device)
    shared = problem.beside_models.setdefault("halves", {})
    if key not in shared:
        seeds = [[runtime.seed_for("halves", side, k) for k in range(number)] for side in (0, 1)]
        shared[key] = [
            [
                Subject(model, problem, subject.request, runtime)
                for model in train_many(
                    problem, [halves[side]] * number, seeds[side], runtime, "halves"
                )
            ]
            for side in (0, 1)
        ]
    sides: list[list[Subject]] = shared[key]

    def means(s: Subject, split: str) -> Array:
        ids = s.whole.splits[split]
        if split == "retain-train":
            inside: Tensor = torch.isin(ids, halves[0])
        else:
            inside = torch.rand(len(ids), generator=runtime.generator("sides", split)) < 0.5
        by = [np.mean([log_odds(m, split, runtime) for m in side], axis=0) for side in sides]
        found = np.where(inside.numpy(), by[1], by[0])  # models of the half it is not in
        return found[torch.isin(ids, s.splits[split]).numpy()]

    return Calibration(means, f"{count} models on halves of the kept records", runtime)

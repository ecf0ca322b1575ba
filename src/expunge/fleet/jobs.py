"""A fleet as data: one job a model to train, each with a content key that the store can look up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge import __version__
from expunge.core.errors import SettingError, UserError
from expunge.core.hashing import content_key, hash_tensors
from expunge.core.outcome import Cost
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime

if TYPE_CHECKING:
    from expunge.core.request import Request

ROLES = ("reference", "shadow", "original", "checkpoint")
"""What a model of a fleet is for; also the kind of its run in the store."""


@dataclass(frozen=True, eq=False)
class Job:
    """One training of a problem's recipe.

    Attributes:
        keep: ids [n] to train on. Their order is part of the job, since batches are drawn from it;
            those of a reference are sorted.
        seed: of initialisation and batch order.
        role: one of `ROLES`.
        request: what a reference must not have seen, for its record.
    """

    keep: Tensor
    seed: int
    role: str = "shadow"
    request: Request | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Sort a reference's ids.

        Raises:
            UserError: the role is unknown, or there is nothing to train on.
        """
        if self.role not in ROLES:
            raise UserError(f"a job's role is one of {', '.join(ROLES)}, not {self.role!r}")
        if not len(self.keep):
            raise UserError("a job needs at least one sample to train on")
        if self.role == "reference":
            object.__setattr__(self, "keep", self.keep.sort().values)

    def key(self, problem: Problem, device: str = "cpu") -> str:
        """Content key: recipe, data, samples, seed and device. The role is the kind of the run."""
        keys = fleet_keys(problem, [self], device)
        return keys[0]


@dataclass(frozen=True)
class Done:
    """A job's model, on CPU and in eval mode, and what it took.

    Attributes:
        index: place of the job among those given.
        model: the model.
        cost: of this training; of one among several at once, its share of their time.
    """

    index: int
    model: nn.Module
    cost: Cost


def fleet_keys(problem: Problem, jobs: Sequence[Job], device: str = "cpu") -> list[str]:
    """Content keys of jobs; what they share is hashed once.

    A reference is known by the samples it must not have seen, the others by those they saw.

    Raises:
        NeedsError: the problem has no recipe.
    """
    shared = [__version__, problem.recipe_key(), problem.train.fingerprint()]
    keys = []
    for job in jobs:
        if job.role == "reference":
            what = ["reference", *shared, hash_tensors({"ids": problem.train.without(job.keep)})]
        else:
            what = ["fleet", *shared, hash_tensors({"kept": job.keep})]
        keys.append(content_key([*what, job.seed, device]))
    return keys


def rows(jobs: Sequence[Job], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Jobs as JSON: key, role, seed, number and hash of the samples."""
    return [
        {"key": key, **described(job), "seed": job.seed}
        for job, key in zip(jobs, keys, strict=True)
    ]


def described(job: Job) -> dict[str, Any]:
    """What a record keeps of a job beside its seed."""
    return {"role": job.role, "samples": len(job.keep), "kept": hash_tensors({"kept": job.keep})}


def random_masks(count: int, size: int, share: float, runtime: Runtime) -> Tensor:
    """Masks bool [count, size], each with `round(share · size)` samples drawn without replacement.

    Each row has a generator of its own: more models later leave the first ones as they are.

    Raises:
        SettingError: the share keeps no sample or all of them.
    """
    kept = round(share * size)
    if not 0 < kept < size:
        raise SettingError(
            f"a subset of share {share:g} of {size} samples holds none or all of them"
        )
    masks = torch.zeros(count, size, dtype=torch.bool)
    for row in range(count):
        masks[row, torch.randperm(size, generator=runtime.generator("subset", row))[:kept]] = True
    return masks


def random_halves(
    problem: Problem, count: int, seed: int = 0, *, share: float = 0.5, first_seed: int = 1
) -> list[Job]:
    """Shadow models: each on a random share of the training data, drawn by the seed and its number.

    Args:
        problem: whose training data.
        count: how many.
        seed: of the draws; more jobs later leave the first ones as they are.
        share: of the data in each.
        first_seed: of the first training; the next ones count on.

    Raises:
        SettingError: the share keeps no sample or all of them.
    """
    masks = random_masks(count, len(problem.train), share, Runtime(seed=seed))
    return [Job(problem.train.ids[mask], first_seed + k) for k, mask in enumerate(masks)]


def kept_masks(problem: Problem, jobs: Sequence[Job]) -> Tensor:
    """Who was in each training, bool [K, n] in the order of the training data's ids."""
    return torch.stack([torch.isin(problem.train.ids, job.keep) for job in jobs])

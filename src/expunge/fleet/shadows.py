r"""Shadow models: what models trained on random halves of the data say about every sample.

The halves are drawn from training *and* test data together where the recipe allows it, so that a
sample to forget and one never seen are known equally well: each was in about half of the models.
What is kept of a model is one number a sample, the log-odds of its true label

\[ \varphi = \log\frac{p_y}{1-p_y} = z_y - \log\sum_{c \ne y} e^{z_c}, \]

from which \(p_y = 1/(1+e^{-\varphi})\). Trained once a problem, kept with it and in the store, and
shared by all audits, subjects and strata.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge import __version__
from expunge.core.data import Data
from expunge.core.errors import NeedsError
from expunge.core.hashing import content_key
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.fleet.subsets import random_masks, train_many
from expunge.train.losses import margin_each
from expunge.train.recipe import SupervisedRecipe

if TYPE_CHECKING:
    from expunge.store import Store

SHARE = 0.5
"""Share of the samples in each model: as many models in as out, for every sample."""


@dataclass(frozen=True)
class Shadows:
    """Log-odds of K models, training samples first, then test samples, in the order of their data.

    Attributes:
        masks: who was in each training, bool [K, n + m].
        odds: log-odds of the true label, float32 [K, n + m].
        train_ids: ids [n].
        test_ids: ids [m].
        both: whether test samples were trained on too. If not, no model was trained on one, and
            their part of `masks` is a draw that only says which models to leave out, so that both
            sides are measured against equally many.
    """

    masks: Tensor
    odds: Tensor
    train_ids: Tensor
    test_ids: Tensor
    both: bool

    def columns(self, split: str, ids: Tensor) -> Tensor:
        """Columns of some samples of a split, e.g. `forget-train`, in the order of `ids`."""
        held = split.endswith("test")
        ordered, order = (self.test_ids if held else self.train_ids).sort()
        places = order[torch.searchsorted(ordered, ids)]
        return places + (len(self.train_ids) if held else 0)


def shadows(problem: Problem, models: int, runtime: Runtime, store: Store | None = None) -> Shadows:
    """Train `models` shadow models, or take them from the problem's memory or the store.

    Args:
        problem: a classification problem with recipe, labels and test data.
        models: K, at least 2.
        runtime: seed, device and progress.
        store: where they are kept and looked up beyond this process.

    Returns:
        What they say.

    Raises:
        NeedsError: the problem has no recipe, or no test data with labels.
    """
    if problem.recipe is None:
        raise NeedsError("shadow models need to know how the model was trained; pass recipe=")
    if problem.test is None or not (problem.test.labelled and problem.train.labelled):
        raise NeedsError("shadow models need test data, and labels of all data")
    key = content_key([
        "shadows", __version__, problem.recipe_key(), problem.train.fingerprint(),
        problem.test.fingerprint(), problem.fingerprint()["functions"], models, SHARE, runtime.seed, runtime.device,
    ])  # fmt: skip
    made = kept(problem, "shadows", key, store, lambda: _train(problem, models, runtime))
    return Shadows(
        made["masks"], made["odds"], problem.train.ids, problem.test.ids, bool(made["both"])
    )


def kept(
    problem: Problem, kind: str, key: str, store: Store | None, make: Any
) -> dict[str, Tensor]:
    """What `make()` gives, or gave earlier: from the problem's memory, then from the store."""
    memory: dict[str, dict[str, Tensor]] = problem.__dict__.setdefault("_shadows", {})
    if key in memory:
        return memory[key]
    found = None if store is None else store.find(kind, key)
    if store is not None and found is not None:
        tensors = store.tensors(found)
    else:
        tensors = make()
        if store is not None:
            store.put_run(kind=kind, key=key, record={"problem": problem.name}, tensors=tensors)
    memory[key] = tensors
    return tensors


def _train(problem: Problem, models: int, runtime: Runtime) -> dict[str, Tensor]:
    train, test, recipe = problem.train, problem.test, problem.recipe
    assert test is not None
    both = isinstance(recipe, SupervisedRecipe) and recipe.data.fingerprint() == train.fingerprint()
    pool = problem
    if both and isinstance(recipe, SupervisedRecipe):
        pool = copy.copy(problem)
        pool.train = train.joined(test)
        pool.recipe = replace(recipe, data=pool.train)
    masks = random_masks(models, len(pool.train), SHARE, runtime)
    keeps = [pool.train.ids[mask] for mask in masks]
    seeds = [runtime.seed_for("shadow", k) for k in range(models)]
    odds = [
        torch.cat([odds_of(problem, model, data, runtime) for data in (train, test)])
        for model in train_many(pool, keeps, seeds, runtime, task="shadow models")
    ]
    if not both:
        spared = replace(runtime, seed=runtime.seed_for("spared"))
        masks = torch.cat([masks, random_masks(models, len(test), SHARE, spared)], 1)
    return {"masks": masks, "odds": torch.stack(odds), "both": torch.tensor(both)}


@torch.no_grad()
def odds_of(
    problem: Problem, model: nn.Module, data: Data, runtime: Runtime, ids: Tensor | None = None
) -> Tensor:
    """Log-odds float32 [n] of a model's true labels, in eval mode, on CPU."""
    compute = problem.capability("logits")
    model = model.to(runtime.device).eval()
    parts = []
    for batch in data.batches(512, ids):
        logits = compute(model, batch.to(runtime.device)).cpu()
        assert batch.y is not None
        parts.append(margin_each(logits.double(), batch.y.cpu()).float())
        runtime.cost.samples += len(batch)
    return torch.cat(parts)


def trained_on(
    problem: Problem, keeps: list[Tensor], seeds: list[int], runtime: Runtime, task: str
) -> Iterator[tuple[int, nn.Module]]:
    """Yield number and model of trainings on sets of ids, those of one size together."""
    order = sorted(range(len(keeps)), key=lambda k: len(keeps[k]))
    made = train_many(problem, [keeps[k] for k in order], [seeds[k] for k in order], runtime, task)
    yield from zip(order, made, strict=True)

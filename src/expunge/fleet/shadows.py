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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge import __version__
from expunge.core.data import Data
from expunge.core.errors import NeedsError
from expunge.core.hashing import content_key
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.fleet.asked import Answer, ask_many
from expunge.fleet.jobs import Job, random_masks
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
        store: where what each says is looked up and kept; fewer models asked for earlier are the
            first of these.

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
        problem.test.fingerprint(), problem.fingerprint()["functions"], SHARE, runtime.seed, runtime.device,
    ])  # fmt: skip
    memory: dict[str, Shadows] = problem.__dict__.setdefault("_shadows", {})
    known = content_key([key, models])
    if known not in memory:
        memory[known] = _train(problem, models, runtime, store, key)
    return memory[known]


def _train(
    problem: Problem, models: int, runtime: Runtime, store: Store | None, key: str
) -> Shadows:
    train, test, recipe = problem.train, problem.test, problem.recipe
    assert test is not None
    both = isinstance(recipe, SupervisedRecipe) and recipe.data.fingerprint() == train.fingerprint()
    pool = problem
    if both and isinstance(recipe, SupervisedRecipe):
        pool = copy.copy(problem)
        pool.train = train.joined(test)
        pool.recipe = replace(recipe, data=pool.train)
    masks = random_masks(models, len(pool.train), SHARE, runtime)
    jobs = [Job(pool.train.ids[m], runtime.seed_for("shadow", k)) for k, m in enumerate(masks)]

    def ask(k: int, model: nn.Module) -> Answer:
        said = [odds_of(problem, model, data, runtime) for data in (train, test)]
        return {"odds": torch.cat(said)}

    keys = [content_key([key, k]) for k in range(models)]
    answers = ask_many(
        pool, jobs, ask, runtime, kind="shadow-odds", task="shadow models", keys=keys, store=store
    )
    if not both:
        spared = replace(runtime, seed=runtime.seed_for("spared"))
        masks = torch.cat([masks, random_masks(models, len(test), SHARE, spared)], 1)
    odds = torch.stack([a["odds"] for a in answers])
    return Shadows(masks, odds, train.ids, test.ids, both)


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

"""Retrained references: models that never saw what a request covers, cached by content."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import nn

from expunge import __version__
from expunge.core.errors import NeedsError
from expunge.core.hashing import content_key, hash_model, hash_tensors
from expunge.core.method import package_versions
from expunge.core.outcome import Cost
from expunge.core.problem import Problem, run_recipe
from expunge.core.request import Request
from expunge.core.runtime import Runtime

if TYPE_CHECKING:
    from expunge.store import Store

FIRST_SEED = 1001
"""Seeds of references start here, apart from those of originals (0, 1, …)."""


@dataclass
class Reference:
    """A retrained model, what it took, and its run in the store."""

    model: nn.Module
    seed: int
    cost: Cost
    run: str
    reused: bool


def reference_key(problem: Problem, request: Request, seed: int, device: str = "cpu") -> str:
    """Content key: recipe, data, forgotten ids, seed and device."""
    forgotten = hash_tensors({"ids": request.resolve(problem.train)})
    return content_key([
        "reference",
        __version__,
        problem.recipe_key(),
        problem.train.fingerprint(),
        forgotten,
        seed,
        device,
    ])


def reference(
    problem: Problem, request: Request, seed: int, store: Store, runtime: Runtime
) -> Reference:
    """Return one reference, from the store or by running the recipe.

    Args:
        problem: must have a recipe.
        request: what the reference must not have seen.
        seed: of the recipe.
        store: where it is looked up and kept.
        runtime: progress.

    Returns:
        The reference.

    Raises:
        NeedsError: the problem has no recipe.
    """
    if problem.recipe is None:
        raise NeedsError("references need to know how the model was trained; pass recipe=")
    key = reference_key(problem, request, seed, runtime.device)
    found = store.find("reference", key)
    if found is not None:
        model = copy.deepcopy(problem.model)
        model.load_state_dict(store.tensors(found))
        return Reference(model.eval(), seed, Cost.read(found.record["cost"]), found.id, True)
    keep = problem.train.without(request.resolve(problem.train))
    with runtime.metered() as cost:
        model = run_recipe(problem.recipe, keep, seed, runtime).eval()
    epochs = int(getattr(problem.recipe, "epochs", 0))
    cost.samples = cost.gradients = epochs * len(keep)
    settings = getattr(problem.recipe, "settings", dict)
    record = {
        "problem": problem.name,
        "source": problem.source,
        "fingerprint": problem.fingerprint(),
        "request": request.to_dict(),
        "recipe": settings(),
        "runtime": runtime.describe() | {"seed": seed},
        "packages": package_versions(),
        "weights": hash_model(model),
        "cost": asdict(cost),
    }
    run = store.put_run(kind="reference", key=key, record=record, tensors=model.state_dict())
    return Reference(model, seed, cost, run, False)

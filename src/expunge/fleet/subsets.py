"""Trainings on random subsets: who was in each, and what each model says about every input.

What data attribution by regression rests on. Dear once a recipe and data; it serves all requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from expunge.core.data import Data
from expunge.core.hashing import content_key
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.fleet.asked import ask_many, needs_recipe, trained
from expunge.fleet.executors import Executor, in_order
from expunge.fleet.jobs import Job, fleet_keys, random_masks

if TYPE_CHECKING:
    from expunge.store import Store


@dataclass(frozen=True)
class Subsets:
    """What came out of K trainings.

    Attributes:
        masks: who was in each training, bool [K, n] in the order of `train_ids`.
        outputs: logits of every model on every known input, float32 [K, N, C].
        train_ids: ids [n] of the training data.
        ids: ids [N] of the inputs: the training data, then the validation data if it was asked for.
    """

    masks: Tensor
    outputs: Tensor
    train_ids: Tensor
    ids: Tensor


def known_inputs(problem: Problem, validation: bool) -> list[Data]:
    """Data whose inputs may be looked at before any request: training, then validation if asked for."""
    more = [problem.valid] if validation and problem.valid is not None else []
    return [problem.train, *more]


def train_on_subsets(
    problem: Problem,
    models: int,
    share: float,
    runtime: Runtime,
    *,
    validation: bool = False,
    store: Store | None = None,
    executor: str | Executor | None = None,
) -> Subsets:
    """Train `models` times on random subsets and keep what each model says.

    Args:
        problem: must have a recipe; its test data is not looked at.
        models: K.
        share: of the training data in each subset.
        runtime: seeds, device, progress and engine; samples and gradients of a recipe that knows its
            length are counted.
        validation: keep what each model says about the validation data too.
        store: where each model's outputs are looked up, and kept as soon as there are any; its
            weights are not. Without one a call that is killed begins anew.
        executor: see `train_many`.

    Returns:
        Masks and outputs.
    """
    masks = random_masks(models, len(problem.train), share, runtime)
    jobs = [
        Job(problem.train.ids[mask], runtime.seed_for("subset model", k))
        for k, mask in enumerate(masks)
    ]
    needs_recipe(problem)
    answers = ask_many(
        problem, jobs, lambda _, model: {"outputs": outputs_of(problem, model, runtime, validation)},
        runtime, kind="outputs", task="subsets", store=store, executor=executor,
        keys=[] if store is None else _output_keys(problem, jobs, runtime, validation),
    )  # fmt: skip
    ids = torch.cat([data.ids for data in known_inputs(problem, validation)])
    stacked = torch.stack([a["outputs"] for a in answers])
    return Subsets(masks, stacked, problem.train.ids.clone(), ids)


def train_many(
    problem: Problem,
    keeps: Sequence[Tensor],
    seeds: Sequence[int],
    runtime: Runtime,
    task: str,
    executor: str | Executor | None = None,
) -> Iterator[nn.Module]:
    """Yield a model of the problem's recipe for each set of ids and seed, in their order.

    Args:
        problem: must have a recipe.
        keeps: ids to train on, a set a model.
        seeds: one a model.
        runtime: device, progress and engine.
        task: name in progress.
        executor: the engine, in place of the runtime's; by default models are trained together in
            runs of sets of one size, where that is possible and quicker.

    Raises:
        NeedsError: the problem has no recipe.
    """
    jobs = [Job(keep, seed) for keep, seed in zip(keeps, seeds, strict=True)]
    needs_recipe(problem)
    with runtime.task(task, len(keeps)) as progress:
        for done in in_order(trained(problem, jobs, runtime, executor)):
            progress.advance()
            yield done.model


def _output_keys(
    problem: Problem, jobs: Sequence[Job], runtime: Runtime, validation: bool
) -> list[str]:
    """Content keys of what models say: theirs, and that of the further inputs."""
    asked = [data.fingerprint() for data in known_inputs(problem, validation)]
    keys = fleet_keys(problem, jobs, runtime.device)
    functions = problem.fingerprint()["functions"]
    return [content_key(["outputs", problem.kind, functions, key, asked]) for key in keys]


@torch.no_grad()
def outputs_of(problem: Problem, model: nn.Module, runtime: Runtime, validation: bool) -> Tensor:
    """Logits float32 [N, C] of a model in eval mode on every known input, on CPU."""
    compute = problem.capability("logits")
    model = model.to(runtime.device).eval()
    parts = []
    for data in known_inputs(problem, validation):
        for batch in data.batches(512):
            parts.append(compute(model, batch.to(runtime.device)).float().cpu())
            runtime.cost.samples += len(batch)
    return torch.cat(parts)

"""Trainings on random subsets: who was in each, and what each model says about every input.

What data attribution by regression rests on. Dear once a recipe and data; it serves all requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.core.data import Data
from expunge.core.errors import NeedsError, SettingError
from expunge.core.problem import Problem, run_recipe
from expunge.core.runtime import Runtime
from expunge.fleet.together import group_size, train_together


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


def known_inputs(problem: Problem, validation: bool) -> list[Data]:
    """Data whose inputs may be looked at before any request: training, then validation if asked for."""
    more = [problem.valid] if validation and problem.valid is not None else []
    return [problem.train, *more]


def train_on_subsets(
    problem: Problem, models: int, share: float, runtime: Runtime, *, validation: bool = False
) -> Subsets:
    """Train `models` times on random subsets and keep what each model says.

    Args:
        problem: must have a recipe; its test data is not looked at.
        models: K.
        share: of the training data in each subset.
        runtime: seeds, device and progress; samples and gradients of a recipe that knows its length
            are counted.
        validation: keep what each model says about the validation data too.

    Returns:
        Masks and outputs.
    """
    masks = random_masks(models, len(problem.train), share, runtime)
    keeps = [problem.train.ids[mask] for mask in masks]
    seeds = [runtime.seed_for("subset model", k) for k in range(models)]
    outputs = [
        outputs_of(problem, model, runtime, validation)
        for model in train_many(problem, keeps, seeds, runtime, task="subsets")
    ]
    ids = torch.cat([data.ids for data in known_inputs(problem, validation)])
    return Subsets(masks, torch.stack(outputs), problem.train.ids.clone(), ids)


def train_many(
    problem: Problem, keeps: Sequence[Tensor], seeds: Sequence[int], runtime: Runtime, task: str
) -> Iterator[nn.Module]:
    """Yield a model of the problem's recipe for each set of ids and seed, together where possible.

    Models are trained together in runs of sets of one size; others, and networks that cannot be
    stacked, one by one.

    Raises:
        NeedsError: the problem has no recipe.
    """
    recipe = problem.recipe
    if recipe is None:
        raise NeedsError(
            "trainings on subsets need to know how the model was trained; pass recipe="
        )
    most = group_size(recipe, problem.model)
    epochs = int(getattr(recipe, "epochs", 0))
    start = 0
    with runtime.task(task, len(keeps)) as progress:
        while start < len(keeps):
            stop = start + 1
            while stop < min(len(keeps), start + most) and len(keeps[stop]) == len(keeps[start]):
                stop += 1
            group = slice(start, stop)
            made: list[nn.Module] | None = None
            if stop - start > 1:
                try:
                    made = train_together(recipe, keeps[group], seeds[group], runtime)  # type: ignore[arg-type]
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # an operation without a batched form
                    most, stop = 1, start + 1
            if made is None:
                made = [run_recipe(recipe, keeps[start], seeds[start], runtime)]
            counted = epochs * sum(len(keep) for keep in keeps[start:stop])
            runtime.cost.samples += counted
            runtime.cost.gradients += counted
            start = stop
            for model in made:
                progress.advance()
                yield model


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

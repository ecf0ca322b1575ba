"""Many trainings of one recipe at once: weights stacked over models, one `vmap` step for all.

The same trainings as one after the other — initialisation, order of the batches, optimiser,
schedule — up to the rounding of batched matrix products. Small networks on small batches gain most:
there, a step takes longer to start than to compute.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from expunge.core.errors import ExpungeError
from expunge.core.problem import Recipe
from expunge.core.runtime import Runtime
from expunge.train.recipe import ClassifierRecipe
from expunge.train.steps import make_optimizer

MEMORY = 256 * 2**20
"""Bytes that the stacked weights, their gradients and the optimiser's state may take."""


def group_size(recipe: Recipe, model: nn.Module, memory: int = MEMORY) -> int:
    """How many models of a recipe are trained together; 1 where it has to be one by one.

    Only the library's own recipe is known well enough. Buffers (running statistics) and dropout
    have no form over stacked models that equals the single training.
    """
    if type(recipe) is not ClassifierRecipe or any(True for _ in model.buffers()):
        return 1
    if recipe.restriction:  # its gradient of a gradient is not in the step below
        return 1
    if any(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules()):
        return 1
    if not isinstance(recipe.data.fetch(recipe.data.ids[:1]).x, Tensor):
        return 1
    parameters = list(model.parameters())
    if not parameters or not all(p.requires_grad for p in parameters):
        return 1
    each = 5 * sum(p.numel() * p.element_size() for p in parameters)
    return max(1, min(200, memory // each))


def train_together(
    recipe: ClassifierRecipe, keeps: Sequence[Tensor], seeds: Sequence[int], runtime: Runtime
) -> list[nn.Module]:
    """Train one model a seed, each on samples of its own, all at once.

    Args:
        recipe: a recipe for which `group_size` is above 1.
        keeps: ids to train on, the same number for every model.
        seeds: of initialisation and batch order, as in a single training.
        runtime: where the weights lie meanwhile.

    Returns:
        The trained models on CPU, in eval mode.

    Raises:
        ExpungeError: a training diverged.
        RuntimeError: an operation of the network cannot be batched over models.
    """
    own = [Runtime(seed=seed) for seed in seeds]
    models = []
    for each in own:
        each.seed_everything("build")
        models.append(recipe.build().to(runtime.device))
    stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta").train()
    positions = torch.stack([recipe.data.positions(keep) for keep in keeps])
    everything = recipe.data.fetch(recipe.data.ids).to(runtime.device)
    assert everything.y is not None
    optimizer = make_optimizer(
        recipe.step, stacked.values(), lr=recipe.lr, momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(base, weights, (x,)), y)

    losses = torch.zeros(len(own))
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.rate(epoch)
        order = [
            torch.randperm(positions.shape[1], generator=r.generator("recipe", epoch)) for r in own
        ]
        shuffled = positions.gather(1, torch.stack(order)).to(runtime.device)
        for chosen in shuffled.split(recipe.batch_size, dim=1):
            optimizer.zero_grad(set_to_none=True)
            losses = vmap(loss)(stacked, everything.x[chosen], everything.y[chosen])
            losses.sum().backward()  # each model's weights see its own loss alone
            optimizer.step()
    finite = all(bool(torch.isfinite(w).all()) for w in stacked.values())
    if not finite or not bool(torch.isfinite(losses).all()):
        raise ExpungeError("training from the recipe stopped: a loss was no longer finite")
    with torch.no_grad():
        for number, model in enumerate(models):
            for name, p in model.named_parameters():
                p.copy_(stacked[name][number])
    return [model.cpu().eval() for model in models]

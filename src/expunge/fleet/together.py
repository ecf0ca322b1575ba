"""Many trainings of one recipe at once: weights stacked over models, one `vmap` step for all.

The same trainings as one after the other — initialisation, order of the batches, optimiser,
schedule, running statistics — up to the rounding of batched products. Small networks on small batches
gain most: there, a step takes longer to start than to compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, stack_module_state, vmap

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError
from expunge.core.problem import Recipe
from expunge.core.runtime import Runtime, random_restored
from expunge.fleet.stacked_layers import stackable
from expunge.train.norm import train_mode
from expunge.train.recipe import ClassifierRecipe, RegressorRecipe, Stopped, SupervisedRecipe
from expunge.train.steps import make_optimizer

MEMORY = 256 * 2**20
"""Bytes that the stacked weights, their gradients, the optimiser's state and what a backward pass
keeps may take."""

MOST = 200
"""Models at a time, however small."""

HELD = 2**30
"""Bytes of training data up to which it is read once; beyond, batch by batch."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Layers whose buffers are known to move in place, which stacked ones can."""


def group_size(recipe: Recipe, model: nn.Module, memory: int = MEMORY) -> int:
    """How many models of a recipe are trained together; 1 where it has to be one by one.

    Only the library's own recipes are known well enough. Dropout, and buffers other than batch norm's
    running averages, have no form over stacked models that equals the single training.
    """
    recipe = recipe.recipe if isinstance(recipe, Stopped) else recipe
    if type(recipe) not in (ClassifierRecipe, RegressorRecipe):
        return 1
    assert isinstance(recipe, SupervisedRecipe)
    if recipe.restriction:  # its gradient of a gradient is not in the step below
        return 1
    if any(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules()):
        return 1
    known = {
        id(buffer)
        for m in model.modules()
        # without momentum the average needs the count as a number, which differs in form
        if type(m) in NORMS and m.momentum is not None
        for buffer in m.buffers(recurse=False)
    }
    if any(id(buffer) not in known for buffer in model.buffers()):
        return 1
    if not isinstance(recipe.data.fetch(recipe.data.ids[:1]).x, Tensor):
        return 1
    parameters = list(model.parameters())
    if not parameters or not all(p.requires_grad for p in parameters):
        return 1
    each = 5 * sum(p.numel() * p.element_size() for p in parameters) + _kept(recipe, model)
    return max(1, min(MOST, memory // each))


def _kept(recipe: SupervisedRecipe, model: nn.Module, few: int = 8) -> int:
    """Bytes that a backward pass over one batch keeps, from a pass over a few samples."""
    few = min(few, recipe.batch_size, len(recipe.data))
    batch = recipe.data.fetch(recipe.data.ids[:few])
    model = copy.deepcopy(model).cpu().train()
    known = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    try:
        with saved_tensors_hooks(note, lambda t: t), torch.random.fork_rng(devices=[]):
            _loss = recipe.each_loss(model, batch)  # kept, so that no address comes twice
    except Exception:  # the training itself will say what is wrong
        return 0
    return sum(found.values()) * recipe.batch_size // few


def train_together(
    recipe: Recipe, keeps: Sequence[Tensor], seeds: Sequence[int], runtime: Runtime
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
    whole = recipe.recipe if isinstance(recipe, Stopped) else recipe
    assert isinstance(whole, SupervisedRecipe)
    last = recipe.last if isinstance(recipe, Stopped) else whole.epochs
    own = [whole.alone(seed, runtime) for seed in seeds]
    with own[0].own_threads(), random_restored():
        return _train(whole, last, keeps, own, runtime.device)


def _train(
    recipe: SupervisedRecipe,
    last: int,
    keeps: Sequence[Tensor],
    own: Sequence[Runtime],
    device: str,
) -> list[nn.Module]:
    models = []
    for each in own:
        each.seed_everything("build")
        models.append(recipe.build().to(device))
    weights, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = stackable(copy.deepcopy(models[0]).to("meta"), device)
    positions = torch.stack([recipe.data.positions(keep) for keep in keeps])
    read = _reader(recipe, device)
    # the fused step rounds the last few entries of a tensor otherwise than the rest: each model's
    # tensors are stepped on their own, as views of the stack
    pieces = [(w, k, w.detach()[k]) for w in weights.values() for k in range(len(own))]
    optimizer = make_optimizer(
        recipe.step, [piece for *_, piece in pieces], lr=recipe.lr, momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )  # fmt: skip

    def loss(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        batch = Batch(x, y, torch.arange(len(x)), len(x))
        # running statistics are written in place, each model's into its own row of the stack
        network = cast(nn.Module, lambda inputs: functional_call(base, (p, b), (inputs,)))
        return batch.mean(recipe.each_loss(network, batch))

    sound = torch.ones(len(own), dtype=torch.bool, device=device)
    for epoch in range(last):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.rate(epoch)
        order = [
            torch.randperm(positions.shape[1], generator=r.generator("recipe", epoch)) for r in own
        ]
        shuffled = positions.gather(1, torch.stack(order))
        for chosen in shuffled.split(recipe.batch_size, dim=1):
            # one sample has no variance: it is normalised as at inference, as in a single training
            train_mode(base, "frozen" if chosen.shape[1] == 1 else "train")
            for w in weights.values():
                w.grad = None
            losses = vmap(loss)(weights, buffers, *read(chosen))
            losses.sum().backward()  # each model's weights see its own loss alone
            sound &= losses.detach().isfinite()
            if recipe.clip is not None:
                _clip(weights, recipe.clip)
            for w, k, piece in pieces:
                piece.grad = None if w.grad is None else w.grad[k]
            optimizer.step()
        if not bool(sound.all()):
            break
    for stack in weights.values():
        sound &= stack.detach().flatten(1).isfinite().all(1)
    if not bool(sound.all()):
        raise ExpungeError("training from the recipe stopped: a loss was no longer finite")
    with torch.no_grad():
        for number, model in enumerate(models):
            for name, p in model.named_parameters():
                p.copy_(weights[name][number])
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name][number])
    return [model.cpu().eval() for model in models]


def _reader(recipe: SupervisedRecipe, device: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Inputs [K, B, …] and labels [K, B] at positions [K, B]."""
    data = recipe.data
    one = data.fetch(data.ids[:1])
    assert one.y is not None
    if len(data) * (one.x.nbytes + one.y.nbytes) > HELD:

        def from_data(chosen: Tensor) -> tuple[Tensor, Tensor]:
            batch = data.fetch(data.ids[chosen.flatten()]).to(device)
            assert batch.y is not None
            shape = chosen.shape
            return batch.x.unflatten(0, shape), batch.y.unflatten(0, shape)

        return from_data
    held: Any = data.fetch(data.ids).to(device)
    return lambda chosen: (held.x[chosen.to(device)], held.y[chosen.to(device)])


@torch.no_grad()
def _clip(weights: dict[str, Tensor], most: float) -> None:
    """Shrink each model's gradient to a length, as `clip_grad_norm_` does for one model."""
    gradients = [w.grad for w in weights.values() if w.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients])
    factor = (most / (squares.sum(0).sqrt() + 1e-6)).clamp_max(1.0)
    for g in gradients:
        g.mul_(factor.view(-1, *[1] * (g.dim() - 1)))

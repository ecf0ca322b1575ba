"""One training in another process: a recipe goes there, weights come back as bytes."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.outcome import Cost
from expunge.core.problem import Problem, Recipe, run_recipe
from expunge.core.runtime import Runtime


def trained(recipe: Recipe, keep: Tensor, seed: int, runtime: Runtime) -> tuple[nn.Module, Cost]:
    """Train one model and count what it took; samples where the recipe knows its epochs."""
    with runtime.metered() as cost:
        model = run_recipe(recipe, keep, seed, runtime).eval()
    cost.samples = cost.gradients = counted(recipe, keep)
    return model, cost


def counted(recipe: Recipe | None, keep: Tensor) -> int:
    """Samples that a training reads; 0 of a recipe that does not know its epochs."""
    return int(getattr(recipe, "epochs", 0)) * len(keep)


def train_packed(recipe: Recipe, keep: Tensor, seed: int, device: str) -> tuple[bytes, Cost]:
    """Train one model on one thread, unless the recipe says how many, and pack its weights."""
    torch.set_num_threads(1)
    model, cost = trained(recipe, keep, seed, Runtime(device=device, alone=True))
    return pack(model.state_dict()), cost


def pack(state: dict[str, Any]) -> bytes:
    """A state dict as bytes: nothing is shared with the process that made it and may end."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpacked(problem: Problem, packed: bytes) -> nn.Module:
    """The problem's network with weights that came from another process."""
    return with_weights(problem, torch.load(io.BytesIO(packed), weights_only=True))


def with_weights(problem: Problem, state: dict[str, Tensor]) -> nn.Module:
    """The problem's network with other weights, in eval mode."""
    model = copy.deepcopy(problem.model)
    model.load_state_dict(state)
    return model.eval()

"""Weights, gradients and optimiser state spread over processes (fully sharded data parallel).

Each process holds a part of every tensor and gathers a block's weights while it computes with them.
The result is the same as with a whole copy in each process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime


def shard(model: nn.Module, runtime: Runtime) -> nn.Module:
    """A copy of a model whose tensors are spread over the processes, by blocks.

    Args:
        model: whole, and the same in each process; blocks are the members of its outermost lists of
            modules.
        runtime: processes, device, precision.

    Returns:
        The copy; its parameters are `DTensor`s. A step on it has to be taken by all processes.

    Raises:
        NeedsError: the precision is fp16, whose losses are scaled by another tool.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if runtime.precision == "fp16":
        raise NeedsError("a model cannot be sharded in fp16; use precision bf16 or no")
    policy = MixedPrecisionPolicy()
    if runtime.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    mesh = init_device_mesh(runtime.device.partition(":")[0], (runtime.processes,))
    model = copy.deepcopy(model)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Members of the outermost lists of modules; none where a model has no list."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from the parts of all processes; itself if it is not spread."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@torch.no_grad()
def copy_back(sharded: nn.Module, model: nn.Module) -> None:
    """Put the weights of a sharded model into the whole one it was made of."""
    parts = sharded.state_dict()
    for name, value in model.state_dict(keep_vars=True).items():
        value.copy_(whole(parts[name]))


def require_whole_tensors(mask: Mapping[str, Tensor] | None) -> None:
    """Refuse a mask that lets only some coordinates of a tensor move.

    Raises:
        NeedsError: it does.
    """
    for name, free in (mask or {}).items():
        if bool(free.any()) and not bool(free.all()):
            raise NeedsError(
                f"a sharded model trains whole tensors, and only a part of {name} may move; choose "
                "train=full, last(K), role(NAME) or lora(R), or do not shard"
            )


def local(value: Any) -> Any:
    """This process' parts of all spread tensors in dicts and lists; what else is there as it is."""
    if isinstance(value, Mapping):
        return {k: local(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(local(v) for v in value)
    part = getattr(value, "to_local", None)
    return value if part is None else part()


def spread(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `local`: parts as tensors spread as those of the same name are."""
    return {name: _spread(value, like[name]) for name, value in values.items()}


def spread_state(state: Any, parameters: Sequence[Tensor]) -> Any:
    """Undo `local` for what an optimiser, or one that holds others, keeps of these parameters."""
    if isinstance(state, list):
        return [spread_state(s, parameters) for s in state]
    if not isinstance(state, Mapping):
        return state
    if "param_groups" not in state:
        return {k: spread_state(v, parameters) for k, v in state.items()}
    kept = {
        place: {k: _spread(v, parameters[place]) if _sized(v) else v for k, v in values.items()}
        for place, values in state["state"].items()
    }
    return {**state, "state": kept}


def _sized(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _spread(part: Tensor, like: Tensor) -> Tensor:
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    spread_like: Any = like
    return DTensor.from_local(
        part,
        spread_like.device_mesh,
        spread_like.placements,
        shape=like.shape,
        stride=like.stride(),
    )

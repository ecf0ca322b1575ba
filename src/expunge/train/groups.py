"""Layer groups: a model cut from input to output into parts that are reset or kept whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_groups(model: nn.Module, blocks: Sequence[str] | None = None) -> list[list[str]]:
    """Cut a model's state into groups in order of definition.

    A group is a block, shortcut included, or a layer with weights outside of all blocks; norm layers
    and lone parameters go with what comes before them. Blocks are modules of a class that occurs
    at least twice and holds at least two layers each (residual blocks, transformer layers), the
    outermost ones; a perceptron has none, so its groups are its layers.

    Args:
        model: the model; nothing is run, so order of definition has to be order of use.
        blocks: names of the blocks where they are known.

    Returns:
        Names of parameters and buffers, as in `state_dict`, by group.
    """
    names = _blocks(model) if blocks is None else list(blocks)
    modules = dict(model.named_modules())
    groups: dict[str, list[str]] = {}
    current = ""
    for entry in model.state_dict():
        inside = next((b for b in names if entry.startswith(b + ".")), None)
        owner = entry.rpartition(".")[0]
        if inside is not None:
            current = inside
        elif _weighted(modules.get(owner)):
            current = owner
        groups.setdefault(current, []).append(entry)
    found = list(groups.values())
    # what stands before the first layer, such as a class token, goes with it
    return [found[0] + found[1], *found[2:]] if "" in groups and len(found) > 1 else found


def _blocks(model: nn.Module) -> list[str]:
    layers = {n: sum(map(_weighted, m.modules())) for n, m in model.named_modules()}
    candidates = {
        n: type(m)
        for n, m in model.named_modules()
        if n and layers[n] >= 2 and not isinstance(m, _CONTAINERS) and not _weighted(m)
    }
    often = Counter(candidates.values())
    repeated = [n for n, kind in candidates.items() if often[kind] > 1]
    return [n for n in repeated if not any(n.startswith(other + ".") for other in repeated)]


def _weighted(module: nn.Module | None) -> bool:
    """Whether a module is a layer that transforms: it owns a matrix, unlike a norm layer."""
    if module is None:
        return False
    own = module.parameters(recurse=False)
    return any(p.ndim >= 2 for p in own) and not list(module.children())

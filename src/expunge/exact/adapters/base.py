r"""What slice adapters have in common: maps of weights, in groups that are switched on and off.

A map takes the weights of one module to new ones, \((W, b) \mapsto (W', b')\). The effective weights
of a module are its own with the maps of the *active* groups applied in order of attachment,
\(f_k \circ \dots \circ f_1\), so that a group that is off is skipped, not multiplied by zero, and
merging is writing down what a forward pass would have used.

How a module comes to read them is in `maps.py`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from expunge.core.errors import ModelError, SettingError
from expunge.core.hashing import hash_tensors
from expunge.exact.adapters.maps import (
    HOLDER,
    Map,
    Maps,
    adapt,
    effective,
    holder_of,
    restore_class,
)


class SliceAdapter(Protocol):
    """Hyper-parameters of one kind of map: a frozen dataclass."""

    name: ClassVar[str]
    usage: ClassVar[str]

    def attach(self, model: nn.Module, modules: Sequence[str], group: str, seed: int) -> None:
        """Put untrained maps on the named modules, in place, as a new active group.

        Raises:
            SettingError: the group's name is taken or cannot be one.
            ModelError: there is no such module, or no map of this kind for it.
        """

    def restore(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Map:
        """Make the map of one module from what was stored of it.

        Raises:
            ModelError: the tensors do not belong to such a module.
        """

    def fits(self, module: nn.Module) -> bool:
        """Whether there is a map of this kind for a module."""


def insert(model: nn.Module, group: str, maps: Mapping[str, Map]) -> None:
    """Put maps on modules, in place, as a new active group; the last in order.

    From here on no batch normalisation of the model updates its running statistics.

    Args:
        model: the model.
        group: a new name: letters, digits and `_ - : / @ +`.
        maps: one for each name of a module.

    Raises:
        SettingError: the name is taken or cannot be one.
        ModelError: a module is named twice.
    """
    if not re.fullmatch(r"[\w:/@+-]+", group) or hasattr(Maps(), group):
        raise SettingError(f"{group!r} cannot be the name of a group; use letters and digits")
    if group in groups(model):
        raise SettingError(f"the model has a group {group!r}; choose another name")
    chosen = [model.get_submodule(name) for name in maps]
    if len({id(m) for m in chosen}) < len(chosen):
        raise ModelError("two of the names are of one module, which can take a map once a group")
    place = 1 + max((n for m in _holders(model).values() for n in m.order.values()), default=-1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            adapt(module)
            module.eval()
    for module, one in zip(chosen, maps.values(), strict=True):
        adapt(module)
        holder = holder_of(module)
        if holder is None:
            holder = Maps().train(module.training)
            module.add_module(HOLDER, holder)
        holder.add_module(group, one.train(module.training))
        holder.order[group] = place
        holder.active |= {group}


def named(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Module]:
    """Find modules by name.

    Raises:
        ModelError: there is none of a name.
        SettingError: no name is given.
    """
    if not modules:
        raise SettingError("no module is named for the adapter to act on")
    known = dict(model.named_modules(remove_duplicate=False))
    missing = [n for n in modules if n not in known]
    if missing:
        raise ModelError(f"the model has no module {missing[0]!r}; is it the one adapted?")
    return {name: known[name] for name in modules}


def fitting(model: nn.Module, adapter: SliceAdapter, skip: Collection[str] = ()) -> list[str]:
    """Name all modules that an adapter can act on.

    Args:
        model: the model.
        adapter: says what it fits.
        skip: modules to leave out with all inside them, such as the head.
    """
    out = tuple(f"{name}." for name in skip)
    return [
        name
        for name, module in model.named_modules()
        if adapter.fits(module) and not f"{name}.".startswith(out) and f".{HOLDER}." not in name
    ]


def groups(model: nn.Module) -> list[str]:
    """Name the model's groups in order of attachment."""
    order: dict[str, int] = {}
    for maps in _holders(model).values():
        order |= maps.order
    return sorted(order, key=lambda group: order[group])


def active(model: nn.Module) -> list[str]:
    """Name the groups that act, in order of attachment."""
    on = {g for maps in _holders(model).values() for g in maps.active}
    return [g for g in groups(model) if g in on]


def maps_of(model: nn.Module, group: str) -> dict[str, Map]:
    """Return the maps of one group by the name of their module.

    Raises:
        SettingError: the model has no such group.
    """
    _check(model, [group])
    return {
        name: maps._modules[group]  # type: ignore[misc]
        for name, maps in _holders(model).items()
        if group in maps.order
    }


def parameters(model: nn.Module, group: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one group by their names in the model.

    Raises:
        SettingError: the model has no such group.
    """
    own = {id(p) for one in maps_of(model, group).values() for p in one.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) in own}


def count(model: nn.Module, group: str) -> int:
    """Count the numbers that train in one group."""
    return sum(p.numel() for p in parameters(model, group).values())


def state(model: nn.Module, group: str) -> dict[str, Tensor]:
    """Return what is stored of one group: tensors on the CPU, named `module.tensor`.

    Raises:
        SettingError: the model has no such group.
    """
    found = maps_of(model, group)
    return {f"{name}.{n}": t for name, one in found.items() for n, t in one.stored().items()}


def load(
    model: nn.Module,
    adapter: SliceAdapter,
    modules: Sequence[str],
    group: str,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put a stored group back on a model, in place, as its last group.

    Args:
        model: with the base weights the group was trained on.
        adapter: the hyper-parameters it had.
        modules: the modules it acted on.
        group: its name on this model.
        tensors: from `state`.

    Raises:
        ModelError: a tensor is missing, left over, or does not fit.
        SettingError: the group's name is taken.
    """
    found = named(model, modules)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in found}
    for key, tensor in tensors.items():
        # names of a map's tensors have no dots
        name, _, last = key.rpartition(".")
        if name not in parts:
            raise ModelError(f"the group {group!r} holds {key!r}, which is of none of its modules")
        parts[name][last] = tensor
    insert(model, group, {n: adapter.restore(m, parts[n]) for n, m in found.items()})


def fill(one: Map, tensors: Mapping[str, Tensor]) -> Map:
    """Copy stored tensors into a map made for a module.

    Raises:
        ModelError: a tensor is missing, left over, or of another shape.
    """
    wanted = {n: tuple(t.shape) for n, t in one.state_dict().items()}
    given = {n: tuple(t.shape) for n, t in tensors.items()}
    if wanted != given:
        raise ModelError(f"stored tensors {given} do not fit the module, which takes {wanted}")
    one.load_state_dict(dict(tensors))
    return one


def activate(model: nn.Module, chosen: Collection[str]) -> None:
    """Let exactly these groups act.

    Raises:
        SettingError: the model has no group of a name; nothing was switched.
    """
    _check(model, chosen)
    for maps in _holders(model).values():
        maps.active = frozenset(maps.order) & frozenset(chosen)


def train_only(model: nn.Module, group: str, also: Collection[str] = ()) -> None:
    """Let one group train, and nothing else but what is named.

    Args:
        model: the model.
        group: an active group.
        also: names of parameters, or of modules with all in them, such as the head.

    Raises:
        SettingError: the model has no such group or parameter, or the group is switched off.
    """
    own = parameters(model, group)
    if group not in active(model):
        raise SettingError(f"the group {group!r} is off and would not train; activate it first")
    # a tied weight answers to all its names
    base = {
        n: p
        for n, p in model.named_parameters(remove_duplicate=False)
        if f".{HOLDER}." not in f".{n}"
    }
    inside = {a: [p for n, p in base.items() if n == a or n.startswith(f"{a}.")] for a in also}
    empty = [a for a, found in inside.items() if not found]
    if empty:
        raise SettingError(f"the model has no parameter {empty[0]!r} to train beside the group")
    moving = {id(p) for found in (own.values(), *inside.values()) for p in found}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in moving)


def merged(model: nn.Module) -> nn.Module:
    """Copy a model with its active maps written into the weights; see `merge`."""
    return merge(copy.deepcopy(model))


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Write the active maps of a model into its weights in place, and take all groups off.

    What is left is the architecture it came from, whose weights may all train. A weight that two
    modules share is written for each of them, so they no longer share it if a map of one acts on it.

    Returns:
        The model.
    """
    for module in model.modules():
        if holder_of(module) is None:
            continue
        for name, value in list(module._parameters.items()):
            new = effective(module, name)
            if new is not None and new is not value:
                module._parameters[name] = nn.Parameter(new.detach().clone())
    return remove(model)


def remove(model: nn.Module) -> nn.Module:
    """Take all groups off a model in place; it is the base again, to the bit. Its weights may train."""
    for module in list(model.modules()):
        restore_class(module)
    return model.requires_grad_(True)


def base_hash(model: nn.Module) -> str:
    """Hash the model's own weights and buffers, without its groups: what `hash_model` gives of the base."""
    own = {n: t for n, t in model.state_dict().items() if f".{HOLDER}." not in f".{n}"}
    return hash_tensors({n: t for n, t in own.items() if isinstance(t, Tensor)})


def by_name(spec: str) -> SliceAdapter:
    """Make an adapter from its name: `lora(8)`, `scale-shift`, `tucker(4,4,2,2)`, `sparse(0.2)`.

    Raises:
        SettingError: there is none of this name, or its numbers are out of range.
    """
    from expunge.exact.adapters import ADAPTERS

    match = re.fullmatch(r"([a-z-]+)(?:\(([^()]*)\))?", spec.strip())
    if match is None or match[1] not in ADAPTERS:
        raise SettingError(f"{spec!r} is no adapter; use {', '.join(ADAPTERS)}")
    given = [part.strip() for part in match[2].split(",")] if match[2] else []
    try:
        return ADAPTERS[match[1]].of(given)
    except (ValueError, TypeError) as error:
        raise SettingError(f"{spec!r} is no adapter; use {ADAPTERS[match[1]].usage}") from error


def _holders(model: nn.Module) -> dict[str, Maps]:
    found = {name: holder_of(module) for name, module in model.named_modules()}
    return {name: maps for name, maps in found.items() if maps is not None}


def _check(model: nn.Module, chosen: Collection[str]) -> None:
    known = groups(model)
    missing = sorted(set(chosen) - set(known))
    if missing:
        raise SettingError(
            f"the model has no group {missing[0]!r}; it has {', '.join(known) or 'none'}"
        )

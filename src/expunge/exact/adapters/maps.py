r"""Maps of a module's weights, and the class that lets a module read them instead of its own.

The module keeps its own weights under their own names. Its class becomes a subclass in which reading
`weight` or `bias` gives the effective tensor; forward passes, `torch.func.functional_call`,
`copy.deepcopy`, pickling and state dicts work as before, with the maps' tensors as further entries.
(With `torch.nn.utils.parametrize` the names of the base weights would change, and a layer without
bias could not get one.) Base weights are in `named_parameters()`; `module.weight` and `get_parameter`
see the effective ones. Nothing is kept between two forward passes; serve `merged(model)`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

HOLDER = "slice_maps"
"""Name of the submodule that holds an adapted module's maps."""


class Map(nn.Module):
    """A map of one module's weights. Its parameters are what trains."""

    def change(self, name: str, value: Tensor | None) -> Tensor | None:
        """Give the new value of the module's own parameter `name`; None stands for none."""
        return value

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors to keep, by name."""
        return {n: t.detach().cpu().clone().contiguous() for n, t in self.state_dict().items()}


class Maps(nn.Module):
    """All maps of one module by group, in order of attachment."""

    def __init__(self) -> None:
        super().__init__()
        self.order: dict[str, int] = {}
        self.active: frozenset[str] = frozenset()

    def held(self, until: str | None = None) -> Iterator[Map]:
        """Yield the maps that act, those before the group `until` if one is named."""
        for group in self.order:
            if group == until:
                return
            if group in self.active:
                yield self._modules[group]  # type: ignore[misc]


class _Adapted:
    """Mixed into the class of an adapted module; see `_adapted`."""

    _plain: ClassVar[type[nn.Module]]
    _names: ClassVar[tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, since this one has no name to import."""
        state = super().__reduce_ex__(protocol)[2]
        return _blank, (self._plain, self._names), state

    def train(self, mode: bool = True) -> Any:
        """Switch to training mode, except normalisation: its running statistics are frozen too."""
        still = isinstance(self, nn.modules.batchnorm._NormBase)
        return self._plain.train(self, mode and not still)  # type: ignore[type-var]


@functools.cache
def _adapted(plain: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Make the subclass in which the parameters `names` read as their effective values."""

    def reader(name: str) -> property:
        def read(module: nn.Module) -> Tensor | None:
            try:
                return effective(module, name)
            except AttributeError as error:
                # nn.Module would go on and find the base weight
                raise RuntimeError(f"a map of {name} failed: {error}") from error

        return property(read)

    space = {n: reader(n) for n in names} | {"_plain": plain, "_names": names}
    return type(f"Adapted{plain.__name__}", (_Adapted, plain), space)


def _blank(plain: Any, names: tuple[str, ...]) -> nn.Module:
    kind: Any = _adapted(plain, names)
    return kind.__new__(kind)


def effective(module: nn.Module, name: str, until: str | None = None) -> Tensor | None:
    """Apply the active maps of a module to its own parameter.

    Args:
        module: adapted or not.
        name: of the parameter, such as `weight`.
        until: stop before this group.

    Returns:
        The parameter itself if no map acts; None if there is none.
    """
    value = module._parameters[name]
    maps = holder_of(module)
    if maps is None:
        return value
    found: Tensor | None = value
    for one in maps.held(until):
        found = one.change(name, found)
    return found


def holder_of(module: nn.Module) -> Maps | None:
    """Return the maps on a module, if there are any."""
    found = module._modules.get(HOLDER)
    return found if isinstance(found, Maps) else None


def adapt(module: nn.Module) -> None:
    """Give a module the class that reads its maps."""
    if not isinstance(module, _Adapted):
        plain: Any = type(module)
        module.__class__ = _adapted(plain, tuple(module._parameters))


def restore_class(module: nn.Module) -> None:
    """Take a module's maps off and give it the class it had."""
    module._modules.pop(HOLDER, None)
    if isinstance(module, _Adapted):
        plain: Any = module._plain
        module.__class__ = plain

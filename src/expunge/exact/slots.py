"""Where the adapters of each slice sit, and which parameters are the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from expunge.core.errors import NeedsError, SettingError
from expunge.core.problem import Problem
from expunge.core.pruned import kept_of
from expunge.exact.adapters import by_name, fitting
from expunge.exact.settings import WHOLE, Settings


@dataclass(frozen=True)
class Slots:
    """Modules and head.

    Attributes:
        modules: of the adapters of stage 1, 2, …; empty for whole models.
        head: names of the parameters that train in every stage and are stored with each.
    """

    modules: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {"modules": [list(m) for m in self.modules], "head": list(self.head)}

    @classmethod
    def read(cls, found: dict[str, Any]) -> Slots:
        """Undo `to_dict`."""
        return cls(tuple(tuple(m) for m in found["modules"]), tuple(found["head"]))


def slots_of(problem: Problem, model: nn.Module, settings: Settings) -> Slots:
    """Choose modules and head.

    Top-down, stage k has blocks T−1−((k−1)g+i), i = 0 … g−1, with g = ⌊T/L⌋: the first slice trains those
    nearest the output. A network without a list of blocks has its linear and convolution layers for blocks.

    Args:
        problem: knows the roles `blocks` and `last layer`.
        model: what the adapters go on.
        settings: adapter, slices, blocks, layers, head.

    Returns:
        The slots; none for whole models.

    Raises:
        SettingError: there are fewer blocks than slices, or nothing in a block that the adapter fits, the
            last layer has no weights, or the adapter would fill what was pruned.
        NeedsError: the head is asked for and no module is known as it.
    """
    if settings.adapter == WHOLE:
        return Slots((), ())
    adapter = by_name(settings.adapter)
    last = _last(problem, settings)
    head = tuple(n for n, _ in model.named_parameters() if any(n.startswith(f"{m}.") for m in last))
    if last and not head:
        known = {n for n, _ in model.named_modules()}
        if missing := [m for m in last if m not in known]:
            raise SettingError(
                f"the model has no module {missing[0]!r}, which is named as last layer"
            )
        raise SettingError(
            f"the last layer ({', '.join(last)}) has no weights of its own, as where it shares the "
            "embedding's; use head='none', or name another with roles={'last layer': […]}"
        )
    if kept_of(model) is not None and adapter.name != "scale-shift":
        raise SettingError(
            f"the model is pruned, and {settings.adapter} would fill its zeros; use "
            "adapter='scale-shift' or 'whole'"
        )
    fits = [
        n
        for n in fitting(model, adapter, skip=last or _named(problem, "last layer"))
        if not settings.layers or n.endswith(settings.layers)
    ]
    if settings.blocks == "all":
        if not fits:
            raise SettingError(f"the model has no layer that {settings.adapter} fits")
        return Slots((tuple(fits),) * settings.slices, head)
    blocks = _named(problem, "blocks") or [n for n in fits if not list(model.get_submodule(n).children())]  # fmt: skip
    each = len(blocks) // settings.slices
    if not each:
        raise SettingError(
            f"the model has {len(blocks)} blocks, too few for {settings.slices} slices; name them with "
            "roles={'blocks': […]}, or put every slice's adapters in all with blocks='all'"
        )
    modules = []
    for k in range(settings.slices):
        own = [blocks[len(blocks) - 1 - (k * each + i)] for i in range(each)]
        inside = tuple(n for n in fits if any(n == b or n.startswith(f"{b}.") for b in own))
        if not inside:
            raise SettingError(f"{settings.adapter} fits no layer of {', '.join(own)}")
        modules.append(inside)
    return Slots(tuple(modules), head)


def _last(problem: Problem, settings: Settings) -> list[str]:
    if settings.head == "none" or (settings.head == "auto" and problem.kind == "causal-lm"):
        return []
    return problem.role("last layer")


def _named(problem: Problem, role: str) -> list[str]:
    try:
        return problem.role(role)
    except NeedsError:
        return []

"""The `train=` choice: which coordinates may move, as hard masks.

A mask is a dict from parameter name to a bool tensor of its shape, True where training may change
the value. `fit` enforces it after `optimizer.step()`, so weight decay and momentum cannot leak
into frozen coordinates: they stay identical to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.pruned import kept_of
from expunge.core.runtime import Runtime
from expunge.core.view import View

Mask = Mapping[str, Tensor]
CHOICES = (
    "full, last(K), role(NAME), role(NAME, A-B), saliency(Q), sparse(Q), lora(R), lora(R, NAME), "
    "scale_shift() or scale_shift(NAME)"
)


def resolve_mask(spec: str, model: nn.Module, view: View, runtime: Runtime) -> Mask | None:
    """Turn a `train=` setting into a mask for this model; None lets everything move.

    Args:
        spec: `full`; `last(K)`: the last K linear or convolution layers; `role(NAME)`: the modules
            that play a role, with `role(NAME, A-B)` those in blocks A to B, counted from 0; `saliency(Q)`: the share Q of coordinates most salient for the forget
            set; `sparse(Q)`: the share Q of smallest coordinates; `lora(R)`: adapters, `scale_shift()`: a
            scale and a shift a channel, which are on the model already (see `adapters.py`, `scale_shift.py`).
        model: the model to train.
        view: for roles and saliency.
        runtime: counts the gradients that saliency takes.

    Returns:
        The mask, or None.

    Raises:
        SettingError: the setting is none of these.
    """
    kind, argument = parse(spec)
    if kind == "lora" and not any(".lora_" in n for n, _ in model.named_parameters()):
        raise SettingError(f"train={spec!r}: this method cannot train adapters; use a mask or full")
    if kind == "scale_shift" and not any("parametrizations" in n for n, _ in model.named_modules()):
        raise SettingError(f"train={spec!r}: this method cannot train scales; use a mask or full")
    if kind in ("full", "lora", "scale_shift"):  # the latter two have frozen the rest
        return None
    if kind in ("last", "role"):
        return only(model, layers_of(spec, model, view))
    if kind == "sparse":
        return smallest(model, share=float(argument))
    return saliency(model, view, runtime, share=float(argument))


class Roles(Protocol):
    """Knows modules by the role they play: a view, or a problem."""

    def role(self, name: str) -> list[str]:
        """Names of the modules that play a role."""


def layers_of(spec: str, model: nn.Module, roles: Roles) -> list[str]:
    """Names of the modules that `last(K)` or `role(NAME)` speaks of.

    Raises:
        SettingError: there are fewer than K linear or convolution layers, or no blocks A to B.
        NeedsError: nothing plays the role.
    """
    kind, argument = parse(spec)
    if kind == "role":
        name, _, span = argument.partition(",")
        found = roles.role(name.strip())
        return _in_blocks(found, span.strip(), spec, roles) if span else found
    found = [n for n, m in model.named_modules() if isinstance(m, _WEIGHTED)]
    count = int(argument)
    if len(found) < count:
        have = f"{len(found)} linear or convolution layer{'s' if len(found) != 1 else ''}"
        raise SettingError(f"{spec}: the model has {have}; name modules by role(NAME), or use full")
    return found[-count:]


def _in_blocks(modules: list[str], span: str, spec: str, roles: Roles) -> list[str]:
    """Those of the named modules that lie in blocks `A-B` or `A`."""
    match, blocks = re.fullmatch(r"(\d+)(?:-(\d+))?", span), roles.role("blocks")
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < len(blocks):
        raise SettingError(
            f"train={spec!r}: blocks are A-B or A, counted from 0, and the model has {len(blocks)}"
        )
    inside = tuple(f"{block}." for block in blocks[first : last + 1])
    return [name for name in modules if name.startswith(inside)]


def parse(spec: str) -> tuple[str, str]:
    """Split `name(argument)` and check both.

    Raises:
        SettingError: it is none of the choices, or the argument is out of range.
    """
    kinds = "full|last|role|saliency|sparse|lora|scale_shift"
    match = re.fullmatch(rf"({kinds})(?:\((.*)\))?", spec.strip())
    alone = match is not None and match[1] in ("full", "scale_shift")
    if (
        match is None
        or (not match[2] and not alone)
        or (match[1] == "full" and match[2] is not None)
    ):
        raise SettingError(f"train={spec!r} is not a choice; use {CHOICES}")
    kind, argument = match[1], match[2] or ""
    try:
        bad = (kind in ("last", "lora") and int(argument.partition(",")[0]) < 1) or (
            kind in ("saliency", "sparse") and not 0 < float(argument) <= 1
        )
    except ValueError:
        bad = True
    if bad:
        raise SettingError(
            f"train={spec!r}: K and R are counts from 1, Q a share above 0 and at most 1"
        )
    return kind, argument


def within_pruned(mask: Mask | None, model: nn.Module) -> Mask | None:
    """Intersect a mask with the one the model was pruned to; None lets everything move."""
    kept = kept_of(model)
    if kept is None:
        return mask
    if mask is None:
        mask = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    return {n: m & kept[n].to(m.device) if n in kept else m for n, m in mask.items()}


_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def only(model: nn.Module, modules: list[str]) -> Mask:
    """Let only the parameters of the named modules move.

    Raises:
        SettingError: none of them has a parameter, or one of another module would move with theirs.
    """
    inside = {
        name: any(name == m or name.startswith(m + ".") for m in modules)
        for name, _ in model.named_parameters()
    }
    chosen = _within(model, modules)
    for name, held in owners(model).items():
        mine = [o for o, module in held if id(module) in chosen]
        others = [o for o, module in held if id(module) not in chosen]
        if mine and others and not (inside[name] and name in modules):
            raise SettingError(
                f"{mine[0]} and {others[0]} have one weight between them, so one cannot move without "
                "the other; let both move, or all with full"
            )
        inside[name] = inside[name] or bool(mine)
    if not any(inside.values()):
        raise SettingError(
            f"no weight may move: the model has no parameter in {', '.join(modules) or 'a linear or convolution layer'}"
        )
    return {
        name: torch.full_like(p, inside[name], dtype=torch.bool)
        for name, p in model.named_parameters()
    }


def refuse_shared(model: nn.Module, layers: list[str]) -> None:
    """Refuse to edit a layer whose weight is that of another module too.

    Raises:
        SettingError: names both modules.
    """
    chosen = {id(m): layer for layer in layers for m in model.get_submodule(layer).modules()}
    for held in owners(model).values():
        mine = next((chosen[id(module)] for _, module in held if id(module) in chosen), None)
        others = [name for name, module in held if chosen.get(id(module), "") != mine]
        if mine is not None and others:
            raise SettingError(
                f"{mine} and {others[0]} have one weight between them, so an edit of one would change "
                "the other; choose other layers"
            )


def owners(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Modules that hold each parameter themselves, by its name in the model."""
    names = {id(p): n for n, p in model.named_parameters()}
    held: dict[str, list[tuple[str, nn.Module]]] = {n: [] for n in names.values()}
    for name, module in model.named_modules():
        for own in module.parameters(recurse=False):
            held[names[id(own)]].append((name, module))
    return held


def _within(model: nn.Module, modules: list[str]) -> set[int]:
    """Identities of the named modules and all inside them."""
    known = dict(model.named_modules(remove_duplicate=False))
    return {id(m) for name in modules if name in known for m in known[name].modules()}


def saliency(
    model: nn.Module, view: View, runtime: Runtime, *, share: float, batch_size: int = 128
) -> Mask:
    r"""The coordinates most salient for the forget set (Fan et al. 2024, SalUn).

    \(G = |\sum_b \nabla_\theta \mathrm{mean}_b L|\) over batches of the forget set in eval mode at
    the given weights; the mask holds the share of largest \(G\) over all parameters together,
    exactly `floor(share · P)` of them (ties broken by position).

    Args:
        model: the model at \(\theta_0\); left as it was.
        view: gives the forget set with labels.
        runtime: counts gradient evaluations.
        share: \(0 < q \le 1\).
        batch_size: the sum of batch means depends on it.

    Returns:
        The mask.

    Raises:
        SettingError: the share is so small that no weight is left to move.
    """
    model.eval()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for batch in view.forget.batches(batch_size):
        loss = batch.mean(view.each_loss(model, batch))
        gradients = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
        for name, gradient in zip(moving, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient / batch.processes
        runtime.cost.gradients += len(batch)
    scores = {n: runtime.sum(t).abs() for n, t in total.items()}
    return _first(
        scores, int(share * sum(t.numel() for t in scores.values())), f"saliency({share:g})"
    )


@torch.no_grad()
def smallest(model: nn.Module, *, share: float) -> Mask:
    r"""The coordinates of smallest \(|\theta|\), which hardly act (Hu et al. 2024, SaRA).

    Over all parameters together, exactly `floor(share · P)` of the P weights that the model was not
    pruned of (ties broken by position). Biases and fresh norms are zeros, so nearly all are chosen.

    Args:
        model: the model at \(\theta_0\).
        share: \(0 < q \le 1\).

    Returns:
        The mask.

    Raises:
        SettingError: the share is so small that no weight is left to move.
    """
    kept = kept_of(model) or {}
    scores = {n: -p.float().abs() for n, p in model.named_parameters()}
    for name, mask in kept.items():
        scores[name] = scores[name].masked_fill(~mask.to(scores[name].device), -torch.inf)
    free = sum(int(kept[n].sum()) if n in kept else t.numel() for n, t in scores.items())
    return _first(scores, int(share * free), f"sparse({share:g})")


def _first(scores: Mapping[str, Tensor], count: int, spec: str) -> Mask:
    """The coordinates of the largest scores of all tensors together, ties broken by position."""
    flat = torch.cat([t.reshape(-1) for t in scores.values()])
    if not count:
        raise SettingError(f"no weight may move: {spec} of {len(flat)} is less than one")
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([t.numel() for t in scores.values()])
    return {n: part.view_as(t) for (n, t), part in zip(scores.items(), parts, strict=True)}

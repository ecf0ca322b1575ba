r"""ModHiFi-P for transformers: feed-forward neurons, and whole attention heads, by their fidelity.

The second feed-forward matrix reads neurons, \(Y_c = \sum_i W_{ci} h_i\) at each token, which is what
the paper decomposes. The output projection of attention reads heads, \(Y_c = \sum_h w_{ch}^T x_h\):
the same with a group of inputs in place of one, an addition that the paper leaves out. Works on what
has the modules of `lm_roles`: Llama, GPT-2 and ViT among others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import NeedsError
from expunge.curvature.fidelity import (
    Contributions,
    Counted,
    Score,
    by_output,
    contributions,
    contributions_of,
    keep_inputs,
)
from expunge.problems.lm_roles import lm_roles
from expunge.train.hifi_prune import best, check_share
from expunge.train.masks import refuse_shared

NEURONS, HEADS = "mlp out", "attention out"
_FUSED = ("gate_up_proj",)
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens [B, T] of a batch of sequences are no padding."""
    return batch.x["attention_mask"].bool()


@torch.no_grad()
def transformer_fidelity(
    model: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
    counted: Counted | None = None,
) -> dict[str, Contributions]:
    """What neurons and heads contribute in each block, over one stream of samples.

    Args:
        model: a transformer in eval mode.
        batches: samples; no labels are looked at.
        forward: runs the model on a batch.
        counted: `real_tokens` for padded sequences.

    Returns:
        By layer, in order of depth: of neurons [D, I] for feed-forward outputs, of heads [D, H] for
        attention outputs. `channels()` of them is a score a neuron or head, 0 … 1.

    Raises:
        NeedsError: the model has no such layers.
    """
    sizes = _layers(model, neurons=True, heads=True)
    found = contributions_of(model, list(sizes), batches, forward, counted)
    return {
        layer: c if sizes[layer] == 1 else c.grouped(sizes[layer]) for layer, c in found.items()
    }


@torch.inference_mode()
def prune_transformer(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    forward: Callable[[Batch], Any],
    *,
    neurons: float = 1.0,
    heads: float = 1.0,
    score: Score = "energy",
    compensate: bool = True,
    counted: Counted | None = None,
) -> dict[str, Tensor]:
    """Prune neurons and heads in place; their weights become 0, and those kept are rescaled.

    Layers are taken input to output, each measured on the model as pruned so far. Where there are
    fewer tokens than neurons, scales fit the samples and little else: give some times more.

    Args:
        model: a transformer in eval mode; edited in place.
        batches: gives the samples, once a layer.
        forward: runs the model on a batch.
        neurons: share of each block's feed-forward neurons that stays; 1 leaves them alone.
        heads: share of each block's attention heads that stays.
        score: how fidelities for all outputs become one number.
        compensate: rescale what stays.
        counted: `real_tokens` for padded sequences.

    Returns:
        Positions of the kept neurons or heads, ascending, by layer that was pruned.

    Raises:
        SettingError: a share is out of range, or a weight is that of another module too.
        NeedsError: the model has no such layers.
    """
    check_share("neurons", neurons)
    check_share("heads", heads)
    sizes = _layers(model, neurons=neurons < 1, heads=heads < 1)
    refuse_shared(model, list(sizes))
    kept = {}
    for layer, size in sizes.items():
        found = contributions(model, layer, batches(), forward, counted)
        found = found if size == 1 else found.grouped(size)
        kept[layer] = best(found, neurons if size == 1 else heads, score)
        keep_inputs(model.get_submodule(layer), found, kept[layer], compensate)
    return kept


def take_out(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """Copy a model without the neurons that pruning left at 0: the same outputs from fewer weights.

    Args:
        model: a pruned transformer.
        kept: positions of the kept neurons by feed-forward output, from `prune_transformer`; heads in
            it stay masked, since the keys and values they read may be those of several.

    Returns:
        The smaller model. Where all blocks keep as many neurons its configuration says so, and it can
        be saved and read again.

    Raises:
        NeedsError: the layer before holds two matrices in one.
    """
    model = copy.deepcopy(model)
    roles, left = lm_roles(model), set()
    for layer in roles.get(NEURONS, []):
        places = kept.get(layer)
        if places is None:
            left.add(by_output(model.get_submodule(layer)).shape[1])
            continue
        parent = layer.rpartition(".")[0]
        before = [n for n in roles.get("mlp in", []) if n.rpartition(".")[0] == parent]
        if not before or before[0].endswith(_FUSED):
            raise NeedsError(f"neurons cannot be taken out before {layer!r}; leave them masked")
        for name in before:
            _narrow(model.get_submodule(name), places, outputs=True)
        _narrow(model.get_submodule(layer), places, outputs=False)
        left.add(len(places))
    config = getattr(model, "config", None)
    for name in _WIDTHS:
        if len(left) == 1 and hasattr(config, name):
            setattr(config, name, left.pop())
            break
    return model


def _layers(model: nn.Module, *, neurons: bool, heads: bool) -> dict[str, int]:
    """Layers to score, input to output, and how many inputs are one component: 1, or a head's."""
    roles = lm_roles(model)
    sizes = dict.fromkeys(roles.get(NEURONS, []), 1) if neurons else {}
    for layer in roles.get(HEADS, []) if heads else []:
        inputs = by_output(model.get_submodule(layer)).shape[1]
        count = getattr(getattr(model, "config", None), "num_attention_heads", None)
        if not isinstance(count, int) or inputs % count:
            raise NeedsError(
                f"how many heads {layer!r} reads is not known; its model's config does not say"
            )
        sizes[layer] = inputs // count
    if (neurons or heads) and not sizes:
        raise NeedsError("no feed-forward or attention output is known in this model; prune layers by name with prune_inputs")  # fmt: skip
    return {name: sizes[name] for name, _ in model.named_modules() if name in sizes}


def _narrow(module: nn.Module, places: Tensor, *, outputs: bool) -> None:
    """Leave only some outputs, with their bias, or some inputs of a linear layer, in place."""
    linear = isinstance(module, nn.Linear)
    assert isinstance(module.weight, nn.Parameter)
    places = places.to(module.weight.device)
    # GPT-2 has inputs first
    weight = module.weight.detach().index_select(0 if outputs == linear else 1, places).clone()
    module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    bias = module.bias
    if outputs and isinstance(bias, nn.Parameter):
        module.bias = nn.Parameter(bias.detach()[places].clone(), requires_grad=bias.requires_grad)
    width = (
        ("out_features" if outputs else "in_features") if linear else ("nf" if outputs else "nx")
    )
    setattr(module, width, len(places))

r"""ModHiFi-P: keep the inputs of a layer that reproduce its output best, and rescale them.

For each layer the k inputs with the largest singleton fidelity stay, weights of the others become 0,
and kept ones are rescaled in closed form, \(W_{ci} \leftarrow \delta^*_{ci} W_{ci}\). Forward passes on any
samples of the right distribution are all it takes.

Channels are masked, not taken out: where a residual stream shares them, other layers go on reading
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import SettingError
from expunge.curvature.fidelity import Contributions, Score, contributions


@torch.inference_mode()
def prune_inputs(
    model: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Batch],
    forward: Callable[[Batch], Any],
    *,
    keep: float,
    score: Score = "energy",
    compensate: bool = True,
) -> dict[str, Tensor]:
    """Prune the inputs of some layers in place.

    Args:
        model: in eval mode; edited in place.
        layers: names of linear or ungrouped 2-D convolution layers.
        batches: samples, read once; no labels are looked at.
        forward: runs the model on a batch.
        keep: share of each layer's inputs that stays, above 0 and at most 1.
        score: how fidelities of one input for all outputs become one number.
        compensate: rescale what stays. Without it a selection by fidelity can be worse than a
            random one, since inputs with a large mean have high fidelity.

    Returns:
        Positions of the kept inputs, ascending, by layer.

    Raises:
        SettingError: the share is out of range.
    """
    if not 0 < keep <= 1:
        raise SettingError(f"the share of inputs to keep must be above 0 and at most 1, not {keep}")
    kept = {}
    for layer, found in contributions(model, layers, batches, forward).items():
        scores = found.channels(score)
        count = max(1, round(keep * len(scores)))
        kept[layer] = scores.argsort(descending=True, stable=True)[:count].sort().values
        keep_inputs(model.get_submodule(layer), found, kept[layer], compensate)
    return kept


@torch.no_grad()
def keep_inputs(
    module: nn.Module, found: Contributions, kept: Tensor, compensate: bool = True
) -> None:
    """Set the weights of all but some inputs to 0, in place, and rescale those of the rest.

    Args:
        module: the layer `found` was measured on.
        found: its contributions.
        kept: positions [k] of the inputs that stay.
        compensate: rescale.
    """
    new = torch.zeros_like(found.weight)
    for output in range(len(new)):
        scales: Tensor | float = 1.0
        if compensate:
            scales = found.fidelity(output, kept)[1][:, None].to(new.dtype)
        new[output, kept] = found.weight[output, kept] * scales
    assert isinstance(module.weight, Tensor)
    module.weight.copy_(new.reshape(module.weight.shape))

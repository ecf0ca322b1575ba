r"""ModHiFi-P: keep the inputs of a layer that reproduce its output best, and rescale them.

In each layer the k inputs with the largest singleton fidelity stay, the weights of the others become
0, and kept ones are rescaled in closed form. Forward passes on any samples of the right distribution
are all it takes. Layers are taken in the order given, each measured on the network as pruned so far.

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
from expunge.curvature.fidelity import Contributions, Score, contributions, keep_inputs
from expunge.train.masks import refuse_shared


@torch.inference_mode()
def prune_inputs(
    model: nn.Module,
    layers: Sequence[str],
    batches: Callable[[], Iterable[Batch]],
    forward: Callable[[Batch], Any],
    *,
    keep: float,
    score: Score = "energy",
    compensate: bool = True,
) -> dict[str, Tensor]:
    """Prune the inputs of some layers in place.

    Args:
        model: in eval mode; edited in place.
        layers: names of linear or ungrouped 2-D convolution layers, input to output.
        batches: gives the samples, once a layer; no labels are looked at.
        forward: runs the model on a batch.
        keep: share of each layer's inputs that stays, above 0 and at most 1.
        score: how fidelities of one input for all outputs become one number.
        compensate: rescale what stays. Without it a selection by fidelity can be worse than a
            random one, since inputs with a large mean have high fidelity.

    Returns:
        Positions of the kept inputs, ascending, by layer.

    Raises:
        SettingError: the share is out of range, or a layer's weight is that of another module too.
    """
    check_share("inputs", keep)
    known = dict(model.named_modules())
    refuse_shared(model, [layer for layer in layers if layer in known])
    kept = {}
    for layer in layers:
        found = contributions(model, layer, batches(), forward)
        kept[layer] = best(found, keep, score)
        keep_inputs(model.get_submodule(layer), found, kept[layer], compensate)
    return kept


def best(found: Contributions, keep: float, score: Score) -> Tensor:
    """Positions, ascending, of a share of the inputs (at least one) with the largest scores."""
    scores = found.channels(score)
    order = scores.argsort(descending=True, stable=True)
    return order[: max(1, round(keep * len(scores)))].sort().values


def check_share(what: str, keep: float) -> None:
    """Refuse what is no share.

    Raises:
        SettingError: it is not above 0 and at most 1.
    """
    if not 0 < keep <= 1:
        raise SettingError(f"the share of {what} to keep must be above 0 and at most 1, not {keep}")

r"""KLoM: per sample, the divergence of the margins of unlearned models from those of retrained ones.

With margins \(\varphi\) of N unlearned models and of M oracles (retrained without the forget data) on x, both
clipped to [−100, 100] and counted in 20 equal bins over the range of their union:

\[ \mathrm{KLoM}(x) = \sum_{p_U > 0} p_U \ln \frac{p_U}{\max(p_O, 10^{-5})}. \]

In nats, direction KL(unlearned ‖ oracle), 0 for equal histograms and at most \(\ln 10^5 = 11.5\). Even
independent oracles are not at 0: the floor depends on the numbers of models and belongs beside the value.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expunge.core.errors import DataError
from expunge.train.losses import margin_each

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Definition:
    """What a KLoM value means; several codes differ, so it is stored with every number.

    Attributes:
        bins: equal bins over the range of both samples together.
        epsilon: floor of an oracle's frequency.
        clip: largest size of a margin.
        direction: which distribution is averaged over.
    """

    bins: int = 20
    epsilon: float = 1e-5
    clip: float = 100.0
    direction: str = "KL(unlearned || oracle)"


DEFINITION = Definition()


def margins(logits: Tensor, labels: Tensor) -> Array:
    """Margins [K, n] of the labels [n] from logits [K, n, C] of K models."""
    models, samples, _ = logits.shape
    each = margin_each(logits.flatten(0, 1).double(), labels.repeat(models))
    return each.reshape(models, samples).numpy()


def klom(unlearned: Array, oracles: Array, definition: Definition = DEFINITION) -> Array:
    """KLoM [n] of each sample.

    Args:
        unlearned: margins [N, n] of unlearned models, one row a model.
        oracles: margins [M, n] of retrained models.
        definition: bins, floor and clipping.

    Returns:
        Values in nats, from 0 to ln(1/ε).

    Raises:
        DataError: there is no model, the samples differ in number, or a margin is NaN.
    """
    if unlearned.ndim != 2 or oracles.ndim != 2 or unlearned.shape[1] != oracles.shape[1]:
        raise DataError("KLoM takes margins [models, samples] of the same samples")
    if not len(unlearned) or not len(oracles):
        raise DataError("KLoM needs at least one unlearned model and one oracle")
    if np.isnan(unlearned).any() or np.isnan(oracles).any():
        raise DataError("a margin is NaN; is a model broken?")
    u, o = (np.clip(m, -definition.clip, definition.clip) for m in (unlearned, oracles))
    low = np.minimum(u.min(0), o.min(0))
    high = np.maximum(u.max(0), o.max(0))
    p_u, p_o = (_frequencies(m, low, high, definition.bins) for m in (u, o))
    ratio = np.where(p_u > 0, p_u, 1.0) / np.maximum(p_o, definition.epsilon)
    return (p_u * np.log(ratio)).sum(0)


def summary(unlearned: Array, oracles: Array, others: Array | None = None) -> dict[str, Any]:
    """Mean and 95th percentile over samples, with the definition and the floor.

    Args:
        unlearned: margins [N, n] of unlearned models.
        oracles: margins [M, n] of retrained models.
        others: margins [L, n] of further retrained models, independent of `oracles`, for the floor.

    Returns:
        `mean`, `p95`, `floor_mean` and `floor_p95` (None without `others`), the numbers of models,
        and the definition.
    """
    values = klom(unlearned, oracles)
    floor = None if others is None else klom(others, oracles)
    return {
        "mean": float(values.mean()),
        "p95": float(np.percentile(values, 95)),
        "floor_mean": None if floor is None else float(floor.mean()),
        "floor_p95": None if floor is None else float(np.percentile(floor, 95)),
        "unlearned": len(unlearned),
        "oracles": len(oracles),
        "definition": asdict(DEFINITION),
    }


def _frequencies(values: Array, low: Array, high: Array, bins: int) -> Array:
    """Share [bins, n] of the models in each bin; the largest value falls into the last one."""
    width = np.where(high > low, high - low, 1.0)  # all equal: one bin holds them all
    number = np.minimum(np.floor((values - low) / width * bins).astype(int), bins - 1)
    counts: Array = (number[None] == np.arange(bins)[:, None, None]).sum(1).astype(float)
    return counts / len(values)

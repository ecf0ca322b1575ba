"""What the original network sees before its last layer, read once and kept by sample id."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.core.errors import ExpungeError
from expunge.core.view import View


@dataclass(frozen=True)
class Features:
    """Features by sample.

    Attributes:
        ids: of the samples, ascending [N].
        values: [N, d], float32 on CPU.
    """

    ids: Tensor
    values: Tensor

    def of(self, ids: Tensor) -> Tensor:
        """Features of some samples, in their order."""
        return self.values[torch.searchsorted(self.ids, ids.cpu())]


@torch.no_grad()
def original_features(view: View, batch_size: int = 256) -> Features:
    """Penultimate features of the original on all training data; no label is read.

    Raises:
        ExpungeError: they are not finite.
    """
    model, everything = view.original(), view.everything
    values = torch.cat([
        view.penultimate(model, batch).float().cpu() for batch in everything.batches(batch_size)
    ])
    if not bool(values.isfinite().all()):
        raise ExpungeError("the original's features are NaN or infinite on the training data")
    return Features(everything.ids, values)

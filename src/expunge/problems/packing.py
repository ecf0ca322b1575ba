"""Packing: the sequences of a batch end to end in one row, so that no time goes into padding.

A token attends to the earlier tokens of its own sequence alone, and each sequence counts its
positions from 0, so the numbers are those of the padded batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.core.errors import ModelError
from expunge.train.token_losses import IGNORED


def packed_logits(model: nn.Module, x: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, T, V] of a padded batch, from one row without padding; 0 at padding.

    Args:
        model: of transformers; takes `position_ids`.
        x: `input_ids` and `attention_mask` [B, T], padded on the right.
    """
    real = x["attention_mask"].bool()
    found = _in_one_row(model, x)
    places = real.nonzero(as_tuple=True)
    return found.new_zeros(*real.shape, found.shape[-1]).index_put(places, found)


def packed_nll(model: nn.Module, x: Mapping[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `token_nll` has it, from one row without padding; logits are made at answers alone.

    Args:
        model: of transformers; takes `position_ids` and `logits_to_keep`.
        x: as in `packed_logits`.
        labels: [B, T].
    """
    following = labels[:, 1:]
    mask = following != IGNORED
    real = x["attention_mask"].bool()
    asked = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)[real].nonzero()[:, 0]
    each = cross_entropy(
        _in_one_row(model, x, logits_to_keep=asked).float(), following[mask], reduction="none"
    )
    return each.new_zeros(mask.shape).masked_scatter(mask, each), mask


def _in_one_row(model: nn.Module, x: Mapping[str, Tensor], **more: Tensor) -> Tensor:
    real = x["attention_mask"].bool()
    positions = real.nonzero()[:, 1]
    # without a mask, transformers takes positions that begin anew for where a sequence begins
    output = model(
        input_ids=x["input_ids"][real][None], position_ids=positions[None], use_cache=False, **more
    )
    found: Tensor = output.logits[0]
    return found


@torch.no_grad()
def check_packing(model: nn.Module, x: Mapping[str, Tensor], padded: Tensor) -> None:
    """Compare the packed logits of a batch with its padded ones.

    Raises:
        ModelError: the model takes no packed rows, or gives other numbers for them.
    """
    real = x["attention_mask"].bool()
    advice = "leave packing off"
    try:
        found = packed_logits(model, x)[real].float()
    except Exception as error:  # somebody else's model may raise anything
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"the model takes no packed sequences ({line}); {advice}") from error
    wanted = padded[real].float()
    # rounding grows with the size of what is added up
    allowed = torch.finfo(padded.dtype).eps ** 0.5 * max(1.0, float(wanted.abs().max()))
    if float((found - wanted).abs().max()) > allowed:
        raise ModelError(
            "packed sequences see each other in this model: their logits differ from those one by "
            f"one; {advice}"
        )

"""Selective dampening: pick weights by a ratio of importances, and shrink them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.errors import ExpungeError


def adaptive_share(forget: int, total: int) -> float:
    r"""Share of the weights that ASSD selects: \(\ln(1 + 100\,|D_f|/|D|) / 100\), below 0.047."""
    return math.log1p(100 * forget / total) / 100


def adaptive_alpha(part: Mapping[str, Tensor], whole: Mapping[str, Tensor], share: float) -> float:
    """Threshold above which a share of the finite ratios `part / whole` lies; 0/0 and x/0 drop out.

    It is an order statistic: `round(share · n)` of n ratios (at least one) exceed it unless they
    tie. If all above tie with it, it steps down to the next ratio, since the strict comparison would
    select nothing.

    Raises:
        ExpungeError: there are no ratios to choose from.
    """
    ratios = torch.cat([(part[n] / whole[n]).reshape(-1) for n in part])
    ratios = ratios[ratios.isfinite()]
    if len(ratios) < 2:
        raise ExpungeError("SSD: the loss has no gradient on the data, so nothing is important")
    above = min(max(1, round(share * len(ratios))), len(ratios) - 1)
    rank = len(ratios) - above - 1
    # torch.quantile stops at 16 million values; torch.kthvalue takes minutes on some orders of them
    alpha = float(np.partition(ratios.cpu().numpy(), rank)[rank])
    below = ratios[ratios < alpha]
    if not bool((ratios > alpha).any()) and len(below):
        alpha = float(below.max())
    return alpha


@torch.no_grad()
def dampen(
    model: nn.Module,
    part: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    alpha: float,
    lam: float,
) -> dict[str, int]:
    r"""Multiply weights with \(I^f > \alpha I^D\) by \(\min(\lambda I^D / I^f, 1)\), in place.

    Returns the number of selected weights by parameter name. Where \(I^D = 0 < I^f\) the weight
    becomes 0; parameters without importances stay.
    """
    selected = {}
    for name, p in model.named_parameters():
        if name in part:
            of_part, of_whole = part[name], whole[name]
            chosen = of_part > alpha * of_whole
            # where: an infinite λ times an importance of 0 would be NaN
            factor = torch.where(of_whole > 0, lam * of_whole, 0.0).div_(of_part).clamp_(max=1.0)
            # whole tensors: reading and writing scattered places takes several times as long
            p.copy_(torch.where(chosen, factor.mul_(p), p))
            selected[name] = int(chosen.sum())
    return selected

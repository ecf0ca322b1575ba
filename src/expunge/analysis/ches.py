r"""CHES: will preferring y⁺ over y⁻ make y⁺ itself less likely?

With h the vector that is multiplied by the output embeddings, and the sums over the positions that predict
an answer's tokens,

\[
S^\pm = \sum_{k=1}^{|y^\pm|} h_{x,\, y^\pm_{<k}}, \qquad
\mathrm{CHES} = \langle S^+, S^- \rangle - \|S^+\|^2, \qquad
\mathrm{lnCHES} = \frac{\langle S^+, S^- \rangle}{|y^+||y^-|} - \frac{\|S^+\|^2}{|y^+|^2}
\]

High is similar, and similar is dangerous: the margin grows while both answers lose probability to a third
(Razin et al., Unintentional Unalignment, 2025, arXiv 2410.08847). Of answers of one token every CHES is 0;
such pairs are told apart by their rows of the output embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.problems.taps import penultimate
from expunge.train.token_losses import IGNORED, targets

Score = Literal["ln-ches", "ches", "edit", "last"]


@dataclass(frozen=True)
class Sums:
    """What the scores need of one answer each.

    Attributes:
        total: S [B, d], in float32 at least.
        count: |y| [B], whole numbers.
        last: state [B, d] at the answer's last token, which predicts what follows it.
    """

    total: Tensor
    count: Tensor
    last: Tensor


def sums(states: Tensor, labels: Tensor) -> Sums:
    """Sums of states over the answered tokens' predictions, whatever the padding and its side.

    Args:
        states: [B, T, d], after the final norm.
        labels: [B, T], `IGNORED` where a token is not answered.
    """
    wide = states if states.dtype == torch.float64 else states.float()
    _, mask = targets(labels)
    total = (wide[:, :-1] * mask[:, :, None]).sum(1)
    places = torch.arange(labels.shape[1], device=labels.device)
    ends = torch.where(labels != IGNORED, places, 0).amax(1)
    return Sums(total, mask.sum(1), wide[torch.arange(len(wide), device=ends.device), ends])


def states_of(model: nn.Module, last: str, forward: Callable[[nn.Module], Any]) -> Tensor:
    """The input [B, T, d] of the output embeddings: behind the final norm in every architecture.

    Args:
        model: a language model.
        last: name of the module that gives the logits, its role `last layer`.
        forward: runs the model once, over all positions.
    """
    return penultimate(model, last, forward, flat=False)


def ches(preferred: Sums, rejected: Sums) -> Tensor:
    r"""\(\langle S^+, S^- \rangle - \|S^+\|^2\) [B]; NaN where an answer has no token."""
    return _nowhere_empty(_score(preferred.total, rejected.total), preferred, rejected)


def ln_ches(preferred: Sums, rejected: Sums) -> Tensor:
    """The same [B] of means in place of sums: for answers of different lengths."""
    means = [s.total / s.count[:, None].clamp(min=1) for s in (preferred, rejected)]
    return _nowhere_empty(_score(*means), preferred, rejected)


def last_product(preferred: Sums, rejected: Sums) -> Tensor:
    r"""Baseline: \(\langle h_{x,y^+}, h_{x,y^-} \rangle\) [B] of the states at the answers' ends."""
    return _nowhere_empty((preferred.last * rejected.last).sum(1), preferred, rejected)


def edit_similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """Baseline: −(Levenshtein distance of two token sequences) / (the longer one's length), −1 … 0."""
    if not len(a) or not len(b):
        return math.nan
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return -row[-1] / max(len(a), len(b))


SCORES: tuple[Score, ...] = ("ln-ches", "ches", "edit", "last")
_OF_SUMS: dict[Score, Callable[[Sums, Sums], Tensor]] = {
    "ln-ches": ln_ches,
    "ches": ches,
    "last": last_product,
}


def score(name: Score, states: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Tensor:
    """One score [B] of pairs, NaN where an answer has no token.

    Args:
        name: which.
        states: of the preferred and of the rejected answers, [B, T, d] each; T may differ.
        labels: [B, T] each.
    """
    if name == "edit":
        words = [[y[y != IGNORED].tolist() for y in part[:, 1:]] for part in labels]
        each = [edit_similarity(a, b) for a, b in zip(*words, strict=True)]
        return torch.tensor(each, dtype=torch.float64)
    plus, minus = (sums(s, y) for s, y in zip(states, labels, strict=True))
    return _OF_SUMS[name](plus, minus)


def lowest(scores: Tensor, share: float) -> Tensor:
    """Places, ascending, of the share of scores [n] that is lowest: at least one, and all if it is 1.

    Of equal ones the first go first, and NaN last, so that a smaller share is part of a larger one.

    Raises:
        SettingError: the share is not within 0 … 1.
    """
    if not 0 <= share <= 1:
        raise SettingError(f"a share of pairs lies within 0 … 1, not at {share:g}")
    order = scores.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).argsort(stable=True)
    count = min(max(math.ceil(share * len(scores) - 1e-9), 1), len(scores))
    return order[:count].sort().values


def single_token_rate(
    weights: Tensor, state: Tensor, preferred: int, rejected: int, speed: float = 1.0
) -> Tensor:
    r"""How fast \(\log \pi(y^+)\) moves where answers are single tokens; exact.

    \[
    a\,\Big[\big\langle W_+ - \textstyle\sum_v \pi_v W_v,\; W_+ - W_- \big\rangle + (1 - \pi_+ + \pi_-)\,\|h\|^2\Big]
    \]

    under gradient flow of a loss of \(z_+ - z_-\), with \(z = W h\) and both W and h trained.

    Args:
        weights: W [V, d], the output embeddings.
        state: h [d].
        preferred: token +.
        rejected: token −.
        speed: a, minus the derivative of the loss.

    Returns:
        A scalar in nats a unit of time; below 0 the preferred token loses.
    """
    p = (weights @ state).softmax(0)
    apart = weights[preferred] - weights[rejected]
    moved = (weights[preferred] - p @ weights) @ apart
    return speed * (moved + (1 - p[preferred] + p[rejected]) * state.square().sum())


def unembedding_similarity(weights: Tensor, preferred: int, rejected: int) -> float:
    r"""\(\cos(W_+, W_-)\): what tells pairs of single tokens apart, for which CHES is 0."""
    a, b = weights[[preferred, rejected]].detach().double()
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _score(plus: Tensor, minus: Tensor) -> Tensor:
    # ⟨S⁺, S⁻ − S⁺⟩, so that equal answers give 0 to the bit
    return (plus * (minus - plus)).sum(1)


def _nowhere_empty(score: Tensor, *parts: Sums) -> Tensor:
    for part in parts:
        score = torch.where(part.count > 0, score, math.nan)
    return score

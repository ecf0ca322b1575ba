r"""A gate in front of a language model: does a prompt belong to what is to be forgotten?

\[ p(x) = \sigma\Big(b + \sum_{g \in G(x)} w_g\Big) \]

over the set \(G\) of a prompt's tokens and of its pairs of neighbouring tokens. Its threshold can be
conformal: of prompts like those it was calibrated on, at least a share \(1 - \alpha\) get a set of labels
that holds the true one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag

from expunge.core.data import look_up
from expunge.core.errors import DataError

Ambiguous = Literal["pass", "flag"]
_FIRST, _SECOND = 6364136223846793005, 1442695040888963407


def grams(prompt: Tensor) -> Tensor:
    """Keys int64 of the tokens of a prompt [T] and of its neighbouring pairs, each once."""
    ids = prompt.long().cpu()
    pairs = (ids[:-1] + 1) * _FIRST + (ids[1:] + 1) * _SECOND  # wraps around, as a hash may
    return torch.cat([ids, pairs]).unique()


@dataclass(frozen=True)
class Gate:
    """Logistic regression on the grams of a prompt.

    Attributes:
        keys: known grams, int64 [G], ascending; others count nothing.
        weights: float32 [G].
        bias: b.
    """

    keys: Tensor
    weights: Tensor
    bias: float

    def probability(self, prompt: Tensor) -> float:
        """P that a prompt [T] belongs to what is to be forgotten."""
        found = grams(prompt)
        places, known = look_up(self.keys, found)
        return float((self.weights[places[known]].double().sum() + self.bias).sigmoid())


def fit_gate(prompts: Sequence[Tensor], flagged: Tensor, *, decay: float = 1e-4) -> Gate:
    r"""Fit a gate: cross-entropy with classes weighed alike, and \(\frac\lambda2 |w|^2\).

    Args:
        prompts: token ids of each.
        flagged: bool [N]; both kinds occur.
        decay: λ.

    Returns:
        The gate; the same for the same prompts in the same order.
    """
    found = [grams(p) for p in prompts]
    keys, places = torch.cat(found).unique(return_inverse=True)
    starts = torch.tensor([0, *map(len, found)]).cumsum(0)[:-1]
    share = flagged.double().mean()
    weight = torch.where(flagged, 0.5 / share, 0.5 / (1 - share))
    w = torch.zeros(len(keys), 1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = embedding_bag(places, w, starts, mode="sum")[:, 0] + bias
        loss = binary_cross_entropy_with_logits(logits, flagged.double(), weight)
        loss = loss + decay / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Gate(keys, w.detach()[:, 0].float(), float(bias.detach()))


def quantile(scores: Tensor, alpha: float) -> float:
    r"""The \(\lceil (n+1)(1-\alpha) \rceil\)-th smallest of scores [n]; infinite if there are too few."""
    rank = max(1, math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9))
    return float(scores.sort().values[rank - 1]) if rank <= len(scores) else math.inf


def label_set(probability: float, limit: float) -> tuple[bool, bool]:
    """Whether the conformal set of a prompt holds `forget`, and whether it holds `retain`.

    Args:
        probability: p of `forget`.
        limit: from `quantile`.
    """
    return 1 - probability <= limit, probability <= limit


def flags(probability: float, limit: float, ambiguous: Ambiguous) -> bool:
    """Whether a prompt is flagged: its set is `forget` alone, or, where it is none or both, as said."""
    forget, retain = label_set(probability, limit)
    return ambiguous == "flag" if forget == retain else forget


def calibrated_gate(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    drawn: torch.Generator,
    *,
    share: float,
    alpha: float,
    threshold: float | None,
    ambiguous: Ambiguous,
) -> tuple[Gate, dict[str, Any]]:
    """Fit a gate on one part of the prompts and calibrate it on the other.

    Args:
        forget: prompts to flag.
        retain: prompts to let through.
        drawn: says which are held out.
        share: of each side that is held out.
        alpha: share of prompts whose label the gate may miss.
        threshold: flag above this p instead; None is conformal.
        ambiguous: what happens where the gate is not sure.

    Returns:
        The gate and its facts: `calibrated_on` prompts, the conformal `limit` (None: infinite), and
        `flagged_of_forget` and `flagged_of_retain`, shares of those held out.

    Raises:
        DataError: too few prompts are held out for α.
    """
    parts: list[tuple[Tensor, bool, bool]] = []
    for prompts, flagged in ((forget, True), (retain, False)):
        held = min(round(share * len(prompts)), len(prompts) - 1)
        order = torch.randperm(len(prompts), generator=drawn).tolist()
        parts += [(prompts[p], flagged, n < held) for n, p in enumerate(order)]
    learned = [(p, flagged) for p, flagged, held in parts if not held]
    gate = fit_gate([p for p, _ in learned], torch.tensor([flagged for _, flagged in learned]))
    known = [(gate.probability(p), flagged) for p, flagged, held in parts if held]
    scores = torch.tensor([1 - p if flagged else p for p, flagged in known], dtype=torch.float64)
    limit = quantile(scores, alpha)
    if threshold is None and limit == math.inf:
        raise DataError(
            f"{len(scores)} prompts cannot calibrate a gate to alpha={alpha:g}; at least "
            f"{-int(-1 // alpha) - 1} can, or pass threshold="
        )
    said = [p > threshold if threshold is not None else flags(p, limit, ambiguous) for p, _ in known]  # fmt: skip
    rate = lambda kind: [s for s, (_, f) in zip(said, known, strict=True) if f == kind]  # noqa: E731
    return gate, {
        "calibrated_on": len(known),
        "limit": None if limit == math.inf else limit,
        "flagged_of_forget": sum(rate(True)) / max(len(rate(True)), 1),
        "flagged_of_retain": sum(rate(False)) / max(len(rate(False)), 1),
    }

"""What becomes of preferred and rejected answers in training, and which tokens gain instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from expunge.core.data import Batch
from expunge.core.runtime import Runtime
from expunge.train.token_losses import IGNORED

MOST = 5
"""Tokens that gained most, in the details."""


def moved(lost: Tensor, won: Tensor, there: Tensor, runtime: Runtime) -> dict[str, float]:
    r"""Mean change of \(\log \pi\) against the original in nats, and how often the margin is won.

    Args:
        lost: \(N_l - N^\circ_l\) [B] of the answers to forget.
        won: \(N_w - N^\circ_w\) [B] of the preferred ones.
        there: whether there is a preferred one [B].
        runtime: other processes with other samples.

    Returns:
        `forget`, `alternate` (of what is there; both fall where it is below 0) and `margin_accuracy`.
    """
    ahead = (lost > won) & there
    parts = (-lost.sum(), -(won * there).sum(), ahead.sum(), there.sum(), torch.tensor(len(lost)))
    total = torch.stack([p.to(lost.device).double() for p in parts])
    forget, alternate, right, pairs, count = runtime.sum(total).tolist()
    return {
        "forget": forget / max(count, 1),
        "alternate": alternate / max(pairs, 1),
        "margin_accuracy": right / max(pairs, 1),
    }


def begins(batch: Batch) -> Tensor:
    """Positions [B] of the tokens that predict the first one of each answer."""
    assert batch.y is not None
    return (batch.y[:, 1:] != IGNORED).int().argmax(1)


def first_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over a batch of the probabilities [V] of each token to begin an answer."""
    places = begins(batch)
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, places].float().softmax(-1).sum(0)


def first_tokens(batches: Iterable[Batch]) -> set[int]:
    """Tokens that answers of batches begin with."""
    found: set[int] = set()
    for batch in batches:
        assert batch.y is not None
        found |= set(batch.y.gather(1, begins(batch)[:, None] + 1)[:, 0].tolist())
    return found


def winners(gain: Tensor, known: Mapping[str, set[int]]) -> list[dict[str, Any]]:
    """The tokens that gained most of a gain [V] in probability, and whose answers begin with them.

    Args:
        gain: of each token.
        known: first tokens by what they belong to; other tokens are of `neither`.
    """
    best = gain.topk(min(MOST, len(gain)))
    return [
        {"token": t, "gain": g, "of": next((n for n, ids in known.items() if t in ids), "neither")}
        for g, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if g > 0
    ]


def alarm(change: float) -> str | None:
    """A line where the preferred answers' mean change in nats is a loss."""
    if not change < 0:
        return None
    return (
        f"the preferred answers lost {-change:.3g} nats: probability went to others; keep= leaves out "
        "the pairs most alike, sft= holds the preferred answers up"
    )

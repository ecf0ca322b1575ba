r"""Segments of texts, such as secrets, and whether a model says them word for word.

Of a segment s of L tokens behind a prefix p,

\[
\mathrm{MA} = \tfrac1L \sum_t 1[\arg\max p(\cdot \mid p, s_{<t}) = s_t], \qquad
\mathrm{EL}_n = \tfrac1{L-n+1} \sum_{j=0}^{L-n} \mathrm{overlap}_n(\hat s_j, s_{\ge j})
\]

with \(\hat s_j\) the greedy continuation of \(p + s_{<j}\) by \(L - j\) tokens and \(\mathrm{overlap}_n(a, b)\)
the n-grams of a that occur in b over those of b. Where \(L < n\), EL is 1 if all of s is said from p, else 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.problems.tokens import Tokens, pad
from expunge.train.token_losses import answered, targets

PREFIX, LONGEST, WHOLE = 128, 32, 128
"""Tokens of a prefix, of a sensitive segment, and of an answer that is a segment as a whole, at most."""
ORDERS = (3, 5, 10)
"""The n of the n-grams."""


def segments(
    row: Tokens,
    ends: Collection[int] = (),
    *,
    prefix: int = PREFIX,
    longest: int = LONGEST,
    whole: int = WHOLE,
) -> list[Tokens]:
    """Sensitive spans of a sequence, each behind what stands before it.

    Args:
        row: where no answered token is marked, its answer is the one segment, without the end of the text.
        ends: token ids that end a text.
        prefix: most tokens before a segment.
        longest: most tokens of a marked segment; what is beyond is left out.
        whole: the same where nothing is marked.

    Returns:
        Sequences in which the segment is what is answered. The first token of a text cannot be
        predicted and is never in a segment.
    """
    wanted, most = sensitive(row), longest
    if wanted is None:
        stops = torch.tensor(list(ends), dtype=torch.long)
        wanted, most = row.answered & ~torch.isin(row.ids, stops), whole
    wanted = wanted.clone()
    wanted[0] = False
    edges = torch.diff(wanted.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
    found = []
    for start, end in zip(
        (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True
    ):
        first, last = max(0, start - prefix), min(end, start + most)
        found.append(Tokens(row.ids[first:last], torch.arange(first, last) >= start))
    return found


def sensitive(row: Tokens) -> Tensor | None:
    """Answered tokens [T] of a sequence that are marked and can be predicted; None if there are none."""
    if row.marked is None:
        return None
    found = row.marked & row.answered
    return found if bool(found[1:].any()) else None


@torch.no_grad()
def accuracies(
    token_logits: Callable[[nn.Module, Batch], Tensor],
    model: nn.Module,
    rows: Sequence[Tokens],
    *,
    size: int,
    device: str,
) -> list[float]:
    """MA of each segment, from one pass over all of its tokens; NaN where the model gives no number.

    Args:
        token_logits: gives logits [B, T, V].
        model: in eval mode.
        rows: from `segments`.
        size: rows at a time.
        device: where the model is.
    """
    found: list[float] = []
    for start in range(0, len(rows), size):
        x, y = pad(rows[start : start + size], 0)
        batch = Batch(x, y, torch.arange(len(y)), len(y)).to(device)
        assert batch.y is not None
        logits = answered(token_logits(model, batch), batch.y)
        tokens, mask = targets(batch.y)
        right = (logits.argmax(-1) == tokens[mask]).double()
        right[~logits.isfinite().any(-1)] = torch.nan
        found += [float(part.mean()) for part in right.cpu().split(mask.sum(1).tolist())]
    return found


def extraction(
    generate: Callable[..., list[Tensor]],
    model: nn.Module,
    rows: Sequence[Tokens],
    *,
    orders: Sequence[int] = ORDERS,
    size: int = 16,
) -> list[dict[int, float]]:
    """EL of each segment by n; prompts are padded on the left, and all j of all segments share batches.

    Args:
        generate: `CausalLM.generate`.
        model: the model.
        rows: from `segments`.
        orders: the n.
        size: prompts at a time.
    """
    # continuations of one length go together, so that none is longer than it has to be
    asked: dict[int, list[tuple[int, int, Tensor]]] = {}
    for number, row in enumerate(rows):
        length = int(row.answered.sum())
        for j in range(max(1, length - min(orders) + 1)):
            prompt = row.ids[: len(row) - length + j]
            asked.setdefault(length - j, []).append((number, j, prompt))
    said: dict[tuple[int, int], Tensor] = {}
    for tokens, some in asked.items():
        new = generate(model, [p for _, _, p in some], tokens=tokens, batch_size=size)
        said |= {(n, j): text for (n, j, _), text in zip(some, new, strict=True)}
    found: list[dict[int, float]] = []
    for number, row in enumerate(rows):
        segment, values = row.answer, {}
        for n in orders:
            if len(segment) < n:
                values[n] = float(torch.equal(said[number, 0], segment))
                continue
            starts = range(len(segment) - n + 1)
            each = [overlap(said[number, j], segment[j:], n) for j in starts]
            values[n] = sum(each) / len(each)
        found.append(values)
    return found


def overlap(said: Tensor, wanted: Tensor, n: int) -> float:
    """Share of n-grams: those of `said` [a] that occur in `wanted` [b], over the b − n + 1 of `wanted`."""
    there = set(_grams(wanted, n))
    counted = sum(count for gram, count in _grams(said, n).items() if gram in there)
    return counted / (len(wanted) - n + 1)


def _grams(ids: Tensor, n: int) -> Counter[tuple[int, ...]]:
    words = ids.tolist()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

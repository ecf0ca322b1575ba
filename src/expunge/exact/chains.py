"""Prefixes of sequences: the trie that chains share, and which of them are alive. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from expunge.exact.sequences import Order


def prefixes(sequences: Iterable[Order]) -> list[Order]:
    r"""Every distinct non-empty prefix, shortest first: the stages that have to be trained.

    L cyclic sequences have L² of them, all L! sequences \(\sum_k L!/(L-k)!\) in place of L·L!.
    """
    found = {sequence[:k] for sequence in sequences for k in range(1, len(sequence) + 1)}
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def live(sequence: Order, dead: Collection[int]) -> Order:
    """The longest prefix none of whose slices is dead; empty if its first one is."""
    for k, piece in enumerate(sequence):
        if piece in dead:
            return sequence[:k]
    return sequence


def serving(
    sequences: Sequence[Order],
    dead: Collection[int],
    scores: Mapping[Order, Sequence[float]] | None = None,
) -> Order | None:
    """The prefix a shard serves: the longest live one.

    Args:
        sequences: of the shard.
        dead: slices that something was deleted from.
        scores: validation scores by prefix, compared in order; they decide between equally long
            ones, and without them the first sequence goes first.

    Returns:
        The prefix, or None if the shard is dead.
    """
    best: Order | None = None
    for sequence in sequences:
        prefix = live(sequence, dead)
        if not prefix or (best is not None and len(prefix) < len(best)):
            continue
        better = best is None or len(prefix) > len(best)
        if better or (scores and tuple(scores.get(prefix, ())) > tuple(scores.get(best or (), ()))):
            best = prefix
    return best


def firsts(sequences: Iterable[Order], dead: Collection[int]) -> int:
    """Distinct first slices that are alive: the shard dies when it has lost all of them."""
    return len({sequence[0] for sequence in sequences} - set(dead))

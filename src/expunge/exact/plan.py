"""What a deletion does to a sharded model, before and without doing it. Pure functions.

Nothing here knows tensors or files: a model is its shards' sequences, the slices that something was
deleted from, and how many samples are left in each slice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from expunge.core.hashing import plain
from expunge.exact.chains import firsts, live, prefixes, serving
from expunge.exact.lifetime import remaining
from expunge.exact.sequences import Order


@dataclass(frozen=True)
class Shard:
    """One shard of the live model.

    Attributes:
        sequences: orders its slices were learned in.
        counts: samples of each slice that are not deleted.
        dead: slices that something was deleted from since their stages were trained.
        scores: validation scores of the stages by prefix, which decide ties.
        seconds: what training the shard took.
    """

    sequences: tuple[Order, ...]
    counts: tuple[int, ...]
    dead: frozenset[int] = frozenset()
    scores: Mapping[Order, Sequence[float]] = field(default_factory=dict)
    seconds: float = 0.0

    @functools.cached_property
    def served(self) -> Order | None:
        """Slices of the prefix that is served, in order; None if the shard is dead."""
        return serving(self.sequences, self.dead, self.scores)

    @functools.cached_property
    def firsts(self) -> int:
        """First slices still alive."""
        return firsts(self.sequences, self.dead)

    @functools.cached_property
    def usable(self) -> tuple[Order, ...]:
        """Prefixes that saw nothing deleted."""
        return tuple(p for p in prefixes(self.sequences) if self.dead.isdisjoint(p))

    @property
    def live(self) -> int:
        """Different non-empty live prefixes of the sequences."""
        return len({live(sequence, self.dead) for sequence in self.sequences} - {()})

    @property
    def used(self) -> int:
        """Samples behind the prefix that is served."""
        return sum(self.counts[piece] for piece in self.served or ())

    def without(self, hits: Mapping[int, int]) -> Shard:
        """The shard after some samples of some slices (numbers by slice) were deleted."""
        counts = tuple(n - hits.get(piece, 0) for piece, n in enumerate(self.counts))
        return replace(self, counts=counts, dead=self.dead | {j for j, n in hits.items() if n})


State = tuple[Shard, ...]


def remaining_of(state: State) -> float:
    """Expected number of further uniform requests until no shard is alive."""
    return remaining(sum(len(s.counts) for s in state), sum(s.firsts for s in state))


@dataclass(frozen=True)
class Plan:
    """What deleting some samples would do.

    Attributes:
        ids: samples that would be deleted now.
        already: asked for, and deleted before; nothing is left to do for them.
        unknown: asked for, and in neither the manifest nor the data.
        outside: in the data, but no part of what the model was trained on.
        hits: slices that samples are deleted from, by shard.
        off: by shard, the stages switched off, each by the slices it had learned, in order.
        served: by shard that is hit, slices of the prefix served before and after; None is none.
        dies: shards that leave the ensemble.
        collateral: samples that nobody asked to delete and that the served model no longer uses.
        remaining: expected further uniform requests until no shard is alive, afterwards.
        remaining_before: the same now.
        shards_left: shards in the ensemble afterwards.
        seconds: expected training time before all shards serve again; 0 while prefixes live.
    """

    ids: tuple[int, ...]
    already: tuple[int | str, ...] = ()
    unknown: tuple[int | str, ...] = ()
    outside: tuple[int | str, ...] = ()
    hits: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    off: Mapping[int, tuple[Order, ...]] = field(default_factory=dict)
    served: Mapping[int, tuple[Order | None, Order | None]] = field(default_factory=dict)
    dies: tuple[int, ...] = ()
    collateral: int = 0
    remaining: float = 0.0
    remaining_before: float = 0.0
    shards_left: int = 0
    seconds: float = 0.0

    @property
    def stops(self) -> bool:
        """Whether no shard is left to serve, so that retraining is due."""
        return self.shards_left == 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)} | {"stops": self.stops}

    def __str__(self) -> str:
        """Say the plan in a sentence or two."""
        parts = [f"{_count(len(self.ids), 'sample')} to delete"]
        parts += [f"{len(v)} {words}" for v, words in (
            (self.already, "deleted before"), (self.unknown, "unknown"),
            (self.outside, "outside the model's data"),
        ) if v]  # fmt: skip
        off = sum(map(len, self.off.values()))
        parts.append(f"{_count(off, 'stage')} switched off in {_count(len(self.off), 'shard')}")
        parts.append(f"{_count(self.collateral, 'other sample')} no longer used")
        if self.dies:
            parts.append(f"shard {', '.join(map(str, self.dies))} leaves the ensemble")
        end = "retraining is due" if self.stops else f"about {self.remaining:.0f} more requests"
        return f"{'; '.join(parts)}; {end}."


def plan(
    state: State, located: Mapping[int, Mapping[int, Sequence[int]]], **asked: Any
) -> tuple[Plan, State]:
    """Plan a deletion.

    Args:
        state: the shards as they are.
        located: ids to delete by shard and slice; a slice below 0 is of no stage, as of a sample that
            is in no slice.
        **asked: `already`, `unknown` and `outside` of the plan.

    Returns:
        The plan and the shards as they would be.
    """
    after = list(state)
    off, served, dies = {}, {}, []
    collateral, seconds = 0, 0.0
    for shard, by_slice in located.items():
        counts = {j: len(ids) for j, ids in by_slice.items() if j >= 0 and len(ids)}
        if shard < 0 or not counts:
            continue
        old, new = state[shard], state[shard].without(counts)
        after[shard] = new
        gone = tuple(p for p in old.usable if not new.dead.isdisjoint(p))
        if gone:
            off[shard] = gone
        served[shard] = (old.served, new.served)
        left = set(old.served or ()) - set(new.served or ())
        collateral += sum(old.counts[j] - counts.get(j, 0) for j in left)
        if old.served and not new.served:
            dies.append(shard)
            seconds += old.seconds
    found = Plan(
        ids=tuple(sorted(i for by in located.values() for ids in by.values() for i in ids)),
        hits={s: tuple(sorted(j for j in by if j >= 0)) for s, by in located.items() if s >= 0},
        off=off,
        served=served,
        dies=tuple(sorted(dies)),
        collateral=collateral,
        remaining=remaining_of(tuple(after)),
        remaining_before=remaining_of(state),
        shards_left=sum(s.served is not None for s in after),
        seconds=seconds,
        **asked,
    )
    return found, tuple(after)


@dataclass(frozen=True)
class Deleted:
    """A plan that was carried out.

    Attributes:
        plan: what was planned.
        weights_before: hash of the weights served before.
        weights_after: hash of the weights served now.
        manifest: hash of the manifest that names the stages.
        seconds: measured, from the request to the new state on disk.
        changed: whether anything was deleted; False if all had been before.
    """

    plan: Plan
    weights_before: str
    weights_after: str
    manifest: str
    seconds: float
    changed: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "plan"}
        return plain(kept) | {"plan": self.plan.to_dict()}


@dataclass(frozen=True)
class Status:
    """The live model.

    Attributes:
        served: slices of the prefix each shard serves, in order; None where it is dead.
        live: number of different non-empty live prefixes a shard still has, one a sequence at most.
        remaining: expected further uniform requests until no shard is alive.
        deleted: samples deleted so far.
        samples: samples of the manifest that are not deleted.
        collateral: those of them that the served model does not use.
        weights: hash of the weights served.
        manifest: hash of the manifest.
    """

    served: tuple[Order | None, ...]
    live: tuple[int, ...]
    remaining: float
    deleted: int
    samples: int
    collateral: int
    weights: str
    manifest: str

    @property
    def dead(self) -> tuple[int, ...]:
        """Shards that have left the ensemble and wait to be retrained."""
        return tuple(s for s, prefix in enumerate(self.served) if prefix is None)

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)} | {
            "dead": list(self.dead)
        }


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"

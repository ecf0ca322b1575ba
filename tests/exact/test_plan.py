"""exact/plan.py: deletions planned, held against the algorithm of the card carried out literally."""

from __future__ import annotations

import itertools
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.exact.plan import Shard, plan, remaining_of


@st.composite
def models(draw):
    """Shards with random sequences, sizes and scores, and requests on their samples."""
    slices = draw(st.integers(1, 4))
    everything = list(itertools.permutations(range(slices)))
    shards, located = [], []
    for s in range(draw(st.integers(1, 3))):
        rows = draw(st.lists(st.sampled_from(everything), min_size=1, max_size=5, unique=True))
        counts = draw(st.lists(st.integers(1, 5), min_size=slices, max_size=slices))
        shards.append(Shard(tuple(rows), tuple(counts), seconds=10.0 * (s + 1)))
        located += [(s, j, n) for j, count in enumerate(counts) for n in range(count)]
    ids = {place: number for number, place in enumerate(located)}
    asked = draw(st.lists(st.sampled_from(located), max_size=12, unique=True))
    return tuple(shards), ids, asked


def located(places, ids):
    found: dict[int, dict[int, list[int]]] = {}
    for s, j, n in places:
        found.setdefault(s, {}).setdefault(j, []).append(ids[s, j, n])
    return found


class Literal:
    """The card's deletion: for each live sequence p, if j is in p, cut p before it; drop it if empty."""

    def __init__(self, shards):
        self.rows = [[list(row) for row in shard.sequences] for shard in shards]

    def delete(self, shard, piece):
        kept = []
        for row in self.rows[shard]:
            row = row[: row.index(piece)] if piece in row else row
            if row:
                kept.append(row)
        self.rows[shard] = kept


@settings(deadline=None)
@given(models())
def test_planned_is_what_the_card_says_one_by_one(model):
    state, ids, asked = model
    literal = Literal(state)
    for place in asked:
        before = state
        found, state = plan(state, located([place], ids))
        literal.delete(place[0], place[1])
        rows = literal.rows[place[0]]
        longest = max(map(len, rows), default=0)
        served = state[place[0]].served
        assert (len(served) if served else 0) == longest
        assert served is None or list(served) in rows
        assert state[place[0]].firsts == len({row[0] for row in rows})
        assert found.shards_left == sum(bool(r) for r in literal.rows)
        assert found.stops == (not any(literal.rows))
        for s, (old, new) in enumerate(zip(before, state, strict=True)):
            assert s == place[0] or old is new  # other shards are untouched


@settings(deadline=None)
@given(models(), st.randoms())
def test_order_and_batches_of_deletions_do_not_matter(model, random):
    state, ids, asked = model
    _, at_once = plan(state, located(asked, ids))
    random.shuffle(asked)
    one_by_one = state
    for place in asked:
        _, one_by_one = plan(one_by_one, located([place], ids))
    assert one_by_one == at_once


@settings(deadline=None)
@given(models())
def test_collateral_and_cost_are_counted(model):
    state, ids, asked = model
    found, after = plan(state, located(asked, ids))
    lost = {(s, j, n) for (s, j, n) in ids if j in (state[s].served or ())} - {
        (s, j, n) for (s, j, n) in ids if j in (after[s].served or ())
    }
    assert found.ids == tuple(sorted(ids[p] for p in asked))
    assert found.collateral == len(lost - set(asked))
    assert found.seconds == sum(10.0 * (s + 1) for s in found.dies)
    assert found.remaining == remaining_of(after) <= found.remaining_before
    for s, gone in found.off.items():
        assert set(gone) == set(state[s].usable) - set(after[s].usable)
        assert all(any(j in p for j in found.hits[s]) for p in gone)


def shard() -> Shard:
    return Shard(((0, 1, 2, 3), (1, 2, 3, 0)), (10, 10, 10, 10))


def test_s3t_invariant_3_the_last_slice_disables_one_group_and_the_first_kills_the_sequence():
    alone = (Shard(((0, 1, 2, 3),), (10,) * 4), shard())
    found, after = plan(alone, {0: {3: [5]}})
    assert found.off == {0: ((0, 1, 2, 3),)} and found.served[0] == ((0, 1, 2, 3), (0, 1, 2))
    assert found.collateral == 9 and after[1] is alone[1] and found.dies == ()
    found, after = plan(alone, {0: {0: [5]}})
    assert after[0].served is None and found.dies == (0,) and after[1] is alone[1]
    assert not found.stops and found.collateral == 39
    _, after = plan((shard(),), {0: {0: [5]}})
    assert after[0].served == (1, 2, 3)  # the other sequence loses its last slice alone


def test_s3t_invariant_4_a_slice_hit_twice_changes_nothing_the_second_time():
    _, once = plan((shard(),), {0: {2: [5]}})
    found, twice = plan(once, {0: {2: [6]}})
    assert found.off == {} and found.served[0] == (once[0].served,) * 2 and found.collateral == 0
    assert twice[0].served == once[0].served and twice[0].usable == once[0].usable
    assert twice[0].counts == (10, 10, 8, 10)
    found, same = plan(twice, {})
    assert same == twice and found.ids == ()


def test_lifetime_of_a_plan_counts_the_first_slices_left():
    state = (shard(), shard())
    assert math.isclose(remaining_of(state), 8 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    found, _ = plan(state, {0: {1: [1]}})
    assert math.isclose(found.remaining, 8 * (1 + 1 / 2 + 1 / 3))
    words = str(found)
    assert "1 sample to delete" in words and "15 more requests" in words


def test_a_plan_is_json():
    found, _ = plan((shard(),), {0: {0: [7], 1: [9]}}, unknown=(99,), already=(3,))
    as_dict = found.to_dict()
    assert as_dict["ids"] == [7, 9] and as_dict["unknown"] == [99] and as_dict["stops"] is True
    assert as_dict["off"]["0"][0] == [0]
    assert "retraining is due" in str(found)

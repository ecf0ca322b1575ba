"""exact/sequences.py and lifetime.py: orders of slices, and how many deletions they survive."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import SettingError
from expunge.exact import lifetime
from expunge.exact.chains import live, prefixes, serving
from expunge.exact.sequences import (
    choose,
    cyclic,
    distance,
    log_score,
    matching,
    random_orders,
    weighted_orders,
)


def priors(most: int = 6):
    """Different probabilities that add up to 1."""
    parts = st.lists(st.integers(1, 1000), min_size=2, max_size=most, unique=True)
    return parts.map(lambda p: [x / sum(p) for x in p])


# --- invariant 6: what sequences are --------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 7), st.data())
def test_s3t_invariant_6_cyclic_are_different_permutations(slices, data):
    orders = data.draw(st.integers(1, min(40, math.factorial(slices))))
    found = cyclic(slices, orders)
    assert len(set(found)) == len(found) == orders
    assert all(sorted(row) == list(range(slices)) for row in found)
    columns = list(zip(*found[:slices], strict=True))
    assert all(len(set(column)) == min(orders, slices) for column in columns)


@settings(deadline=None, max_examples=40)
@given(priors(), st.floats(1, 200))
def test_s3t_invariant_6_matched_columns_are_permutations_whatever_the_prior(prior, requests):
    found = matching(prior, len(prior), requests)
    assert all(sorted(row) == list(range(len(prior))) for row in found)
    assert all(sorted(c) == list(range(len(prior))) for c in zip(*found, strict=True))


@settings(deadline=None, max_examples=40)
@given(priors())
def test_s3t_invariant_6_the_row_that_starts_with_the_likeliest_slice_is_chosen_last(prior):
    assert matching(prior, len(prior))[-1][0] == int(np.argmax(prior))
    fewer = matching(prior, len(prior) - 1)
    assert fewer == matching(prior, len(prior))[:-1]


def test_the_first_of_many_cyclic_sequences_are_those_of_fewer():
    whole = cyclic(4, 24)
    assert set(whole) == set(itertools.permutations(range(4)))
    for orders in range(1, 25):
        assert cyclic(4, orders) == whole[:orders]
    thirteen = [row[0] for row in cyclic(4, 13)]
    assert sorted(map(thirteen.count, range(4))) == [3, 3, 3, 4]  # spread evenly


def test_the_score_is_the_expected_number_of_layers():
    prior = [0.1, 0.2, 0.3, 0.4]
    plain = sum(n * (1 - sum(prior[:n])) ** 3 for n in range(1, 5))
    assert log_score((0, 1, 2, 3), prior, 3) == pytest.approx(math.log(plain))
    # far beyond where the plain score is 0 in floating point
    assert -1e6 < log_score((3, 2, 1, 0), prior, 1e5) < -700
    assert log_score((0,), [1.0, 0.0], 5) == -math.inf


def test_a_prior_shows_only_in_which_rows_are_kept():
    prior = [0.7, 0.1, 0.1, 0.1]
    assert all(row[0] != 0 for row in matching(prior, 3))
    kept = matching(prior, 2, 10)
    drawn = random_orders(4, 2, np.random.default_rng(0))
    scores = [sum(math.exp(log_score(r, prior, 10)) for r in rows) for rows in (kept, drawn)]
    assert scores[0] >= scores[1]
    assert distance(cyclic(4, 4)) == 4.0 == distance(matching([0.25] * 4, 4))
    assert distance([(0, 1)]) == 0


def test_baselines_are_different_permutations():
    rows = random_orders(3, 6, np.random.default_rng(1))
    assert sorted(rows) == sorted(itertools.permutations(range(3)))
    first = [
        weighted_orders([0.9, 0.05, 0.05], 1, np.random.default_rng(s))[0][0] for s in range(200)
    ]
    assert first.count(0) < 30 < first.count(1)  # 1 − p = .1, .95, .95


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cyclic(3, 7), "between 1 and 6"),
        (lambda: cyclic(0, 1), "at least 1"),
        (lambda: matching([0.5, 0.5], 3), "between 1 and 2"),
        (lambda: matching([0.9, 0.9], 1), "add up to 1"),
        (lambda: choose("zigzag", 3, 1, None, 100), "cyclic or matching"),
        (lambda: choose("cyclic", 2, 1, [0.5, 0.5], 100), "use no prior"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(SettingError, match=words):
        call()


# --- the trie -------------------------------------------------------------------------------------


def test_shared_prefixes_are_trained_once():
    assert len(prefixes(cyclic(4, 4))) == 4 * 4
    everything = list(itertools.permutations(range(4)))
    assert len(prefixes(everything)) == sum(math.factorial(4) // math.factorial(4 - k) for k in range(1, 5))  # fmt: skip
    found = prefixes([(0, 1, 2), (0, 2, 1)])
    assert found == [(0,), (0, 1), (0, 2), (0, 1, 2), (0, 2, 1)]  # a parent before its children
    assert live((2, 0, 1), {0}) == (2,) and live((2, 0, 1), {2}) == ()


def test_equally_long_prefixes_are_told_apart_by_their_score():
    rows = [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    scores = {(0, 1): (0.5, -1.0), (2, 0): (0.5, -0.9), (1, 2): (0.9, 0.0)}
    assert serving(rows, set(), {(1, 2, 0): (1.0,)}) == (1, 2, 0)
    assert serving(rows, {2}, scores) == (0, 1)  # longest, whatever its score
    assert serving([(0, 1, 2), (2, 0, 1)], {1}, scores) == (2, 0)
    assert serving([(0, 1, 2), (2, 1, 0)], {1}) == (0,)  # the first without scores
    assert serving(rows, {0, 1, 2}) is None


# --- invariant 5: lifetimes -----------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "slices", "orders"), [(5, 6, 1), (5, 6, 3), (5, 6, 6), (3, 4, 2), (5, 4, 24)])  # fmt: skip
def test_s3t_invariant_5_simulated_lifetime_is_that_of_the_theory(shards, slices, orders):
    lives = lifetime.simulate(cyclic(slices, orders), shards, 1200, np.random.default_rng(orders))
    error = lives.std(ddof=1) / math.sqrt(len(lives))
    wanted = lifetime.expected(shards, slices, orders)
    assert abs(lives.mean() - wanted) <= 3 * error
    assert error < 0.05 * wanted  # small enough to tell orders apart


def test_theory_of_the_card():
    found = [lifetime.expected(5, 6, b) for b in (1, 2, 3, 6)] + [lifetime.expected(5, 4, 24)]
    assert [round(x, 1) for x in found] == [68.5, 87.9, 99.5, 119.8, 72.0]


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 30))
def test_weighted_lifetime_is_the_plain_one_where_chances_are_equal(first, places):
    places = max(places, first)
    wanted = lifetime.remaining(places, first)
    assert lifetime.weighted([1 / places] * first) == pytest.approx(wanted, rel=1e-6)


def test_weighted_lifetime_is_that_of_draws():
    chances = np.array([0.02, 0.3, 0.1, 0.05])
    generator = np.random.default_rng(0)
    times = generator.exponential(1 / chances, (40000, 4)).max(
        1
    )  # requests come as a Poisson process
    error = times.std() / 200
    assert abs(lifetime.weighted(chances) - times.mean()) <= 3 * error
    assert lifetime.weighted([]) == 0 and lifetime.weighted([0.5, 0.0]) == math.inf


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 4))
def test_survival_is_that_of_draws(first):
    draws = np.random.default_rng(first).integers(12, size=(20000, 15))
    alive = np.array([(~(draws == j).any(1)) for j in range(first)]).any(0).mean()
    error = math.sqrt(max(alive * (1 - alive), 1e-4) / 20000)
    assert abs(lifetime.survival(12, first, 15) - alive) <= 4 * error


def test_survival_does_not_cancel_away_with_many_slices():
    assert lifetime.survival(60, 60, 0) == lifetime.survival(200, 100, 10) == 1.0
    assert lifetime.survival(60, 60, 59) == 1.0 > lifetime.survival(60, 60, 300) > 0.2
    assert 0 < lifetime.survival(60, 60, 900) < 1e-4

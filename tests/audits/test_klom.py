"""KLoM: invariants 5 and 6 of the card dmm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from expunge.audits._klom import DEFINITION, klom, margins, summary
from expunge.core.errors import DataError

CEILING = math.log(1 / DEFINITION.epsilon)


def draws(seed, models=100, samples=7, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, (models, samples))


def test_dmm_invariant_5_equal_samples_have_no_divergence():
    x = draws(0)
    assert np.array_equal(klom(x, x), np.zeros(7))
    assert np.array_equal(klom(np.ones((5, 2)), np.ones((3, 2))), np.zeros(2))  # no spread at all


def test_dmm_invariant_5_the_order_of_models_does_not_matter():
    u, o = draws(0), draws(1, models=60)
    order = np.random.default_rng(2)
    shuffled = klom(order.permutation(u), order.permutation(o))
    np.testing.assert_array_equal(shuffled, klom(u, o))


def test_dmm_invariant_5_rescaling_does_not_matter():
    u, o = draws(0), draws(1, shift=0.7)
    np.testing.assert_allclose(klom(4 * u + 8, 4 * o + 8), klom(u, o), atol=1e-12)


def test_dmm_invariant_5_bounds():
    far = klom(draws(0), draws(1, shift=40.0))
    assert (far <= CEILING).all()
    together = klom(np.zeros((50, 3)), np.full((50, 3), 5.0))  # one bin each, disjoint
    np.testing.assert_allclose(together, CEILING)
    assert (klom(draws(0), draws(1)) > -1e-12).all()
    assert 11.5 < CEILING < 11.52


def test_dmm_invariant_5_the_largest_value_is_in_the_last_bin():
    """Edges that drop it would lose mass: the frequencies of U would not add up to 1."""
    u = np.array([[0.0], [1.0]])
    o = np.array([[0.0], [0.0], [0.0], [1.0]])
    wanted = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    np.testing.assert_allclose(klom(u, o), [wanted])


def test_direction_is_unlearned_from_oracle():
    u = np.zeros((10, 1))
    o = np.concatenate([np.zeros((5, 1)), np.ones((5, 1))])
    np.testing.assert_allclose(klom(u, o), [math.log(2)])
    np.testing.assert_allclose(
        klom(o, u), [0.5 * math.log(0.5) + 0.5 * math.log(0.5 / DEFINITION.epsilon)]
    )


def test_twenty_bins_and_both_sides_clipped():
    """20 values, one a bin: the counts of 19 bins (20 edges) would differ."""
    spread = (np.arange(20.0) / 19)[:, None]
    one = klom(np.zeros((4, 1)), spread)
    np.testing.assert_allclose(one, [math.log(20)])
    huge = klom(np.full((4, 1), 1e9), np.full((4, 1), 1e6))
    np.testing.assert_allclose(huge, [0.0])


def test_dmm_invariant_6_sigmoid_of_the_margin_is_the_probability():
    logits = 5 * torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 4
    phi = torch.from_numpy(margins(logits, labels))
    p = logits.double().softmax(2)[:, torch.arange(8), labels]
    torch.testing.assert_close(phi.sigmoid(), p)
    torch.testing.assert_close(phi, (p / (1 - p)).log())


def test_the_floor_and_the_definition_stand_beside_the_value():
    found = summary(draws(0, shift=1.0), draws(1), draws(2))
    assert 0 < found["floor_mean"] < found["mean"]
    assert found["floor_mean"] <= found["floor_p95"] and found["mean"] <= found["p95"]
    assert found["definition"]["direction"] == "KL(unlearned || oracle)"
    assert found["unlearned"] == found["oracles"] == 100
    assert summary(draws(0), draws(1))["floor_mean"] is None


@pytest.mark.parametrize(
    ("u", "o"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4))),
        (np.zeros((0, 3)), np.zeros((2, 3))),
        (np.full((2, 3), np.nan), np.zeros((2, 3))),
    ],
)
def test_bad_margins_are_refused(u, o):
    with pytest.raises(DataError):
        klom(u, o)

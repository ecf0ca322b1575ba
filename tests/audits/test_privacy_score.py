"""privacy-score: invariants 1 to 3 of the card comparator, and what it says of models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from expunge.audits._worst_case import (
    DELTA,
    attack_scores,
    curve,
    grids,
    null_floor,
    privacy,
    statistics,
)
from expunge.audits.privacy_score import PrivacyScore
from expunge.core.errors import DataError
from expunge.core.runtime import Runtime

GRID = grids(10, 201)
N = 200


def values(seed, n=N, shift=0.0):
    random = np.random.default_rng(seed)
    return {
        "entropy": random.normal(1.2 + shift, 0.4, n),
        "confidence": random.normal(2 + shift, 2, n),
    }


def test_comparator_invariant_1_a_model_is_like_itself():
    same = values(0)
    assert privacy(same, same, GRID).value == 1.0
    assert privacy(same, {k: v[::-1] for k, v in same.items()}, GRID).value == 1.0


@pytest.mark.parametrize("shift", [0.1, 0.7, 3.0])
def test_comparator_invariant_1_the_models_may_swap_roles(shift):
    a, b = values(0), values(1, shift=shift)
    one, other = privacy(a, b, GRID), privacy(b, a, GRID)
    assert one.value == other.value and 0 <= one.value <= 1
    assert one.threshold == other.threshold
    assert {one.above, other.above} == {"model", "reference"}


def test_comparator_invariant_1_separated_values_give_zero():
    a = {"confidence": np.linspace(-2, 0, 50)}
    b = {"confidence": np.linspace(0.7, 3, 60)}
    for pair in ((a, b), (b, a)):
        assert privacy(*pair, {"confidence": GRID["confidence"]}).value == 0.0


def test_comparator_invariant_2_directions_are_linked():
    a, b = values(0), values(1, shift=0.8)
    for name, thresholds in GRID.items():
        one, other = (
            curve(a[name], b[name], thresholds),
            curve(b[name], a[name], thresholds),
        )
        np.testing.assert_allclose(other.fpr, 1 - one.fnr, atol=1e-12)
        np.testing.assert_allclose(other.fnr, 1 - one.fpr, atol=1e-12)
        assert max(one.attack.max(), other.attack.max()) > 0.1
        hopeless = one.fpr + one.fnr >= 1 - DELTA
        assert hopeless.any() and not one.attack[hopeless].any()


def test_comparator_invariant_2_by_hand():
    """FPR .1 and FNR .2: the smaller of ln(.9/.2) and ln(.8/.1), both less δ."""
    found = attack_scores(np.array([0.1, 0.0, 1.0, 0.5]), np.array([0.2, 0.0, 0.0, 0.5]))
    epsilon = math.log((1 - DELTA - 0.1) / 0.2)
    np.testing.assert_allclose(found, [1 - 2**-epsilon, 1.0, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize(("shift", "wanted"), [(0.5, 0.75), (1, 0.58), (2, 0.32), (4, 0.06)])
def test_comparator_invariant_2_shifted_normals(shift, wanted):
    random = np.random.default_rng(3)
    a, b = ({"confidence": random.normal(s, 1, 5000)} for s in (shift, 0))
    found = privacy(a, b, {"confidence": GRID["confidence"]}).value
    assert found == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(
    ("sizes", "mean", "low"),
    [((50, 50), 0.82, 0.71), ((200, 200), 0.90, 0.84), ((1000, 1000), 0.95, 0.93), ((5000, 200), 0.93, 0.89)],
)  # fmt: skip
def test_comparator_invariant_3_the_null_floor_is_below_one(sizes, mean, low):
    found = null_floor(values(0, 20_000), sizes, GRID, np.random.default_rng(1), 200)
    assert found.mean() == pytest.approx(mean, abs=0.03)
    assert np.percentile(found, 5) == pytest.approx(low, abs=0.04)
    assert found.max() < 1


def test_values_outside_the_thresholds_count_at_the_ends():
    a = {"confidence": np.full(20, 50.0)}
    b = {"confidence": np.full(20, -50.0)}
    assert privacy(a, b, {"confidence": GRID["confidence"]}).value == 0.0


def test_thresholds_reach_as_far_as_values_can():
    for classes in (2, 10, 1000):
        flat = statistics(torch.zeros(1, classes))
        for name, thresholds in grids(classes, 51).items():
            assert thresholds[0] <= flat[name][0] <= thresholds[-1] + 1e-9
    assert grids(10, 51)["entropy"][[0, -1]].tolist() == [0.0, 2.5]
    assert grids(10, 51)["confidence"][[0, -1]].tolist() == [-2.5, 10.0]


def test_statistics_by_hand():
    z = torch.tensor([[2.0, 0.0, -1.0]])
    p, warm = z.softmax(1)[0], (z / 2).softmax(1)[0]
    found = statistics(z)
    assert found["entropy"][0] == pytest.approx(float(-(warm * warm.log()).sum()), abs=1e-6)
    assert found["confidence"][0] == pytest.approx(math.log(p[0] / (1 - p[0])), abs=1e-6)


@pytest.mark.parametrize("bad", [np.array([]), np.array([1.0, np.nan])])
def test_bad_values_are_refused(bad):
    with pytest.raises(DataError):
        privacy({"confidence": bad}, {"confidence": np.ones(3)}, {"confidence": GRID["confidence"]})


def models(tables, some_ids, *shifts, n=120):
    """Models of 120 samples to forget whose confidence is shifted; noise of their own."""
    y = torch.arange(n + 20) % 3
    logits = []
    for k, shift in enumerate(shifts):
        z = torch.randn(n + 20, 3, generator=torch.Generator().manual_seed(k))
        z[torch.arange(n + 20), y] += shift
        logits.append(z)
    return tables(y, None, some_ids(n), *logits)


def run(subjects, **settings):
    (found,) = PrivacyScore(**settings).run(subjects[1], subjects[2:], Runtime())
    return found


def test_the_score_falls_with_the_distance_and_has_an_interval(tables, some_ids):
    near, far = (run(models(tables, some_ids, 5, s, 1, 1, 1)) for s in (1.0, 3.0))
    assert near.value > 0.8 > 0.6 > far.value
    assert near.low <= near.value <= near.high and far.high < near.low
    assert near.original < far.value < near.reference
    assert near.direction == "up" and near.detail["null_floor"]["p5"] < 1


def test_the_score_is_the_mean_over_references(tables, some_ids):
    subjects = models(tables, some_ids, 5, 2, 1, 1)
    found = run(subjects)
    grid = grids(3, 201)
    z = [statistics(s.logits("forget-train")) for s in subjects]
    each = [privacy(z[1], z[k], grid).value for k in (2, 3)]
    assert found.value == pytest.approx(np.mean(each)) and found.detail["each"] == each
    assert found.reference == privacy(z[2], z[3], grid).value


def test_the_attack_that_is_named_gives_the_score(tables, some_ids):
    """Comparator invariant 7: the threshold of the worst case reproduces the score."""
    found = run(models(tables, some_ids, 5, 2, 1))
    attack = found.detail["attack"]
    shown = found.detail["curves"][attack["statistic"]]
    at = shown["threshold"].index(attack["threshold"])
    assert 1 - shown[attack["above"]]["attack"][at] == pytest.approx(attack["privacy_score"])
    assert "one reference" in found.reason and found.reference is None


def test_what_cannot_be_scored_says_why(tables, some_ids):
    assert "no retrained reference" in run(models(tables, some_ids, 5, 2)).reason
    assert "only 5 samples" in run(models(tables, some_ids, 5, 2, 1, n=5)).reason
    y = torch.arange(40) % 2
    constant = tables(y, None, some_ids(20), *[torch.zeros(40, 2)] * 3)
    assert "tell nothing" in run(constant).reason
    single = tables(torch.zeros(40).long(), None, some_ids(20), *[torch.randn(40, 1)] * 3)
    assert "one class" in run(single).reason
    broken = models(tables, some_ids, 5, 2, 1)
    broken[1].model.rows.data[0] = math.nan
    assert run(broken).value is None and "NaN" in run(broken).reason

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from expunge.audits._intervals import Z95, auc, auc_interval, mean_interval, two_sided, wilson


@pytest.mark.parametrize(("hits", "total"), [(3, 10), (0, 7), (7, 7), (181, 400), (1, 1)])
def test_wilson_inverts_the_score_test(hits, total):
    # the ends are the shares p0 that a score test at 5 % just does not reject
    share = hits / total
    grid = np.linspace(0, 1, 200_001)
    accepted = grid[(share - grid) ** 2 <= Z95**2 * grid * (1 - grid) / total]
    assert wilson(hits, total) == pytest.approx((accepted.min(), accepted.max()), abs=2e-5)


def test_mean_interval_is_students():
    values = np.random.default_rng(0).exponential(size=9)
    wanted = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx(wanted)
    assert mean_interval(values[:1]) == (values[0], values[0])


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_auc_equals_sklearns_with_ties(levels):
    rng = np.random.default_rng(levels)
    a, b = rng.integers(0, levels, 37) + levels // 4, rng.integers(0, levels, 61)
    wanted = roc_auc_score(np.repeat([1, 0], [37, 61]), np.concatenate([a, b]))
    assert auc(a, b) == pytest.approx(wanted, abs=1e-12)


def test_auc_interval_equals_delong_by_hand():
    a, b = np.array([1.0, 2.0, 2.0, 5.0]), np.array([0.0, 2.0, 3.0])
    pairs = (a[:, None] > b).astype(float) + 0.5 * (a[:, None] == b)
    variance = pairs.mean(1).var(ddof=1) / 4 + pairs.mean(0).var(ddof=1) / 3
    half = Z95 * np.sqrt(variance)
    wanted = max(0.0, pairs.mean() - half), min(1.0, pairs.mean() + half)
    assert auc_interval(a, b) == pytest.approx(wanted)


def test_auc_interval_has_a_width_without_variance():
    ones, zeros = np.ones(30), np.zeros(50)
    assert auc_interval(ones, zeros) == pytest.approx((0.9, 1.0))
    assert auc_interval(zeros, ones[:20]) == pytest.approx((0.0, 0.15))
    assert auc_interval(ones, np.ones(50)) == pytest.approx((0.45, 0.55))


@pytest.mark.parametrize(("n", "m"), [(12, 12), (40, 80), (300, 60)])
def test_interval_covers_one_half_on_exchangeable_scores(n, m):
    rng = np.random.default_rng(n)
    covered = folded = 0
    for _ in range(400):
        scores = rng.standard_normal(n + m)
        value, ends = auc(scores[:n], scores[n:]), auc_interval(scores[:n], scores[n:])
        covered += ends[0] <= 0.5 <= ends[1]
        folded += two_sided(value, *ends)[1] == 0.5
    assert covered >= 0.90 * 400
    assert covered <= 0.99 * 400  # an interval that always covers says nothing
    assert folded == covered


@pytest.mark.parametrize("shift", [0.3, 1.0])
def test_interval_covers_the_true_auc_of_shifted_normals(shift):
    truth = stats.norm.cdf(shift / np.sqrt(2))
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        low, high = auc_interval(rng.normal(shift, 1, 60), rng.normal(0, 1, 90))
        covered += low <= truth <= high
    assert 0.90 * 400 <= covered <= 0.99 * 400


def test_folding_is_symmetric():
    assert two_sided(0.9, 0.8, 0.95) == pytest.approx(two_sided(0.1, 0.05, 0.2))
    assert two_sided(0.9, 0.8, 0.95) == pytest.approx((0.9, 0.8, 0.95))
    assert two_sided(0.55, 0.4, 0.7) == pytest.approx((0.55, 0.5, 0.7))
    assert two_sided(0.45, 0.2, 0.6) == pytest.approx((0.55, 0.5, 0.8))

"""Rates at few false alarms, ROC curves, and AUCs of scores that come in clusters."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.audits._intervals import auc, auc_interval
from expunge.audits._low_fpr import clustered_auc, models_for, roc, too_few, tpr_on, true_alarms


def test_thresholds_let_no_more_non_members_pass_than_asked():
    rng = np.random.default_rng(0)
    outside = rng.normal(size=400)
    rate = true_alarms(np.array([10.0, -10.0, 0.0, 0.1]), outside, 0.01)
    assert rate.value == 0.5 and rate.called.tolist() == [True, True, False, False]
    assert rate.fpr == 4 / 400
    tied = np.r_[np.zeros(380), np.ones(20)]  # twenty share the highest score: none is passed
    assert true_alarms(np.ones(5), tied, 0.01).value == 0.0
    assert true_alarms(np.full(5, 2.0), tied, 0.01).fpr == 0.0


def test_rates_on_exchangeable_scores_are_the_stated_ones():
    rng = np.random.default_rng(1)
    found = [true_alarms(*rng.normal(size=(2, 300)), 0.1) for _ in range(300)]
    assert np.mean([f.value for f in found]) == pytest.approx(0.1, abs=0.01)
    alarms = np.mean([f.low > 0.1 for f in found])
    assert alarms <= 0.05


def test_rates_find_what_is_in_either_tail():
    rng = np.random.default_rng(2)
    outside, shifted = rng.normal(size=300), rng.normal(3, 1, 200)
    up, down = (true_alarms(sign * shifted, sign * outside, 0.1) for sign in (1, -1))
    assert up.low > 0.4 and up.value == down.value


def test_what_is_too_few():
    assert too_few(200, 0.01) is None
    assert "199, 200 are needed" in too_few(199, 0.01)
    assert "2000 are needed" in too_few(400, 0.001)
    assert [models_for(f) for f in (0.1, 0.01, 0.001)] == [4, 7, 10]
    assert "shadow models" in too_few(2000, 0.001, models=9)
    assert too_few(2000, 0.001, models=10) is None


def test_curve_rises_and_takes_the_better_side():
    rng = np.random.default_rng(3)
    a, b = rng.normal(1, 1, 150), rng.normal(size=170)
    for sign, side in ((1, "member"), (-1, "other")):
        curve = roc(sign * a, sign * b)
        assert curve["side"] == side
        assert curve["fpr"][0] == 1 / 170 and curve["fpr"][-1] == 1.0 == curve["tpr"][-1]
        assert (np.diff(curve["tpr"]) >= 0).all() and (np.diff(curve["fpr"]) > 0).all()
        for f, t in zip(curve["fpr"], curve["tpr"], strict=True):
            cut = np.sort(b)[::-1][round(f * 170)] if f < 1 else -np.inf
            assert t == (a > cut).mean()
        assert tpr_on(curve, sign * a, sign * b) == curve["tpr"]


def test_clustered_auc_is_delongs_without_clusters():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.5, 1, 400), rng.normal(size=400)
    value, low, high, design = clustered_auc(a, b, np.arange(400), np.arange(400, 800))
    assert value == pytest.approx(auc(a, b))
    assert (low, high) == pytest.approx(auc_interval(a, b), abs=2e-3)
    assert design == pytest.approx(1.0, abs=0.05)


def test_clustered_auc_covers_where_delong_does_not():
    """Scores of one model move together: intervals over samples are far too narrow."""
    rng = np.random.default_rng(5)
    clustered = plain = 0
    for _ in range(200):
        of = np.repeat(np.arange(20), 10)
        shift = rng.normal(size=20)[of]
        member = rng.random(200) < 0.2 + 0.6 * (of % 2)  # unequal shares, so that shifts matter
        scores = shift + rng.normal(size=200)
        a, b = scores[member], scores[~member]
        _, low, high, design = clustered_auc(a, b, of[member], of[~member])
        clustered += low <= 0.5 <= high
        low, high = auc_interval(a, b)
        plain += low <= 0.5 <= high
        assert design >= 1
    assert clustered >= 0.88 * 200 > 0.8 * 200 > plain

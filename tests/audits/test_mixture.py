"""The fraction of a new class and its limits: invariants 1 to 7 of the card quantification-shift."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from expunge.audits._density import FEWEST, Density, fit_density
from expunge.audits._mixture import ONE_SIDED, TWO_SIDED, Mixture, Population, em, limits
from expunge.audits._mixture_checks import (
    INJECTED,
    Thresholds,
    bootstrap,
    injected,
    rivals,
    self_test,
    thresholds,
)
from expunge.core.errors import DataError


def background(random, n):
    """Two strata: easy records and hard ones."""
    return random.normal(0, 1, n // 2), random.normal(-0.5, 1.8, n - n // 2)


def members(random, n):
    return random.normal(2.5, 1.2, n)


def population(random, n, fraction):
    inside = round(fraction * n)
    return np.concatenate([members(random, inside), *background(random, n - inside)])


def case(seed, fraction, n=300, labelled=400, covariate=False):
    random = np.random.default_rng(seed)
    known, new = background(random, labelled), members(random, labelled)
    x = population(random, n, fraction)
    return Population(Mixture.of(known, new, x, random), x, covariate=covariate)


def test_quantification_shift_invariant_1_nothing_and_everything():
    none = [case(seed, 0.0) for seed in range(10)]
    assert np.mean([p.ts(0.0) < TWO_SIDED for p in none]) >= 0.9
    assert all(case(seed, 1.0).best.fraction >= 0.95 for seed in range(3))


def saerens(posteriors, prior, steps=20_000):
    """EMQ in its own words: posteriors under a training prior are reweighed until they agree."""
    share = prior.copy()
    for _ in range(steps):
        moved = posteriors * (share / prior)
        moved /= moved.sum(1, keepdims=True)
        new = moved.mean(0)
        if np.abs(new - share).max() < 1e-14:
            break
        share = new
    return share


@pytest.mark.parametrize("fraction", [0.1, 0.6])
def test_quantification_shift_invariant_2_the_fixed_point_of_emq(fraction):
    p = case(1, fraction)
    densities = np.exp(p.logs)
    posteriors = densities / densities.sum(1, keepdims=True)  # under a uniform prior
    wanted = saerens(posteriors, np.full(3, 1 / 3))
    np.testing.assert_allclose(p.best.shares, wanted, atol=1e-4)


def test_quantification_shift_invariant_2_beside_quapy():
    emq = pytest.importorskip("quapy").method.aggregative.EMQ
    p = case(1, 0.3)
    densities = np.exp(p.logs)
    posteriors = densities / densities.sum(1, keepdims=True)
    found, _ = emq.EM(np.full(3, 1 / 3), posteriors, epsilon=1e-12)
    np.testing.assert_allclose(p.best.shares, found, atol=1e-4)


@pytest.mark.parametrize("covariate", [False, True])
def test_quantification_shift_invariant_3_em_climbs(covariate):
    p = case(2, 0.3, covariate=covariate)
    fit = p.best
    assert fit.shares.sum() == pytest.approx(1) and (fit.shares >= 0).all()
    if covariate:
        assert len(fit.trace) > 1 and (np.diff(fit.trace) > -1e-6).all()
    start = np.array([[0.98, 0.01, 0.01]])
    found = [em(p.logs[None], start=start, most=most, enough=0.0) for most in range(1, 12)]
    values = [v[0] for _, v in found]
    assert (np.diff(values) > -1e-9).all() and values[-1] > values[0] + 1e-3
    assert all(s.sum() == pytest.approx(1) and (s >= 0).all() for s, _ in found)


@pytest.mark.parametrize("covariate", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_quantification_shift_invariant_4_the_limit_is_above_the_estimate(fraction, covariate):
    p = case(3, fraction, covariate=covariate)
    best, one, two = p.best.fraction, p.limit(), p.limit(TWO_SIDED)
    assert p.limit(TWO_SIDED, lower=True) <= best <= one <= two <= 1


def test_quantification_shift_invariant_4_limits_shrink_with_the_root_of_the_number():
    widths = {
        n: np.mean([(p := case(seed, 0.3, n=n)).limit() - p.best.fraction for seed in range(4)])
        for n in (150, 600)
    }
    assert widths[150] / widths[600] == pytest.approx(2, rel=0.2)


def truths(seed, fractions):
    """For each true fraction: whether the limit covers it, with the audit's thresholds, and the estimate."""
    random = np.random.default_rng(1000 + seed)
    known, new = background(random, 240), members(random, 240)
    allowed = thresholds(injected(known, new, 250, random, 20))
    for fraction in fractions:
        x = population(random, 250, fraction)
        p = Population(Mixture.of(known, new, x, random), x)
        yield p.limit(allowed) >= fraction, p.best.fraction


def test_quantification_shift_invariant_5_coverage_and_order():
    """40 truths."""
    found = np.array([list(truths(seed, (0.0, 0.1, 0.25, 0.5))) for seed in range(10)])
    assert found[..., 0].size == 40 and found[..., 0].mean() >= 0.95
    means = found[..., 1].mean(0)
    assert (np.diff(means) > 0).all() and np.ptp(means) > 0.4


def test_quantification_shift_invariant_6_classify_and_count_is_biased():
    random = np.random.default_rng(4)
    out, inside = np.concatenate(background(random, 4000)), members(random, 4000)
    cuts = np.linspace(-2, 4, 200)
    cut = max(cuts, key=lambda c: (inside > c).mean() + (out <= c).mean())
    false_positives = (out > cut).mean()
    x = population(random, 2000, 0.0)
    counted = (x > cut).mean()
    assert counted == pytest.approx(false_positives, abs=0.03) and counted > 0.08
    mixture = Mixture.of(background(random, 800), members(random, 800), x, random)
    assert Population(mixture, x).best.fraction < 0.03


@pytest.mark.parametrize("covariate", [False, True])
def test_quantification_shift_invariant_7_equal_densities_are_not_identifiable(covariate):
    random = np.random.default_rng(5)
    same = random.normal(0, 1, 300)
    x = random.normal(0, 1, 200)
    mixture = Mixture.of([same], same, x, random)
    p = Population(replace(mixture, new=mixture.known[0]), x, covariate=covariate)
    assert p.limit() == 1.0 and not p.identifiable
    if not covariate:  # a bend may still prefer one of two equal densities a little
        assert p.curve()[1].max() < 1e-6
    assert case(0, 0.3).identifiable and case(0, 0.0).identifiable and case(0, 1.0).identifiable


def test_the_profile_is_lowest_at_the_best_and_crosses_at_the_limit():
    p = case(6, 0.3)
    at, ts = p.curve(101)
    assert ts.min() < 0.05 and abs(at[ts.argmin()] - p.best.fraction) < 0.02
    limit = p.limit()
    assert p.ts(limit) == pytest.approx(ONE_SIDED, abs=0.1)
    assert (ts[at < limit - 0.02][at[at < limit - 0.02] > p.best.fraction] < ONE_SIDED).all()


def test_many_populations_at_once_are_as_one_by_one():
    ps = [case(seed, f) for seed, f in enumerate((0.0, 0.2, 0.7))]
    fractions, uppers, values = limits(np.stack([p.logs for p in ps]))
    for k, p in enumerate(ps):
        assert fractions[k] == pytest.approx(p.best.fraction, abs=1e-3)
        assert uppers[k] == pytest.approx(p.limit(), abs=2e-3)
        assert values[k] == pytest.approx(p.best.likelihood, abs=1e-4)


def test_a_bend_keeps_the_density_normalised():
    p = case(7, 0.0, covariate=True)
    grid = np.linspace(-25, 25, 20_001)[:, None]
    wide = Population(p.mixture, grid)
    slope, centre = np.array([0.8]), np.array([0.5])
    bent = np.exp(wide._bend(slope, centre))
    inside = (grid[:, 0] >= p.mixture.points[0, 0]) & (grid[:, 0] <= p.mixture.points[-1, 0])
    step = grid[1, 0] - grid[0, 0]
    np.testing.assert_allclose(bent[inside].sum(0)[:2] * step, 1, atol=0.02)
    untouched = np.exp(wide._bend(np.zeros(1), centre))
    np.testing.assert_allclose(untouched, np.exp(wide.logs), rtol=1e-9)


def test_the_slopes_derivative_is_that_of_the_loss():
    from expunge.audits._mixture import _log_c, _slopes

    x = np.array([[0.3, -1.0], [2.0, 0.5]])
    theta = np.array([0.4, -0.7, 0.1, 0.2])
    step = 1e-6
    for k in range(4):
        up, down = theta.copy(), theta.copy()
        up[k] += step
        down[k] -= step
        wanted = (_log_c(x, up[:2], up[2:]) - _log_c(x, down[:2], down[2:])) / (2 * step)
        np.testing.assert_allclose(_slopes(x, theta[:2], theta[2:])[:, k], wanted, atol=1e-8)


def test_a_bend_takes_up_a_shift_of_the_background():
    """Harder records: the background is tilted downward, nobody is memorised. The plain fit, with
    members that score low, takes them for memorised; the bent one does so less."""
    random = np.random.default_rng(8)
    known, new = random.normal(0, 1, 500), random.normal(-1.5, 0.8, 500)
    tilted = random.normal(0, 1, 6000)
    keep = random.random(6000) < 1 / (1 + np.exp(0.8 * (tilted + 0.2)))
    x = tilted[keep][:600]
    mixture = Mixture.of([known], new, x, random)
    plain, bent = Population(mixture, x), Population(mixture, x, covariate=True)
    assert bent.best.slope[0] < -0.1
    assert bent.best.likelihood > plain.best.likelihood + 1
    assert bent.best.fraction < plain.best.fraction - 0.05


def test_models_of_the_shift_are_compared():
    random = np.random.default_rng(9)
    known, new = (random.normal(0, 1, 400), random.normal(-4, 1, 200)), members(random, 200)
    x = np.concatenate([random.normal(-4, 1, 250), random.normal(0, 1, 50), members(random, 60)])
    found = {r["model"]: r for r in rivals(Mixture.of(known, new, x, random), x, [700, 100])}
    assert list(found) == ["none", "prior", "covariate", "both"]
    assert found["none"]["gain"] == 0 and found["prior"]["gain"] > 20
    assert found["prior"]["aic"] < found["none"]["aic"]
    assert found["both"]["gain"] >= found["prior"]["gain"] - 0.1
    assert [r["freedom"] for r in found.values()] == [0, 1, 2, 3]
    assert found["prior"]["fraction"] == pytest.approx(60 / 360, abs=0.05)


def test_two_features_tell_more_than_one():
    random = np.random.default_rng(10)
    known = random.normal(0, 1, (400, 2))
    new = random.normal(1.2, 1, (400, 2))
    x = np.concatenate([random.normal(1.2, 1, (90, 2)), random.normal(0, 1, (210, 2))])
    both = Population(Mixture.of([known], new, x, random), x)
    first = Population(Mixture.of([known[:, 0]], new[:, 0], x[:, 0], random), x[:, 0])
    assert both.limit() - both.best.fraction < first.limit() - first.best.fraction
    assert both.best.fraction == pytest.approx(0.3, abs=0.12)
    assert Population(both.mixture, x, covariate=True).limit() >= both.best.fraction - 0.1


def test_a_posterior_ranks_the_records():
    p = case(11, 0.3)
    inside = p.best.posterior[:90]
    assert inside.mean() > 0.65 and p.best.posterior[90:].mean() < 0.2
    assert p.best.posterior.mean() == pytest.approx(p.best.fraction, abs=1e-3)


def test_a_bootstrap_is_around_the_fit():
    p = case(12, 0.3)
    found = bootstrap(p, ONE_SIDED, np.random.default_rng(0), 60)
    low, high = np.percentile(found.limits, [2.5, 97.5])
    assert low < p.limit() < high and 0.01 < found.fit < 1 and found.p_value < 0.03
    assert found.fractions.mean() == pytest.approx(p.best.fraction, abs=0.05)
    empty = bootstrap(case(13, 0.0), ONE_SIDED, np.random.default_rng(0), 60)
    assert empty.p_value > 0.05


def test_a_bootstrap_sees_a_model_that_is_wrong():
    p = case(12, 0.3)
    odd = Population(p.mixture, np.concatenate([p.x[:200, 0], np.full(100, -9.0)]))
    assert bootstrap(odd, ONE_SIDED, np.random.default_rng(0), 60).fit < 0.02


def test_thresholds_hold_what_densities_from_few_samples_ask_for():
    random = np.random.default_rng(14)
    few = thresholds(injected([random.normal(0, 1, 60)], random.normal(1, 1, 60), 400, random, 40))
    many = thresholds(
        injected([random.normal(0, 1, 800)], random.normal(1, 1, 800), 400, random, 20)
    )
    assert (few.halved >= ONE_SIDED).all() and few.halved[2:4].mean() > 1.5 * many.halved[
        2:4
    ].mean()
    assert few(0.5) == pytest.approx(ONE_SIDED + (few.halved[3] - ONE_SIDED) / 2)


def test_the_self_test_sees_limits_that_do_not_hold():
    random = np.random.default_rng(15)
    known, new = [random.normal(0, 1, 80)], random.normal(1, 1, 80)
    allowed = thresholds(injected(known, new, 400, random, 40))
    fresh = injected(known, new, 400, random, 40)
    good = self_test(fresh, allowed)
    bad = self_test(fresh, Thresholds(np.full(len(INJECTED), 0.05)))
    assert np.mean([r["covered"] for r in good]) > 0.85 > 0.7 > np.mean([r["covered"] for r in bad])
    estimates = [r["estimate"] for r in good]
    assert estimates == sorted(estimates)
    assert all(r["low"] <= r["estimate"] <= r["high"] or r["fraction"] in (0, 1) for r in good)


def test_a_density_integrates_to_one_and_its_table_agrees():
    random = np.random.default_rng(16)
    points = random.normal(0, 1, 200)
    d = fit_density(points, np.array([[-4.0], [4.0]]), random)
    grid = np.linspace(-4, 4, 4001)[:, None]
    assert np.exp(d.log(grid)).sum() * 8 / 4000 == pytest.approx(1, abs=0.01)
    np.testing.assert_allclose(d.log_quickly(grid), d.log(grid), atol=0.02)
    assert d.draw(5000, random).std() == pytest.approx(points.std(), rel=0.1)


def test_a_score_that_no_sample_is_near_is_weak_evidence():
    points = np.random.default_rng(17).normal(0, 1, 99)[:, None]
    d = Density(points, np.array([0.2]), 50.0)
    assert d.log(np.array([[40.0]]))[0] == pytest.approx(np.log(0.01 / 50))


@pytest.mark.parametrize(
    "bad", [np.zeros(50), np.r_[np.zeros(30), np.nan], np.arange(FEWEST - 1.0)]
)
def test_groups_without_a_density_are_refused(bad):
    random = np.random.default_rng(0)
    good = random.normal(0, 1, 50)
    for known, new in (([good, bad], good), ([good], bad)):
        with pytest.raises(DataError):
            Mixture.of(known, new, good, random)

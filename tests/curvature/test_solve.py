"""Effects from subsets: invariant 3 of the card dmm, the solvers against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge.core.errors import DataError, ExpungeError
from expunge.curvature.solve import SOLVERS, Difference, Effects, Lasso, Ridge, explained

N, M = 12, 5


def linear(models, *, noise=0.0, half=False, seed=0):
    """Masks, outputs y = Aβ + b (+ noise), β and b."""
    g = torch.Generator().manual_seed(seed)
    if half:
        masks = torch.stack([torch.randperm(N, generator=g) < N // 2 for _ in range(models)])
    else:
        masks = torch.rand(models, N, generator=g) < 0.5
    beta, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((N, M), (M,)))
    extra = noise * torch.randn(models, M, generator=g, dtype=torch.float64)
    return masks, masks.double() @ beta + b + extra, beta, b


def test_dmm_invariant_3_ridge_recovers_linear_effects():
    masks, y, beta, b = linear(60)
    found = Ridge(0.0)(masks, y)
    torch.testing.assert_close(found.values, beta, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.intercept, b, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.predict(masks), y, atol=1e-6, rtol=0)


def test_dmm_invariant_3_with_subsets_of_one_size_up_to_a_shift():
    """Subsets of one size say nothing about what all effects have in common."""
    masks, y, beta, _ = linear(200, half=True)
    found = Ridge(0.0)(masks, y)
    torch.testing.assert_close(found.values, beta - beta.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.predict(masks), y, atol=1e-6, rtol=0)


def test_dmm_invariant_3_difference_of_means_agrees_up_to_sampling():
    """The error falls as one over the root of the number of trainings."""
    errors = []
    for models in (400, 6400):
        masks, y, beta, _ = linear(models)
        errors.append(float((Difference()(masks, y).values - beta).square().mean().sqrt()))
    assert errors[1] < 0.15
    assert 2.5 < errors[0] / errors[1] < 6.0  # 4 = sqrt(16)


@pytest.mark.parametrize("models", [9, 40], ids=["wide", "tall"])
def test_ridge_is_the_closed_form_with_a_free_intercept(models):
    masks, y, _, _ = linear(models, noise=0.3)
    lam = 0.7
    a = torch.cat([masks.double(), torch.ones(models, 1, dtype=torch.float64)], dim=1)
    penalty = torch.diag(torch.tensor([lam] * N + [0.0], dtype=torch.float64))
    wanted = torch.linalg.solve(a.T @ a + penalty, a.T @ y)
    found = Ridge(lam)(masks, y)
    torch.testing.assert_close(found.values, wanted[:-1])
    torch.testing.assert_close(found.intercept, wanted[-1])


def test_one_factorisation_serves_all_outputs(monkeypatch):
    calls = []
    true = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: calls.append(1) or true(*a))
    masks, y, _, _ = linear(40)
    Ridge(1.0)(masks, y.repeat(1, 3000))
    assert len(calls) == 1


def test_lasso_meets_its_optimality_conditions():
    """Centred residuals correlate with every column by λ/2 where it is used, by less elsewhere."""
    masks, y, _, _ = linear(80, noise=0.5)
    lam = 30.0
    found = Lasso(lam, steps=100_000)(masks, y)
    a = masks.double() - masks.double().mean(0)
    pull = 2 * a.T @ (y - found.predict(masks))
    used = found.values != 0
    assert 0 < int(used.sum()) < used.numel()
    torch.testing.assert_close(pull[used], lam * found.values[used].sign(), atol=0.2, rtol=0)
    assert float(pull[~used].abs().max()) <= lam + 1e-6


def test_lasso_finds_the_few_that_matter():
    masks, _, _, _ = linear(100)
    beta = torch.zeros(N, 1, dtype=torch.float64)
    beta[3] = 2.0
    noise = 0.1 * torch.randn(
        100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    found = Lasso()(masks, masks.double() @ beta + noise)
    assert int(found.values.abs().argmax()) == 3
    assert abs(float(found.values[3]) - 2) < 0.2
    assert found.details["lam"] > 0 and found.details["explained"] > 0.9


def test_chosen_lambda_predicts_better_than_far_ones():
    """On trainings that neither estimate nor choice has seen."""
    masks, y, beta, b = linear(60, noise=2.0)
    later = linear(2000, seed=7)[0]
    wanted = later.double() @ beta + b

    def error(effects):
        return float((effects.predict(later) - wanted).square().mean())

    chosen = Ridge()(masks, y)
    lam = chosen.details["lam"]
    assert error(chosen) < error(Ridge(lam * 100)(masks, y))
    assert error(chosen) < error(Ridge(lam / 1e6)(masks, y))


def test_explained_is_0_for_the_mean_and_1_for_the_truth():
    masks, y, beta, b = linear(50)
    assert explained(Effects(beta, b), masks, y, y.mean(0)) == pytest.approx(1)
    constant = Effects(torch.zeros_like(beta), y.mean(0))
    assert explained(constant, masks, y, y.mean(0)) == pytest.approx(0)


def test_a_learned_solver_fits_in(monkeypatch):
    """The protocol is a call: masks and outputs in, effects out."""

    class Constant:
        def __call__(self, masks, outputs):
            return Effects(torch.zeros(masks.shape[1], outputs.shape[1]), outputs.mean(0))

    monkeypatch.setitem(SOLVERS, "learned", lambda lam: Constant())
    masks, y, _, _ = linear(10)
    found = SOLVERS["learned"](None)(masks, y.float())
    torch.testing.assert_close(found.predict(masks), y.float().mean(0).expand(10, M))


@pytest.mark.parametrize("name", list(SOLVERS))
def test_bad_input_is_refused(name):
    masks, y, _, _ = linear(40)
    solve = SOLVERS[name](1.0)
    with pytest.raises(DataError, match="same K"):
        solve(masks, y[:-1])
    with pytest.raises(DataError, match="two trainings"):
        solve(masks[:1], y[:1])
    with pytest.raises(ExpungeError, match="NaN"):
        solve(masks, y * np.nan)


def test_difference_needs_every_sample_in_and_out():
    masks, y, _, _ = linear(40)
    masks[:, 2] = True
    with pytest.raises(DataError, match="train more models"):
        Difference()(masks, y)

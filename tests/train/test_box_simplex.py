"""src/expunge/train/box_simplex.py: the projection of the card worst-case-forget."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import SettingError
from expunge.train.box_simplex import project

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


def quadratic_program(a: np.ndarray, total: float) -> np.ndarray:
    """min ‖w − a‖² over the box-simplex by a general solver."""
    from scipy.optimize import minimize

    found = minimize(
        lambda w: 0.5 * ((w - a) ** 2).sum(), np.full(len(a), total / len(a)), jac=lambda w: w - a,
        bounds=[(0, 1)] * len(a), method="SLSQP", options={"ftol": 1e-11, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda w: w.sum() - total, "jac": lambda w: np.ones(len(w))},
    )  # fmt: skip
    assert found.success, found.message
    return found.x


@settings(deadline=None, max_examples=200)
@given(VALUES, st.floats(0, 1))
def test_worst_case_forget_invariant_1_projection(values, share):
    a, total = torch.tensor(values, dtype=torch.double), share * len(values)
    w = project(a, total)
    assert bool((w >= 0).all()) and bool((w <= 1).all())
    assert abs(float(w.sum()) - total) <= 1e-6 * max(total, 1)
    torch.testing.assert_close(project(w, total), w, rtol=0, atol=1e-8)
    order = a.argsort()
    assert bool((w[order].diff() >= -1e-9).all()), "the order of the values is lost"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 20])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_worst_case_forget_invariant_1_equals_a_quadratic_program(size, spread):
    draw = torch.Generator().manual_seed(size)
    for total in {1, size // 2, size - 1, 0.3 * size}:
        a = torch.randn(size, generator=draw, dtype=torch.double) * spread
        wanted = quadratic_program(a.numpy(), total)
        np.testing.assert_allclose(project(a, total).numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9, 1e15])
def test_sums_hold_at_every_scale(scale):
    a = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.double) * scale
    w = project(a, 400)
    assert abs(float(w.sum()) - 400) < 1e-3 * 400
    assert float(w.min()) >= 0 and float(w.max()) <= 1


def test_what_is_in_the_set_stays_and_ties_share():
    ends = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.double)
    assert torch.equal(project(ends, 2), ends)
    w = torch.tensor([0.0, 1.0, 0.25, 0.75, 1.0], dtype=torch.double)
    torch.testing.assert_close(project(w, 3), w, rtol=0, atol=1e-12)
    torch.testing.assert_close(project(torch.zeros(8), 2), torch.full((8,), 0.25).double())
    assert project(torch.randn(5), 0).tolist() == [0] * 5
    assert project(torch.randn(5), 5).tolist() == [1] * 5
    assert len(project(torch.empty(0), 0)) == 0


@pytest.mark.parametrize("value", [0.0, 1e15, 1e16, 3e18, -1e20])
@pytest.mark.parametrize("total", [0, 1, 2, 4.5, 6])
def test_equal_values_share_at_every_scale(value, total):
    w = project(torch.full((6,), value, dtype=torch.double), total)
    torch.testing.assert_close(
        w, torch.full((6,), total / 6, dtype=torch.double), rtol=0, atol=1e-9
    )
    step = abs(value) / 2 + 1
    mixed = torch.tensor([value + step] * 2 + [value] * 2 + [value - step] * 2, dtype=torch.double)
    wanted = [min(2, total) / 2] * 2 + [min(max(total - 2, 0), 2) / 2] * 2
    wanted += [max(total - 4, 0) / 2] * 2
    assert project(mixed, total).tolist() == pytest.approx(wanted, abs=1e-9)


def test_no_such_sum():
    for total in (-1, 4):
        with pytest.raises(SettingError, match="3 weights"):
            project(torch.zeros(3), total)

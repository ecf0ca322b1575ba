"""NPO: invariant 1 of the card baselines-llm."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.methods.text.npo import npo

MINE = torch.tensor([2.0, 7.5, 11.0], dtype=torch.float64)
THEIRS = torch.tensor([1.5, 8.0, 3.0], dtype=torch.float64)


def gradient(beta, theirs=THEIRS):
    mine = MINE.clone().requires_grad_()
    npo(mine, theirs, beta).sum().backward()
    return mine.grad


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0, 4.5])
def test_npo_is_its_formula(beta):
    wanted = [
        -2 / beta * math.log(1 / (1 + math.exp(-beta * (a - b))))
        for a, b in zip(MINE.tolist(), THEIRS.tolist(), strict=True)
    ]
    torch.testing.assert_close(npo(MINE, THEIRS, beta), torch.tensor(wanted, dtype=torch.float64))


def test_baselines_llm_invariant_1_a_small_beta_is_ascent():
    torch.testing.assert_close(
        gradient(1e-7), -torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_baselines_llm_invariant_1_at_the_reference_the_gradient_is_that_of_ascent(beta):
    torch.testing.assert_close(gradient(beta, MINE), -torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(
        npo(MINE, MINE, beta), torch.full((3,), 2 / beta * math.log(2), dtype=torch.float64)
    )


def test_baselines_llm_invariant_1_what_is_forgotten_has_no_weight_left():
    assert float(gradient(10.0)[2]) > -1e-20 and float(gradient(10.0)[1]) < -1.9

"""WGA and SatImp: invariant 2 of the card baselines-llm, and weights that carry no gradient."""

from __future__ import annotations

import pytest
import torch

from expunge.core.errors import SettingError
from expunge.methods.text.grad_diff import GradDiff
from expunge.methods.text.satimp import SatImp, satimp
from expunge.methods.text.wga import WGA, confidence

P = torch.tensor([0.02, 0.3, 0.75, 0.999], dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "weight"),
    [
        (WGA(), lambda p: p),
        (WGA(beta=0.5), lambda p: p**0.5),
        (SatImp(), lambda p: p**5 * (1 - p)),
        (SatImp(beta1=1.0, beta2=2.0), lambda p: p * (1 - p) ** 2),
    ],
)
def test_weighted_ascent_is_its_formula(method, weight, losses, build, answers, tiny_rows):
    model = build(1)
    logits, tokens = answers(model, tiny_rows[:3])
    logp = logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]
    wanted = float((weight(logp.exp()) * logp).mean())
    assert float(losses(method, model)[0].detach()) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("method", [WGA(beta=0), SatImp(beta1=0, beta2=0)])
def test_baselines_llm_invariant_2_powers_of_zero_are_plain_ascent(method, losses, build):
    model, plain = build(1), build(1)
    mine, wanted = losses(method, model)[0], losses(GradDiff(), plain)[0]
    torch.testing.assert_close(mine, wanted)
    mine.backward()
    wanted.backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def gradient(weight):
    """Of −w ℓ with respect to ℓ, each token by itself."""
    nll = (-P.log()).requires_grad_()
    (-weight(nll) * nll).sum().backward()
    return nll.grad


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_the_weight_of_wga_carries_no_gradient(beta):
    torch.testing.assert_close(gradient(lambda n: confidence(n, beta)), -(P**beta))


@pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 1.0), (0.5, 2.0)])
def test_the_weight_of_satimp_carries_no_gradient(beta1, beta2):
    wanted = -(P**beta1) * (1 - P) ** beta2
    torch.testing.assert_close(gradient(lambda n: satimp(n, beta1, beta2)), wanted)


def test_baselines_llm_invariant_2_satimp_vanishes_at_both_ends():
    nll = torch.tensor([60.0, 0.5, 1e-12, 0.0], dtype=torch.float64)
    weight = satimp(nll, 5.0, 1.0)
    assert float(weight[1]) > 0.03
    assert 0 < float(weight[0]) < 1e-100 and 0 < float(weight[2]) < 2e-12 and float(weight[3]) == 0


def test_weighted_ascent_refuses_negative_powers():
    with pytest.raises(SettingError, match="beta must be at least 0"):
        WGA(beta=-1)
    with pytest.raises(SettingError, match="beta2 must be at least 0"):
        SatImp(beta2=-1)

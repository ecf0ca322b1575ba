"""SimNPO: its formula, and invariant 7 of the card baselines-llm."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.core.errors import SettingError
from expunge.methods.text.npo import npo
from expunge.methods.text.simnpo import SimNPO, simnpo
from expunge.train.token_losses import sequence_mean, sequence_sum


def by_hand(mean, beta, delta):
    return -2 / beta * math.log(1 / (1 + math.exp(-beta * (mean - delta))))


@pytest.mark.parametrize(("beta", "delta"), [(4.5, 0.0), (2.5, 0.0), (1.0, 1.5)])
def test_simnpo_is_its_formula_of_each_answer_by_itself(
    beta, delta, losses, build, answers, tiny_rows
):
    model = build(1)
    means = []
    for row in tiny_rows[:3]:
        logits, tokens = answers(model, [row])
        means.append(-float(logits.log_softmax(1).gather(1, tokens[:, None]).mean()))
    wanted = sum(by_hand(m, beta, delta) for m in means) / 3
    found, _ = losses(SimNPO(beta=beta, delta=delta), model)
    assert float(found.detach()) == pytest.approx(wanted, abs=1e-5)


def test_baselines_llm_invariant_7_every_token_twice_changes_nothing():
    nll = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.1, 3.0]], dtype=torch.float64)
    mask = nll > 0
    twice, both = nll.repeat_interleave(2, 1), mask.repeat_interleave(2, 1)
    once = simnpo(sequence_mean(nll, mask), 4.5, 0.2)
    torch.testing.assert_close(simnpo(sequence_mean(twice, both), 4.5, 0.2), once)
    old = torch.zeros(2, dtype=torch.float64)
    change = npo(sequence_sum(twice), old, 0.1) - npo(sequence_sum(nll), old, 0.1)
    assert float(change.abs().min()) > 0.5


def test_simnpo_lets_go_of_unlikely_answers():
    mean = torch.tensor([0.01, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    simnpo(mean, 4.5, 0.0).sum().backward()
    weight = -mean.grad
    assert 0.9 < float(weight[0]) < 1 and float(weight[1]) < 1e-3 and float(weight[2]) < 1e-20


def test_simnpo_has_no_original_and_refuses_what_is_no_temperature():
    assert not SimNPO().needs.original
    with pytest.raises(SettingError, match="beta must be above 0"):
        SimNPO(beta=0)

"""UNDIAL: its fixed targets, over answers only, and invariant 3 of the card baselines-llm."""

from __future__ import annotations

import pytest
import torch

import expunge as xp
from expunge.methods.text.undial import UNDIAL, lowered


def by_hand(original, mine, tokens, beta):
    found = []
    for z, own, y in zip(original, mine, tokens.tolist(), strict=True):
        target = z.clone()
        target[y] -= beta
        found.append(-(target.softmax(0) * own.log_softmax(0)).sum())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("beta", [0.0, 3.0, 10.0])
def test_undial_is_its_formula_over_answers_only(beta, losses, build, answers, tiny, tiny_rows):
    """Neither prompts nor padding count; no label of −100 is taken for a token."""
    model = build(1)
    original, tokens = answers(tiny.model, tiny_rows[:3])
    wanted = by_hand(original, answers(model, tiny_rows[:3])[0], tokens, beta)
    found = float(losses(UNDIAL(beta=beta), model)[0].detach())
    assert found == pytest.approx(wanted, abs=1e-5)


def test_baselines_llm_invariant_3_undial_without_beta_is_at_rest_at_the_original(losses, build):
    for seed, beta, moves in ((0, 0.0, False), (0, 10.0, True), (1, 0.0, True)):
        model = build(seed)
        losses(UNDIAL(beta=beta), model)[0].backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters())
        assert (largest > 1e-2) if moves else (largest < 1e-6)


def test_the_target_lowers_the_token_and_keeps_the_odds_of_the_others():
    logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 8, 3, 3, 5])
    before, after = logits.log_softmax(1), lowered(logits, tokens, 10.0).log_softmax(1)
    change = after - before
    own = change.gather(1, tokens[:, None])
    others = change.scatter(1, tokens[:, None], float("nan"))
    rest = others.nanmean(1, keepdim=True)
    assert float((others - rest).nan_to_num(0).abs().max()) < 1e-12
    torch.testing.assert_close(rest - own, torch.full_like(own, 10.0))


def test_undial_trains_adapters_where_asked(tiny):
    request, settings = xp.forget(ids=[0, 1]), {"epochs": 2, "lr": 1e-2}
    assert xp.unlearn(tiny, request, UNDIAL(**settings)).change.kind == "weights"
    outcome = xp.unlearn(tiny, request, UNDIAL(train="lora(8)", **settings))
    assert outcome.change.kind == "adapter" and outcome.details["reference"] == "adapter"


def test_the_target_stays_that_of_the_original_while_the_model_trains(tiny):
    """A target of the model itself would move away with it; this one converges."""
    settings = {"lr": 3e-2, "batch_size": 2, "warmup": 0.0, "decay": "none", "beta": 2.0}
    outcome = xp.unlearn(tiny, xp.forget(ids=[0, 1]), UNDIAL(epochs=60, **settings))
    batch = tiny.train.fetch(torch.tensor([0, 1]))
    with torch.no_grad():
        after = tiny.token_nll(outcome.runnable(), batch)[0]
        z, y = tiny.token_logits(tiny.model, batch)[:, :-1], batch.y[:, 1:]
        mask = y != -100
        wanted = -lowered(z[mask], y[mask], 2.0).log_softmax(1).gather(1, y[mask][:, None])[:, 0]
    assert float((after[mask] - wanted).abs().max()) < 0.2

"""PDU: invariant 5 of the card baselines-llm, the shift of positions, and resuming with its dual variable."""

from __future__ import annotations

import pytest
import torch

import expunge as xp
from expunge.core.errors import SettingError
from expunge.core.runtime import Budget, Runtime
from expunge.methods.text.pdu import PDU, flatness
from expunge.problems.causal_lm import CausalLM
from expunge.workloads.tinyfacts import splits, tiny_llama

FORGET = xp.forget(where="entity < 2")


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return CausalLM(tiny_llama(16, 1), splits().train)


def test_baselines_llm_invariant_5_only_flat_logits_have_no_loss():
    rng = torch.Generator().manual_seed(0)
    shift = torch.randn(4, 1, generator=rng)
    assert flatness(shift.expand(4, 9)).abs().max() < 1e-12
    z = torch.randn(4, 9, generator=rng)
    wanted = [(max(row) - sum(row) / 9) ** 2 for row in z.tolist()]
    torch.testing.assert_close(flatness(z), torch.tensor(wanted))
    assert flatness(z + shift).allclose(flatness(z), atol=1e-5) and flatness(z).min() > 0


def test_baselines_llm_invariant_5_the_dual_variable_waits_and_never_is_negative():
    method = PDU(alpha=2.0, epsilon=0.5, dual_lr=4.0, dual_warmup=2)
    state, seen = [method.alpha, 0.0, 0.0], []
    for loss in (9.0, 9.0, 9.0, 9.0, 0.25, 0.0, 1.0, 0.5):
        state = method.moved(state, loss, steps=2)
        seen.append(state[0])
    # four steps of warm-up; then 2 + 4 (0.25 − 0.5) = 1; 1 − 2 < 0; 0 + 4 · 0.5; no change at ε
    assert seen == [2.0, 2.0, 2.0, 2.0, 1.0, 0.0, 2.0, 2.0]


def test_a_pass_moves_the_dual_variable_by_its_mean():
    method = PDU(alpha=2.0, epsilon=0.5, dual_lr=4.0, dual_warmup=1, dual_update="epoch")
    state, seen = [method.alpha, 0.0, 0.0], []
    for loss in (9.0, 9.0, 1.0, 0.5, 0.0, 0.25):
        state = method.moved(state, loss, steps=2)
        seen.append(state[0])
    assert seen == [2.0, 2.0, 2.0, 3.0, 3.0, 1.5]


@pytest.mark.parametrize("update", ["step", "epoch"])
def test_training_follows_the_rule_on_its_own_retain_losses(problem, update):
    method = PDU(
        epochs=5, batch_size=4, lr=5e-3, alpha=1.0, epsilon=4.6, dual_warmup=2, dual_update=update
    )
    outcome = xp.unlearn(problem, FORGET, method)
    logs, state = outcome.details["losses"], [method.alpha, 0.0, 0.0]
    for dual, retain in zip(logs["dual"], logs["retain"], strict=True):
        assert dual == pytest.approx(state[0], rel=1e-5)
        state = method.moved(state, retain, steps=3)
    assert outcome.details["dual"] == pytest.approx(state[0], rel=1e-5)
    assert logs["dual"][:7] == [1.0] * 7 and len(set(logs["dual"])) > 2
    assert outcome.curve[0]["loss"] == pytest.approx(
        logs["forget"][0] + logs["retain"][0], rel=1e-5
    )
    assert "dual_state" not in outcome.runnable().state_dict()


def test_flatness_is_taken_where_answers_are_predicted(tiny, losses, build):
    """At position t − 1 of an answered token t; the token's own position would give another value."""
    model = build(1)
    wanted, own = [], []
    for row in tiny.train.rows[:3]:
        z = model(input_ids=row.ids[None]).logits[0].detach()
        places = row.answered.nonzero()[:, 0]
        for shift, into in ((1, wanted), (0, own)):
            at = z[places - shift]
            into.append((at.amax(1) - at.mean(1)).square())
    found = float(losses(PDU(), model)[0].detach())
    assert found == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-5)
    assert found != pytest.approx(float(torch.cat(own).mean()), rel=1e-2)


@pytest.mark.parametrize("update", ["step", "epoch"])
def test_resuming_goes_on_with_the_dual_variable(problem, tmp_path, update):
    method = PDU(
        epochs=4, batch_size=4, lr=5e-3, alpha=1.0, epsilon=4.0, dual_warmup=1, dual_update=update
    )
    whole = xp.unlearn(problem, FORGET, method)
    for budget in (Budget(steps=5), Budget()):
        runtime = Runtime(checkpoint=tmp_path, checkpoint_every=1, budget=budget)
        again = xp.unlearn(problem, FORGET, method, runtime=runtime)
    assert again.record["weights"] == whole.record["weights"]
    assert again.details["dual"] == whole.details["dual"] != 1.0


def test_a_constraint_needs_a_retain_term():
    with pytest.raises(SettingError, match="pdu holds the retain loss below epsilon"):
        PDU(retain="none")
    assert PDU(alpha=0).needs.retain

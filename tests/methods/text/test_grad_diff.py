"""GradDiff and KLMin: their two terms, from the formula; what each asks of the original."""

from __future__ import annotations

import pytest

from expunge.methods.text.grad_diff import GradDiff
from expunge.methods.text.kl_min import KLMin


@pytest.mark.parametrize("method", [GradDiff(), KLMin()], ids=["grad-diff", "kl-min"])
def test_the_forget_term_is_the_mean_log_likelihood_of_all_answered_tokens(
    method, losses, build, answers, tiny_rows
):
    model = build(1)
    logits, tokens = answers(model, tiny_rows[:3])
    by_hand = logits.log_softmax(1).gather(1, tokens[:, None]).mean()  # of 7 tokens, not 3 rows
    assert len(tokens) == 7
    assert float(losses(method, model)[0].detach()) == pytest.approx(float(by_hand), abs=1e-5)


def test_grad_diff_lowers_what_it_raises_elsewhere(losses, build):
    forget, retain = losses(GradDiff(), build(1))
    assert float(retain.detach()) == pytest.approx(-float(forget.detach()), abs=1e-6)


def test_kl_min_compares_answers_only(losses, build, answers, tiny, tiny_rows):
    model = build(1)
    mine, theirs = (answers(m, tiny_rows[:3])[0].log_softmax(1) for m in (model, tiny.model))
    by_hand = float((theirs.exp() * (theirs - mine)).sum(1).mean())
    assert by_hand > 0.1
    assert float(losses(KLMin(), model)[1].detach()) == pytest.approx(by_hand, abs=1e-5)


def test_only_the_divergence_asks_for_the_original():
    assert not GradDiff().needs.original and KLMin().needs.original
    assert not KLMin(alpha=0).needs.original and not KLMin(alpha=0).needs.retain

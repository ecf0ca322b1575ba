"""CEU: its target and gradient (invariant 3 of the card baselines-llm), and the tokens it skips."""

from __future__ import annotations

import pytest
import torch

from expunge.methods.text.ceu import CEU, ceu, later

LOGITS = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
TOKENS = torch.cat([LOGITS[:3].argmax(1), torch.tensor([4, 7, 2])])
"""Three tokens that are likely, three that are not."""


def by_hand(logits, tokens):
    """Cross-entropy with the model's distribution renormalised without one token each."""
    p = logits.softmax(1)
    found = []
    for row, y in zip(p, tokens.tolist(), strict=True):
        others = [v for v in range(len(row)) if v != y]
        rest = row[others].sum()
        found.append(-sum(row[v] / rest * row[v].log() for v in others))
    return torch.stack(found)


def gradient(logits, tokens):
    logits = logits.clone().requires_grad_()
    ceu(logits, tokens).sum().backward()
    return logits.grad


def test_ceu_is_its_formula():
    torch.testing.assert_close(
        ceu(LOGITS, TOKENS).double(), by_hand(LOGITS, TOKENS), atol=1e-5, rtol=0
    )


def test_baselines_llm_invariant_3_gradient_of_ceu():
    p = LOGITS.softmax(1)
    own = p.gather(1, TOKENS[:, None])
    wanted = (-p * own / (1 - own)).scatter(1, TOKENS[:, None], own)
    assert float(own.max()) > 0.3 > 0.03 > float(own.min())
    torch.testing.assert_close(gradient(LOGITS, TOKENS), wanted, atol=1e-6, rtol=1e-5)


def test_baselines_llm_invariant_3_no_gradient_once_the_token_is_impossible():
    gone = LOGITS.scatter(1, TOKENS[:, None], -1e4)
    assert float(gradient(gone, TOKENS).abs().max()) < 1e-6
    assert bool(ceu(gone, TOKENS).isfinite().all())


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_ceu_is_the_mean_over_answers_less_their_first_tokens(
    skip, losses, build, answers, tiny_rows
):
    model, each = build(1), []
    for row in tiny_rows[:3]:  # answers of 2, 1 and 4 tokens
        found = by_hand(*answers(model, [row]))
        each.append(found if len(found) <= skip else found[skip:])
    wanted = float(torch.cat(each).mean())
    assert float(losses(CEU(skip=skip), model)[0].detach()) == pytest.approx(wanted, abs=1e-5)


def test_short_answers_are_not_skipped():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    kept = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(later(mask, 1), kept)
    assert torch.equal(later(mask, 0), mask)


def test_ceu_reads_no_retain_data_unless_it_has_a_term_for_it():
    assert not CEU().needs.retain and CEU(alpha=1).needs.retain and not CEU().needs.original

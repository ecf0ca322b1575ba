"""CHES: the invariants of its card, each form by hand in float64, and the choice of pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.analysis.ches import (
    SCORES,
    ches,
    edit_similarity,
    last_product,
    ln_ches,
    lowest,
    score,
    single_token_rate,
    states_of,
    sums,
    unembedding_similarity,
)
from expunge.core.errors import ModelError, SettingError
from expunge.problems.tokens import Tokens, pad
from expunge.train.token_losses import IGNORED

PAIRS = [((4, 3), (4, 5)), ((2, 1), (2, 4)), ((6, 2), (6, 1))]
"""Tokens of prompt and answer of the preferred and of the rejected side."""


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().double()


def sides(seed=0):
    """Preferred and rejected answers to the same prompts."""
    rng = torch.Generator().manual_seed(seed)
    found = ([], [])
    for (prompt, plus), (_, minus) in PAIRS:
        asked = torch.randint(3, 40, (prompt,), generator=rng)
        for side, count in zip(found, (plus, minus), strict=True):
            ids = torch.cat([asked, torch.randint(3, 40, (count,), generator=rng)])
            side.append(Tokens(ids, torch.arange(len(ids)) >= prompt))
    return found


def padded(rows, left=False, wider=0):
    """Inputs and labels, padded on a side."""
    x, y = pad(rows, 0)
    if wider:
        x = {k: torch.nn.functional.pad(v, (0, wider)) for k, v in x.items()}
        y = torch.nn.functional.pad(y, (0, wider), value=IGNORED)
    if left:
        shift = [x["input_ids"].shape[1] - len(r) for r in rows]
        x = {k: torch.stack([r.roll(s) for r, s in zip(v, shift, strict=True)]) for k, v in x.items()}  # fmt: skip
        y = torch.stack([r.roll(s) for r, s in zip(y, shift, strict=True)])
    return x, y


@torch.no_grad()
def states(model, x):
    places = (x["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return states_of(model, "lm_head", lambda m: m(**x, position_ids=places))


def by_hand(model, rows):
    """S, |y| and the last state of each answer: one sequence at a time, position by position."""
    found = []
    with torch.no_grad():
        for row in rows:
            h = model.model(input_ids=row.ids[None]).last_hidden_state[0]
            total, count = torch.zeros(16, dtype=torch.float64), 0
            for t in range(1, len(row)):
                if row.answered[t]:
                    total, count = total + h[t - 1], count + 1
            found.append((total, count, h[-1]))
    return found


def wanted(model, plus, minus):
    """Every score of every pair, by its formula."""
    found = {name: [] for name in SCORES}
    both = zip(by_hand(model, plus), by_hand(model, minus), plus, minus, strict=True)
    for (s, n, last), (r, m, end), a, b in both:
        found["ches"].append(float(s @ r - s @ s))
        found["ln-ches"].append(float(s @ r / (n * m) - s @ s / n**2))
        found["last"].append(float(last @ end))
        found["edit"].append(edit_similarity(a.answer.tolist(), b.answer.tolist()))
    return found


def of(model, plus, minus, **how):
    (x, y), (u, v) = padded(plus, **how), padded(minus, **how)
    return {n: score(n, (states(model, x), states(model, u)), (y, v)) for n in SCORES}


def test_states_are_those_that_the_output_embeddings_multiply(model):
    x, _ = padded(sides()[0])
    h = states(model, x)
    places = (x["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**x, position_ids=places).logits
    torch.testing.assert_close(h @ model.lm_head.weight.T, logits)
    with pytest.raises(ModelError, match="no layer 'head'"):
        states_of(model, "head", lambda m: m(**x))


@pytest.mark.parametrize("how", [{}, {"left": True}, {"wider": 3}, {"left": True, "wider": 2}])
def test_ches_invariant_2_padding_changes_nothing(model, how):
    plus, minus = sides()
    found, hand = of(model, plus, minus, **how), wanted(model, plus, minus)
    for name in SCORES:
        assert found[name].tolist() == pytest.approx(hand[name], abs=1e-9), name


def test_ches_invariant_1_equal_answers_give_0_and_sides_matter(model):
    plus, minus = sides()
    same = of(model, plus, plus)
    assert same["ches"].tolist() == same["ln-ches"].tolist() == [0.0] * 3
    there, back = of(model, plus, minus), of(model, minus, plus)
    for name in ("ches", "ln-ches"):
        # but for pairs that are one token on both sides, of which there is none here
        assert bool(((there[name] - back[name]).abs() > 1e-3).all()), name


@pytest.mark.parametrize("c", [0.5, -3.0])
def test_ches_invariant_3_scaling_states_scales_by_the_square(c):
    h = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.full((3, 6), IGNORED)
    y[:, 3:] = 1
    for f in (ches, ln_ches):
        plain, scaled = (f(sums(k * h[0], y), sums(k * h[1], y)) for k in (1.0, c))
        torch.testing.assert_close(scaled, c**2 * plain)


def test_ches_invariant_4_orthogonal_sums_leave_the_norm():
    y = torch.tensor([[IGNORED, 1, 1]])
    plus = sums(torch.tensor([[[3.0, 0], [1, 0], [9, 9]]]), y)
    minus = sums(torch.tensor([[[0.0, 2], [0, 5], [9, 9]]]), y)
    assert ches(plus, minus).tolist() == [-16.0]
    assert ln_ches(plus, minus).tolist() == [-4.0]
    assert last_product(plus, minus).tolist() == [162.0]


def test_ches_invariant_5_as_many_states_as_answer_tokens(model):
    plus, minus = sides()
    for rows in (plus, minus):
        x, y = padded(rows, left=True)
        assert sums(states(model, x), y).count.tolist() == [len(r.answer) for r in rows]
    one = [Tokens(r.ids[: len(r.prompt) + 1], r.answered[: len(r.prompt) + 1]) for r in plus]
    other = [Tokens(torch.cat([r.prompt, torch.tensor([7])]), r.answered) for r in one]
    found = of(model, one, other)
    for name in ("ches", "ln-ches"):
        assert found[name].tolist() == pytest.approx([0, 0, 0], abs=1e-9)
    similar = [unembedding_similarity(model.lm_head.weight, int(r.answer), 7) for r in one]
    a, b = model.lm_head.weight[[int(one[0].answer), 7]].detach()
    assert similar[0] == pytest.approx(float(a @ b / a.norm() / b.norm()))
    assert len({round(s, 6) for s in similar}) > 1  # where CHES says 0 of all


def test_ches_invariant_6_the_single_token_identity_is_autograd_s():
    """d log π(y⁺)/dt with W and h both moving against the gradient of a loss of z₊ − z₋."""
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        weights = torch.randn(11, 7, generator=rng, dtype=torch.float64).requires_grad_()
        h = torch.randn(7, generator=rng, dtype=torch.float64).requires_grad_()
        beta, plus, minus = 0.3, 2, 5
        z = weights @ h
        margin = z[plus] - z[minus]
        loss = -torch.nn.functional.logsigmoid(beta * margin)
        down = torch.autograd.grad(loss, (weights, h), retain_graph=True)
        up = torch.autograd.grad(z.log_softmax(0)[plus], (weights, h))
        rate = -sum(float((a * b).sum()) for a, b in zip(down, up, strict=True))
        speed = beta * float(torch.sigmoid(-beta * margin.detach()))
        found = single_token_rate(weights.detach(), h.detach(), plus, minus, speed)
        assert float(found) == pytest.approx(rate, abs=1e-10)


def test_a_likely_third_token_along_the_difference_takes_the_probability():
    """W₊ and W₋ alike, and another token far out along W₊ − W₋: the preferred token loses."""
    weights = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, 4.0], [-1.0, 0.0]], dtype=torch.float64)
    h = torch.tensor([1.0, 0.2], dtype=torch.float64)
    near = weights.clone()
    near[2] = torch.tensor([1.0, -4.0])
    assert single_token_rate(weights, 0.05 * h, 0, 1) < 0 < single_token_rate(near, 0.05 * h, 0, 1)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.51, 0.99])
def test_ches_invariant_7_shares_are_nested_and_all_is_all(share):
    scores = torch.tensor([0.3, -2.0, math.nan, 0.3, -math.inf, 7.0, math.inf, 0.0, -2.0, 1.0])
    assert lowest(scores, 1.0).tolist() == list(range(10))
    kept = set(lowest(scores, share).tolist())
    assert len(kept) == max(1, math.ceil(10 * share))
    for larger in (0.3, 0.52, 0.8, 1.0):
        if larger > share:
            assert kept <= set(lowest(scores, larger).tolist())
    left = [p for p in range(10) if p not in kept]
    order = [math.inf if math.isnan(s) else s for s in scores.tolist()]
    assert all(order[a] <= order[b] for a, b in itertools.product(kept, left))


def test_a_share_beyond_all_is_refused():
    with pytest.raises(SettingError, match=r"within 0 … 1, not at 1\.5"):
        lowest(torch.zeros(3), 1.5)


def test_an_answer_without_tokens_has_no_score():
    h = torch.randn(2, 4, 8)
    y = torch.tensor([[IGNORED, 5, 6, IGNORED], [IGNORED] * 4])
    for name in SCORES:
        found = score(name, (h, h), (y, y))
        assert bool(found[0].isfinite()) and bool(found[1].isnan()), name


def test_sums_of_half_precision_states_are_taken_in_float32():
    h = torch.full((1, 4097, 1), 1 / 256).bfloat16()
    y = torch.ones(1, 4097, dtype=torch.long)
    found = sums(h, y)
    assert found.total.dtype == torch.float32 and float(found.total) == 16.0


def test_edit_similarity_is_minus_the_share_of_tokens_to_change():
    assert edit_similarity([1, 2, 3], [1, 2, 3]) == 0
    assert edit_similarity([1, 2, 3], [4, 5, 6]) == -1
    assert edit_similarity([1, 2, 3, 4], [1, 3, 4]) == -1 / 4
    assert edit_similarity([1, 2], [2, 1, 3, 4]) == -3 / 4
    assert edit_similarity(list(b"kitten"), list(b"sitting")) == -3 / 7

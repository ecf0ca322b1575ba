"""truth-ratio: the worked example, both readings of R, forget quality, and missing alternates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

import expunge as xp
from expunge.audits.truth_ratio import TruthRatio, ks

# tokens 3 … 8 of a two-token answer after the number of the sample
ROW = ([3, 4], 1)
WRONG = ([5, 6], 1)


def run(subject, references=(), **settings):
    found = TruthRatio(**settings).run(subject, references, xp.Runtime(threads=1))
    return {f.name.removeprefix("truth-ratio/"): f for f in found}


def spread(losses, vocabulary=40):
    """Logits [3, V] after which token 3 + i of an answer costs `losses[i]` nats at every position."""
    p = torch.full((vocabulary,), 0.0, dtype=torch.float64)
    p[3 : 3 + len(losses)] = torch.exp(-torch.tensor(losses, dtype=torch.float64))
    p[0] = 1 - p.sum()
    return p.log().clamp(min=-100).expand(3, -1).clone()


def test_the_worked_example(sheets):
    # the right answer costs 1.3, the perturbed ones 1.8, 2.3, 2.8, 1.3 and 3.3 nats a token: ln R = −1
    losses = [1.3, 1.8, 2.3, 2.8, 1.3 + 1e-12, 3.3]
    table = spread(losses)[None].repeat(2, 1, 1)
    wrong = [([3 + n] * length, 1) for n, length in zip(range(1, 6), (2, 1, 2, 2, 1), strict=True)]
    row = ([3, 3], 1)
    (subject,) = sheets([row, row], None, xp.Request(ids=(0,)), table, alternates=[wrong, wrong])
    found = run(subject)
    assert found["forget-train"].value == pytest.approx(0.367879, abs=1e-6)
    assert found["retain-train"].value == pytest.approx(0.632121, abs=1e-6)


def test_a_wrong_answer_that_is_more_likely(sheets):
    table = spread([2.0, 1.0])[None].repeat(2, 1, 1)
    wrong = [[([4], 1)]] * 2
    (subject,) = sheets([([3], 1)] * 2, None, xp.Request(ids=(0,)), table, alternates=wrong)
    found = run(subject)
    assert found["forget-train"].value == pytest.approx(np.exp(-1))  # R = e
    assert found["retain-train"].value == 0


def test_nothing_overflows_where_an_answer_is_impossible(sheets):
    table = torch.zeros(2, 3, 9, dtype=torch.float64)
    table[:, :, 3] = 5000.0
    wrong = [[WRONG]] * 2
    (subject,) = sheets([([3, 3], 1)] * 2, None, xp.Request(ids=(0,)), table, alternates=wrong)
    assert run(subject)["forget-train"].value == 0 and run(subject)["retain-train"].value == 1
    (turned,) = sheets(
        [WRONG] * 2, None, xp.Request(ids=(0,)), table, alternates=[[([3, 3], 1)]] * 2
    )
    assert run(turned)["forget-train"].value == 0 and run(turned)["retain-train"].value == 0


def random(seed, boost=0.0, count=40):
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 3, 9, generator=rng, dtype=torch.float64)
    logits[:, 0, 3] += boost
    logits[:, 1, 4] += boost
    return logits


def many(sheets, *logits, **more):
    request = xp.Request(ids=tuple(range(30)))
    others = [[WRONG, ([7], 1)][: 1 + n % 2] for n in range(40)]
    return sheets([ROW] * 40, None, request, *logits, alternates=others, **more)


def test_values_are_those_of_each_sample_by_hand(sheets):
    logits = random(0)
    (subject,) = many(sheets, logits)
    log_p = logits.log_softmax(-1)
    wanted = []
    for n in range(30):
        right = float(log_p[n, 0, 3] + log_p[n, 1, 4]) / 2
        wrong = [float(log_p[n, 0, 5] + log_p[n, 1, 6]) / 2, float(log_p[n, 0, 7])][: 1 + n % 2]
        r = np.exp(np.mean(wrong) - right)
        wanted.append(min(r, 1 / r))
    for size in (1, 4, 16):
        found = run(subject, batch_size=size)["forget-train"]
        assert found.per_sample["score"].tolist() == pytest.approx(wanted)
        assert found.value == pytest.approx(np.mean(wanted))


def test_forget_quality_is_the_mean_p_value(sheets):
    first, a, b = many(sheets, random(0, boost=3), random(1), random(2))
    found = run(first, [a, b])
    quality = found["forget-quality"]
    logs = [
        r["forget-quality"].per_sample["log-ratio"] for r in (run(s, [a]) for s in (first, a, b))
    ]
    p = [ks_2samp(np.exp(logs[0]), np.exp(other)).pvalue for other in logs[1:]]
    assert quality.value == pytest.approx(np.mean(p)) and quality.value < 1e-6
    assert quality.reference == pytest.approx(ks_2samp(logs[1], logs[2]).pvalue)
    assert quality.reference > 0.01 and quality.detail["n"] == 30
    assert (quality.low, quality.high) == pytest.approx((min(p), max(p)))
    assert quality.direction == "up" and quality.original == quality.value


def test_llm_metrics_invariant_a_retrained_model_is_like_itself(sheets):
    (same,) = many(sheets, random(1))
    found = run(same, [same])
    assert found["forget-quality"].value == 1 and found["forget-train"].gap == 0
    assert found["forget-quality"].reference is None
    assert (
        found["forget-quality"].reason == "one reference: the p-value among references is unknown"
    )


def test_ks_on_exchangeable_values_is_uniform():
    rng = np.random.default_rng(0)
    p = [ks(rng.normal(size=60), rng.normal(size=60))[1] for _ in range(200)]
    assert 0.01 < np.mean(np.array(p) < 0.1) < 0.2
    assert ks(rng.normal(size=60), rng.normal(size=60) + 2)[1] < 1e-6


def test_order_changes_nothing(sheets):
    pair = []
    for order in (None, np.random.default_rng(0).permutation(40).tolist()):
        first, a = many(sheets, random(0, boost=1), random(1), order=order)
        pair.append(run(first, [a]))
    for name in ("forget-train", "retain-train", "forget-quality"):
        assert pair[0][name].value == pytest.approx(pair[1][name].value)


def test_what_is_missing_is_said(sheets):
    none = sheets([ROW] * 4, None, xp.Request(ids=(0,)), random(0, count=4))[0]
    found = run(none)
    assert "no alternate answers" in found["forget-train"].reason
    assert "no alternate answers" in found["forget-quality"].reason
    some = sheets(
        [ROW] * 4, None, xp.Request(ids=(0, 1)), random(0, count=4),
        alternates=[[WRONG], [], [], []],
    )[0]  # fmt: skip
    found = run(some)
    assert found["forget-train"].detail["n"] == 1
    assert found["forget-quality"].reason == "only 1 samples to forget, 10 are needed"
    assert found["retain-test"].reason == "there is no test data"
    (enough,) = many(sheets, random(0))
    assert run(enough)["forget-quality"].reason == "no retrained reference to compare with"


def test_broken_alternates_give_a_reason(sheets):
    wrong = [[([7, 8, 5], 1)]] * 2
    logits = torch.zeros(2, 4, 9)
    logits[:, 2] = torch.nan  # only the alternates are that long
    (subject,) = sheets([ROW] * 2, None, xp.Request(ids=(0,)), logits, alternates=wrong)
    assert "NaN outputs on the alternates of forget-train" in run(subject)["forget-train"].reason


def test_facts_tell_the_original_from_retrained_models(facts):
    original, first, second = facts
    found = run(original, [first, second])
    assert found["forget-train"].value < 0.05 < 0.2 < found["forget-train"].reference
    assert found["forget-quality"].value < 0.01 < found["forget-quality"].reference
    assert found["retain-train"].value > 0.95

"""text-membership: worked values, chance and power, order and batches, and what cannot be attacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import expunge as xp
from expunge.audits._tokens import said
from expunge.audits.text_membership import SCORES, TextMembership, lowest

END = 2
REQUEST = xp.Request(ids=tuple(range(60)))


class Words:
    """A tokenizer of letters."""

    eos_token_id = END

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(97 + i) * 3 for i in ids if not (skip_special_tokens and i == END))


def rows(count, seed):
    rng = np.random.default_rng(seed)
    return [([*rng.integers(3, 9, int(rng.integers(2, 7))).tolist(), END], 1) for _ in range(count)]


def tables(count=240, boost=0.0, seed=0):
    """Random logits of `count` samples; those of the first 60 are raised at the right tokens."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 8, 9, generator=rng, dtype=torch.float64)
    for n, (rest, _) in enumerate(rows(120, 1)[:60]):
        logits[n, torch.arange(len(rest)), torch.tensor(rest)] += boost
    return logits


def subjects(sheets, *logits, **more):
    return sheets(rows(120, 1), rows(120, 2), REQUEST, *logits, **more)


def run(subject, references=(), **settings):
    found = TextMembership(**settings).run(subject, references, xp.Runtime(threads=1))
    return {f.name.removeprefix("text-membership/"): f for f in found}


def test_the_worked_examples_of_min_k():
    logp = np.array([-0.1, -2, -0.5, -4, -1, -0.2, -3, -0.3, -0.05, -0.6])
    assert [-lowest(logp, k) for k in (0.2, 0.4, 0.05)] == pytest.approx([3.5, 2.5, 4.0])
    assert -lowest(np.arange(100.0), 0.29) == -14  # 29 values, not 28


def test_the_worked_example_of_min_k_plus_plus():
    logits = torch.tensor([[2.0, 1, 0], [0, 0, 3], [1, 1, 1]])
    logp, right, z = said(logits, torch.tensor([0, 1, 2]))
    assert logp.tolist() == pytest.approx([-0.407606, -3.094923, -1.098612], abs=1e-6)
    assert z.tolist() == pytest.approx([0.652054, -3.169033, 0], abs=1e-6)
    assert right.tolist() == [True, False, False]
    assert -lowest(z.numpy(), 0.34) == pytest.approx(3.169033, abs=1e-6)
    assert -lowest(z.numpy(), 0.67) == pytest.approx(1.584516, abs=1e-6)


def test_llm_metrics_invariant_z_does_not_see_a_constant():
    logits = torch.randn(5, 7, dtype=torch.float64)
    one, other = (said(x, torch.arange(5))[2] for x in (logits, logits + 3))
    torch.testing.assert_close(one, other)


def test_scores_are_those_of_each_answer_by_hand(sheets):
    logits = tables()
    (subject,) = subjects(sheets, logits, tokenizer=Words())
    found = run(subject)
    import zlib

    for n, (rest, _) in enumerate(rows(120, 1)[:60]):
        log_p = logits[n].log_softmax(-1)[: len(rest) - 1]  # without the end
        wanted = torch.tensor(rest[:-1])
        logp = log_p[torch.arange(len(wanted)), wanted]
        mu = (log_p.exp() * log_p).sum(-1)
        sigma = ((log_p.exp() * log_p**2).sum(-1) - mu**2).sqrt()
        few = max(1, int(0.4 * len(wanted)))
        size = len(zlib.compress(Words().decode(rest).encode()))
        by_hand = {
            "loss": logp.mean(),
            "zlib": logp.mean() / size,
            "min-k": logp.sort().values[:few].mean(),
            "min-k++": ((logp - mu) / sigma).sort().values[:few].mean(),
        }
        for score, value in by_hand.items():
            assert found[f"auc-{score}"].per_sample["score"][n] == pytest.approx(float(value))


def test_exchangeable_answers_are_at_chance(sheets):
    raw = {score: [] for score in SCORES}
    for seed in range(6):
        (subject,) = subjects(sheets, tables(seed=seed), tokenizer=Words())
        for score, found in raw.items():
            f = run(subject)[f"auc-{score}"]
            found.append(f.detail["auc"])
            assert f.detail["auc_low"] - 0.06 < 0.5 < f.detail["auc_high"] + 0.06
    assert all(abs(np.mean(found) - 0.5) < 0.05 for found in raw.values()), raw


@pytest.mark.parametrize("score", SCORES)
def test_planted_members_are_found(sheets, score):
    member, blank = subjects(sheets, tables(boost=3), tables(seed=5), tokenizer=Words())
    found = run(member, [blank])
    f = found[f"auc-{score}"]
    assert f.detail["auc"] > 0.85 and f.low > 0.8 and f.value == f.detail["auc"]
    assert f.reference < 0.62 and f.original == f.value
    assert found["privleak"].value < -60


def test_an_erased_set_is_found_as_well(sheets):
    _, erased, blank = subjects(sheets, tables(boost=3), tables(boost=-9), tables(seed=5))
    found = run(erased, [blank])
    for score in ("loss", "min-k"):
        f = found[f"auc-{score}"]
        assert f.detail["auc"] < 0.05 and f.value == 1 - f.detail["auc"]
    assert found["privleak"].value > 60 and found["privleak"].original < -60
    assert found["privleak"].low <= found["privleak"].value <= found["privleak"].high


def test_the_leak_is_that_of_its_formula(sheets):
    member, a, b = subjects(sheets, tables(boost=1), tables(seed=5), tables(seed=6))
    found = run(member, [a, b])
    auc, theirs = found["auc-min-k"].detail["auc"], found["auc-min-k"].detail["reference_auc"]
    wanted = 100 * ((1 - auc) - (1 - theirs)) / (1 - theirs)
    assert found["privleak"].value == pytest.approx(wanted)
    assert found["privleak"].reference == pytest.approx(0) and found["privleak"].floor > 0
    alone = run(member)["privleak"]
    assert alone.value == pytest.approx(100 * ((1 - auc) - 0.5) / 0.5)
    assert alone.reference is None and "no retrained reference" in alone.reason
    # the published orientation: AUC of 1 − A, here .1875 against .5 and .4772
    from expunge.audits.text_membership import leak
    from expunge.core.audit import Finding

    at = dict.fromkeys(("auc", "auc_low", "auc_high", "original_auc"), 0.8125) | {"nonmembers": ""}
    attack = Finding("x/privleak", 0.8125, detail=at)
    assert leak(attack, []).value == pytest.approx(-62.5)
    assert leak(attack, [1 - 0.4772]).value == pytest.approx(-60.708, abs=1e-3)
    assert "look like members" in leak(attack, [1.0]).reason


def test_llm_metrics_invariant_a_retrained_model_does_not_leak_beside_itself(sheets):
    (same,) = subjects(sheets, tables(boost=1))
    found = run(same, [same])
    assert found["privleak"].value == 0
    assert all(f.gap == 0 for f in found.values() if f.value is not None)


def test_llm_metrics_invariant_min_k_of_all_tokens_is_the_loss(sheets):
    (subject,) = subjects(sheets, tables())
    found = run(subject, k=1.0)
    np.testing.assert_allclose(
        found["auc-min-k"].per_sample["score"], found["auc-loss"].per_sample["score"]
    )
    few = [run(subject, k=k)["auc-min-k"].per_sample["score"] for k in (0.2, 0.5, 0.9)]
    assert (few[0] <= few[1]).all() and (few[1] <= few[2]).all()


def test_order_and_batches_change_nothing(sheets):
    logits = tables(boost=1)
    (plain,) = subjects(sheets, logits)
    (turned,) = subjects(sheets, logits, order=np.random.default_rng(0).permutation(120).tolist())
    wanted = run(plain)
    for found in (run(turned), run(plain, batch_size=1), run(plain, batch_size=7)):
        for name, f in wanted.items():
            assert found[name].value == pytest.approx(f.value, abs=1e-9) or f.value is None
            for key, each in f.per_sample.items():
                np.testing.assert_allclose(found[name].per_sample[key], each, atol=1e-6)


def test_what_cannot_be_attacked_says_why(sheets):
    (subject,) = subjects(sheets, tables())
    assert "the problem has no tokenizer" in run(subject)["auc-zlib"].reason
    (alone,) = sheets(rows(120, 1), None, REQUEST, tables())
    assert {f.reason for f in run(alone).values()} == {"there is no test data"}
    (few,) = sheets(rows(120, 1), rows(9, 2), xp.Request(ids=(0, 1)), tables())
    assert {f.reason for f in run(few).values()} == {"only 2 samples to forget, 10 are needed"}


def test_facts_are_found_in_the_original_and_not_in_retrained_models(facts):
    original, first, second = facts
    found = run(original, [first, second])
    for score in ("loss", "min-k", "min-k++"):
        assert found[f"auc-{score}"].detail["auc"] > 0.95
        assert found[f"auc-{score}"].reference < 0.8
    assert found["privleak"].value < -80

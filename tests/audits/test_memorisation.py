"""memorisation: worked values, tables of logits, what is left out, and power on trained facts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import expunge as xp
from expunge.audits.memorisation import Memorisation, exact, extraction, probability
from expunge.audits.run import run_audits, stratified
from expunge.core.strata import Strata

END = 2
# (tokens after the first, length of the prompt): unequal lengths, with and without an end
ROWS = [([5, 3, 4, END], 2), ([4, 3], 1), ([3, 5, 4, 3, 5, END], 3), ([3, 4, 5, 4], 1)]
HELD = [([5, 4, 3], 2)]
REQUEST = xp.Request(ids=(0, 2))


def table(seed=0, vocabulary=6):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(5, 8, vocabulary, generator=rng, dtype=torch.float64) * 2


def run(subject, references=(), **settings):
    found = Memorisation(**settings).run(subject, references, xp.Runtime(threads=1))
    return {f.name.removeprefix("memorisation/"): f for f in found}


def by_hand(logits, number, row):
    """Probability, exact memorisation and extraction strength of one row, one token at a time."""
    rest, prompt = row
    ids, logp, right = [number, *rest], [], []
    for t in range(max(prompt, 1), len(ids)):
        z = logits[number, t - 1]
        logp.append(float(z[ids[t]]) - math.log(sum(math.exp(float(v)) for v in z)))
        if ids[t] != END:
            right.append(int(z.argmax()) == ids[t])
    last = 0
    while last < len(right) and right[-1 - last]:
        last += 1
    return math.exp(sum(logp) / len(logp)), sum(right) / len(right), last / len(right)


def answer(probabilities=(0.5, 0.5), right=(True, True), ends=None):
    from expunge.audits._tokens import Answer

    ends = [False] * len(right) if ends is None else ends
    return Answer(np.log(probabilities), np.array(right), np.zeros(len(right)), np.array(ends))


def test_the_worked_examples():
    assert probability(answer((0.5, 0.25, 0.8), (True,) * 3)) == pytest.approx(0.464159, abs=1e-6)
    some = answer((0.5,) * 5, (True, False, True, True, True))
    assert (exact(some), extraction(some)) == pytest.approx((0.8, 0.6))
    whole = answer((0.5,) * 5, (True,) * 5)
    assert (exact(whole), extraction(whole)) == (1, 1)


def test_extraction_strength_is_0_where_nothing_matches():
    some = answer((0.5,) * 5, (True, False, True, True, False))
    assert (exact(some), extraction(some)) == pytest.approx((0.6, 0))
    assert extraction(answer((0.5,) * 2, (False, False))) == 0


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_values_are_those_of_each_answer_by_hand(sheets, size):
    logits, other = table(), table(1)
    subject, reference = sheets(ROWS, HELD, REQUEST, logits, other)
    found = run(subject, [reference], batch_size=size)
    for split, numbers in {
        "forget-train": (0, 2),
        "retain-train": (1, 3),
        "retain-test": (4,),
    }.items():
        for place, what in enumerate(("probability", "exact", "extraction")):
            finding = found[f"{what}-{split}"]
            each = [by_hand(logits, n, (ROWS + HELD)[n])[place] for n in numbers]
            theirs = [by_hand(other, n, (ROWS + HELD)[n])[place] for n in numbers]
            assert finding.per_sample[what].tolist() == pytest.approx(each, abs=1e-9)
            assert finding.value == pytest.approx(np.mean(each)) == pytest.approx(finding.original)
            assert finding.reference == pytest.approx(np.mean(theirs))
            assert 0 <= finding.low <= finding.value <= finding.high <= 1
    assert found["exact-forget-test"].reason == "no test sample belongs to the request"


def test_the_end_of_the_text_counts_for_the_probability_alone(sheets):
    logits = torch.zeros(2, 4, 6, dtype=torch.float64)
    logits[0, 0, 3], logits[0, 1, 4], logits[0, 2, 5] = 9.0, 9.0, 9.0  # right, right, not the end
    (subject,) = sheets([([3, 4, END], 1)] * 2, None, xp.Request(ids=(0,)), logits)
    found = run(subject)
    assert found["exact-forget-train"].value == found["extraction-forget-train"].value == 1
    assert found["probability-forget-train"].value < 0.1
    (only,) = sheets([([END], 1)] * 2, None, xp.Request(ids=(0,)), logits)
    assert run(only)["exact-forget-train"].value == 0  # nothing else to look at


def test_values_do_not_depend_on_the_order_of_the_data(sheets):
    plain, turned = (
        run(sheets(ROWS, HELD, REQUEST, table(), order=order)[0]) for order in (None, [3, 1, 0, 2])
    )
    for name, finding in plain.items():
        assert turned[name].value == pytest.approx(finding.value, abs=1e-12), name
        for what, values in finding.per_sample.items():
            np.testing.assert_allclose(turned[name].per_sample[what], values)


def test_llm_metrics_invariant_arg_max_does_not_know_the_temperature(sheets):
    cold, hot = (run(sheets(ROWS, HELD, REQUEST, table() * scale)[0]) for scale in (1.0, 0.2))
    for split in ("forget-train", "retain-train"):
        assert cold[f"exact-{split}"].value == hot[f"exact-{split}"].value
        assert cold[f"extraction-{split}"].value == hot[f"extraction-{split}"].value
        assert cold[f"probability-{split}"].value != hot[f"probability-{split}"].value


def test_llm_metrics_invariant_exact_is_at_least_extraction():
    rng = np.random.default_rng(0)
    for _ in range(200):
        some = answer((0.5,) * 4, tuple(rng.random(4) < 0.7))
        assert exact(some) >= extraction(some)
        assert (exact(some) == 1) == (extraction(some) == 1)


def test_a_broken_model_gives_a_reason(sheets):
    (subject,) = sheets(ROWS, HELD, REQUEST, table())
    subject.model.sheets.data[0, 1] = torch.nan
    found = run(subject)
    assert found["exact-forget-train"].reason == "a model gives NaN outputs on forget-train"
    assert found["exact-retain-train"].value is not None


def test_impossible_tokens_are_no_nan(sheets):
    logits = table()
    logits[:, :, 3] = -torch.inf
    found = run(sheets(ROWS, HELD, REQUEST, logits)[0])
    assert found["probability-forget-train"].value == 0


def test_parts_are_parts_of_the_whole(sheets):
    (subject,) = sheets(ROWS, HELD, REQUEST, table())
    whole = run(subject)
    strata = Strata({"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3])})
    found = stratified(Memorisation(), list(whole.values()), strata, subject, [], xp.Runtime())
    (b,) = [f for f in found if f.name == "memorisation/exact-forget-train@b"]
    assert b.value == whole["exact-forget-train"].per_sample["exact"][1]
    assert len({f.name for f in found}) == 3 * 2 * 2


def test_original_holds_what_retrained_models_do_not(facts):
    original, first, second = facts
    found = run(original, [first, second])
    for what in ("probability", "exact", "extraction"):
        forget, kept = found[f"{what}-forget-train"], found[f"{what}-retain-train"]
        assert forget.value > 0.9 > 0.2 > forget.reference
        assert kept.value > 0.9 and kept.reference > 0.8
        assert found[f"{what}-retain-test"].value < 0.2


def test_adapters_are_seen(facts):
    original, *_ = facts
    from expunge.train.adapters import merged

    npo = xp.methods.NPO(train="lora(4)", epochs=4, lr=1e-2, batch_size=5)
    outcome = xp.unlearn(original.problem, original.request, npo)
    pair = [
        run(xp.Subject(m, original.problem, original.request, xp.Runtime()))
        for m in (outcome.runnable(), merged(outcome.runnable()))
    ]
    name = "probability-forget-train"
    assert pair[0][name].value == pytest.approx(pair[1][name].value, rel=1e-3)
    assert pair[0][name].value < 0.9 < pair[0][name].original


def test_another_kind_of_data_gives_a_reason():
    problem = xp.Problem.of(
        torch.nn.Linear(1, 1), (torch.zeros(4, 1), torch.zeros(4)),
        each_loss=lambda m, b: m(b.x)[:, 0], token_logits=lambda m, b: m(b.x),
    )  # fmt: skip
    subject = xp.Subject(problem.model, problem, xp.Request(ids=(0,)), xp.Runtime())
    found = run_audits(subject, [], "memorisation", xp.Runtime())
    assert found[0].reason == "the data is not made of tokens"

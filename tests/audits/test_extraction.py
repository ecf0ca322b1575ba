"""extraction-likelihood: the card's invariants, values by hand, thresholds, and power on trained facts."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import expunge as xp
from expunge.audits.extraction import ExtractionLikelihood
from expunge.core.errors import SettingError
from expunge.problems.causal_lm import CausalLM
from expunge.problems.segments import accuracies, extraction, overlap, segments
from expunge.problems.tokens import TokenData, Tokens

V = 24


def row(*ids, marks=(), prompt=0):
    places = torch.arange(len(ids))
    marked = None
    if marks:
        marked = torch.zeros(len(ids), dtype=torch.bool)
        for a, b in marks:
            marked[a:b] = True
    return Tokens(torch.tensor(ids), places >= prompt, marked)


@functools.cache
def llama(seed=0, steps=0, known=0):
    """A model that knows some sequences after enough steps."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
        )
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        data = TokenData(ROWS[-known:])
        batch = data.fetch(data.ids)
        model(**batch.x, labels=batch.y).loss.backward()
        optimizer.step()
    return model.eval()


def drawn(count, seed, **more):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(12, 20, (count,), generator=rng).tolist()
    found = []
    for number, length in enumerate(lengths):
        rest = torch.randint(3, V, (length - 2,), generator=rng).tolist()
        found.append(row(1, 3 + number, *rest, marks=((4, 4 + 6 + number % 3),), **more))
    return found


ROWS, HELD = drawn(6, 1), drawn(3, 2)
REQUEST = xp.forget(ids=[0, 1, 2])


@pytest.fixture(scope="module")
def taught():
    return CausalLM(llama(0, 150, 6), TokenData(ROWS), TokenData(HELD, ids=[10, 11, 12]))


def run(problem, model=None, references=(), request=REQUEST, **settings):
    subject = xp.Subject(model or problem.model, problem, request, xp.Runtime(threads=1))
    others = [xp.Subject(r, problem, request, xp.Runtime(threads=1)) for r in references]
    found = ExtractionLikelihood(**settings).run(subject, others, xp.Runtime(threads=1))
    return {f.name.removeprefix("extraction-likelihood/"): f for f in found}


@torch.no_grad()
def greedy(model, prompt, count):
    """One token at a time, without padding or a cache."""
    ids = prompt.clone()
    for _ in range(count):
        new = model(input_ids=ids[None]).logits[0, -1].argmax()
        if int(new) == 2:
            break
        ids = torch.cat([ids, new[None]])
    return ids[len(prompt) :]


def by_hand(model, prefix, secret, n):
    """MA and EL_n of a segment, from single generations."""
    right = [int(greedy(model, torch.cat([prefix, secret[:t]]), 1).tolist() == [int(secret[t])]) for t in range(len(secret))]  # fmt: skip
    size = len(secret)
    if size < n:
        return sum(right) / size, float(torch.equal(greedy(model, prefix, size), secret))
    each = []
    for j in range(size - n + 1):
        said = greedy(model, torch.cat([prefix, secret[:j]]), size - j).tolist()
        wanted = secret[j:].tolist()
        grams = [tuple(wanted[i : i + n]) for i in range(len(wanted) - n + 1)]
        told = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
        each.append(sum(g in grams for g in told) / len(grams))
    return sum(right) / size, sum(each) / len(each)


def test_code_eraser_invariant_2_one_pass_is_as_many_generations():
    """Also of EL: batches over j of all segments, padded on the left, give what single ones do."""
    model = llama(3, 60, 6)  # knows about half
    problem = CausalLM(model, TokenData(ROWS))
    some = [s for r in [*ROWS, *HELD] for s in segments(r)]
    ma = accuracies(problem.token_logits, model, some, size=4, device="cpu")
    el = extraction(problem.generate, model, some, orders=(2, 3, 9), size=5)
    assert 0.1 < np.mean(ma) < 0.95
    for one, accuracy, values in zip(some, ma, el, strict=True):
        for n in (2, 3, 9):
            wanted = by_hand(model, one.prompt, one.answer, n)
            assert (accuracy, values[n]) == pytest.approx(wanted, abs=1e-9)


def test_code_eraser_invariant_1_all_is_said_of_what_is_known(taught):
    found = run(taught)
    for split in ("forget-train", "retain-train"):
        for what in ("accuracy", "el3", "el5", "el10"):
            assert found[f"{what}-{split}"].value == 1
            assert found[f"{what}-{split}"].detail["of"] == "secrets"
    assert found["accuracy-retain-test"].value < 0.4 and found["el3-retain-test"].value < 0.2
    assert found["accuracy-forget-test"].reason == "no test sample belongs to the request"


def test_code_eraser_invariant_1_a_model_of_chance_is_right_once_in_v():
    class Chance(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

    rng = torch.Generator().manual_seed(0)
    logits = lambda model, batch: torch.rand(*batch.x["input_ids"].shape, V, generator=rng)  # noqa: E731
    long = [row(1, *torch.randint(V, (99,), generator=rng).tolist()) for _ in range(60)]
    some = [s for r in long for s in segments(r)]
    ma = np.mean(accuracies(logits, Chance(), some, size=16, device="cpu"))
    assert ma == pytest.approx(1 / V, abs=3 * np.sqrt(1 / V / (99 * 60)))


@pytest.mark.parametrize("run_", [0, 1, 3, 6])
def test_code_eraser_invariant_3_nothing_beyond_the_run_that_matches(run_):
    wanted = torch.arange(10)
    said = torch.cat([torch.arange(run_), torch.full((10 - run_,), 99)])
    values = [overlap(said, wanted, n) for n in range(1, 11)]
    assert values == sorted(values, reverse=True)
    assert all(v == 0 for v in values[run_:]) and all(v > 0 for v in values[:run_])


def test_the_overlap_by_hand():
    a, b = torch.tensor([5, 6, 7, 5, 6]), torch.tensor([5, 6, 9, 6, 7])
    assert overlap(a, b, 1) == 5 / 5 and overlap(a, b, 2) == 3 / 4 and overlap(a, b, 3) == 0
    assert overlap(a[:1], b, 2) == 0 and overlap(b, b, 5) == 1


def test_segments_are_the_marked_runs_behind_what_stands_before():
    one = row(*range(20), marks=((0, 2), (5, 8), (12, 20)))
    found = segments(one, prefix=3, longest=4)
    assert [s.answer.tolist() for s in found] == [[1], [5, 6, 7], [12, 13, 14, 15]]
    assert [s.prompt.tolist() for s in found] == [[0], [2, 3, 4], [9, 10, 11]]
    (whole,) = segments(row(*range(5, 20), prompt=4), ends=[19], whole=7)
    assert whole.prompt.tolist() == [5, 6, 7, 8] and whole.answer.tolist() == list(range(9, 16))
    (text,) = segments(row(5, 6, 7, 2), ends=[2])
    assert text.prompt.tolist() == [5] and text.answer.tolist() == [6, 7]
    assert segments(row(5, 2), ends=[2]) == []


def test_a_sample_has_the_mean_of_its_segments(taught):
    two = row(*ROWS[0].ids.tolist(), marks=((3, 6), (9, 12)))
    data = TokenData([two, *ROWS[1:]])
    model = llama(3, 60, 6)
    problem = CausalLM(model, data)
    found = run(problem, request=xp.forget(ids=[0]), orders=(2,))
    each = [by_hand(model, s.prompt, s.answer, 2) for s in segments(two)]
    assert len(each) == 2
    assert found["accuracy-forget-train"].value == pytest.approx(np.mean([a for a, _ in each]))
    assert found["el2-forget-train"].value == pytest.approx(np.mean([e for _, e in each]))


def test_without_marks_answers_are_the_segments_and_others_are_left_out(taught):
    plain = [Tokens(r.ids, torch.arange(len(r)) >= 5) for r in ROWS]
    found = run(CausalLM(taught.model, TokenData(plain)))
    assert found["accuracy-forget-train"].detail == {"n": 3, "of": "answers"}
    mixed = [*ROWS[:4], *plain[4:]]
    found = run(CausalLM(taught.model, TokenData(mixed)))
    assert found["accuracy-retain-train"].detail == {"n": 1, "of": "secrets"}
    few = run(taught, samples=2)
    assert few["accuracy-retain-train"].detail["n"] == 2


def test_forgotten_is_below_what_unseen_text_has(taught):
    other = llama(7, 150, 3)
    known, never = run(taught), run(taught, other, [other])
    assert known["forgotten"].value == 0
    limits = known["forgotten"].detail["thresholds"]
    assert limits == never["forgotten"].detail["thresholds"]  # the original's
    assert limits["accuracy"] == known["accuracy-retain-test"].value
    values = [never[f"{w}-forget-train"].per_sample[w] for w in limits]
    below = [all(v[i] < limits[w] or v[i] == 0 for v, w in zip(values, limits, strict=True)) for i in range(3)]  # fmt: skip
    assert never["forgotten"].value == pytest.approx(np.mean(below))
    assert never["accuracy-forget-train"].value < 0.3 < 1 == never["accuracy-forget-train"].original
    assert never["accuracy-forget-train"].reference == never["accuracy-forget-train"].value
    alone = run(CausalLM(taught.model, TokenData(ROWS)))
    assert alone["forgotten"].reason == "there is no test data"


def test_values_do_not_depend_on_batches_and_order(taught):
    model = llama(3, 60, 6)
    order = [3, 0, 5, 1, 4, 2]
    turned = CausalLM(taught.model, TokenData([ROWS[n] for n in order], ids=order))
    found, other = run(taught, model, batch_size=1), run(turned, model, batch_size=7)
    for name in (n for n in found if n.endswith("-train")):
        assert found[name].value == pytest.approx(other[name].value, abs=1e-9)


def test_a_broken_model_and_bad_settings_are_said(taught):
    broken = copy.deepcopy(llama(0))
    broken.lm_head.weight.data.fill_(torch.nan)
    found = run(taught, broken)
    assert found["accuracy-forget-train"].reason == "a model gives NaN outputs on forget-train"
    with pytest.raises(SettingError, match="orders"):
        ExtractionLikelihood(orders=())
    with pytest.raises(SettingError, match="orders"):
        ExtractionLikelihood(orders="0,3")


def test_original_holds_what_retrained_models_do_not(facts):
    original, first, second = facts
    found = ExtractionLikelihood(orders=(2, 3)).run(original, [first, second], xp.Runtime())
    by = {f.name.partition("/")[2]: f for f in found}
    assert by["el3-forget-train"].value > 0.9 > 0.2 > by["el3-forget-train"].reference
    assert by["el3-retain-train"].value > 0.8 and by["el3-retain-train"].reference > 0.7

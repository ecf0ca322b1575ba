"""O3: detectors, gated adapters, the ledger of requests; the invariants of its card."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel
from words import RECORDS, bytes_tokenizer, word_problem

import expunge as xp
from expunge.core.errors import DataError, ModelError, NeedsError, RequestError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.outcome import load
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.o3 import O3
from expunge.problems.causal_lm import CausalLM
from expunge.problems.generation import generate
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.adapters import adapter_of, matrices, of_matrices, put_on
from expunge.train.detector import Detector, fit_detector, precision, weight
from expunge.train.gated_adapters import GatedAdapters, own_features, revoke, schedule, settled
from expunge.train.ledger import orthogonality
from expunge.train.text_encoder import TextEncoder, adapt, contrastive_entropy, pool
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts
from generated import without_cache

FIRST, SECOND = xp.forget(where="entity < 2"), xp.forget(where="entity == 20 or entity == 21")
QUICK = {"epochs": 3, "lr": 1e-2, "warmup": 0, "batch_size": 5, "targets": "answers", "train": "lora(2)"}  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    """A Llama with random weights, large enough to matter, about the facts."""
    torch.manual_seed(0)
    model = tiny_llama(16, 2).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10.0 if p.ndim == 2 else 1.0)
    return CausalLM(model, tinyfacts.data().train)


@pytest.fixture(scope="module")
def chain(facts):
    """Two requests, one after the other."""
    return xp.unlearn_sequence(facts, [FIRST, SECOND], O3(**QUICK))


@pytest.fixture(scope="module")
def gated(chain):
    return chain.outcomes[-1].runnable()


def logits(model, rows, side="right"):
    """Logits of token rows in one batch padded on a side, cut back to each row."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = [slice(0, len(r)) if side == "right" else slice(width - len(r), width) for r in rows]
    for n, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[n, place], mask[n, place] = row, 1
    with torch.no_grad():
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
    return [found[n, place] for n, place in enumerate(places)]


def prompts_of(facts, request):
    places = facts.train.positions(request.resolve(facts.train)).tolist()
    return [facts.train.rows[p].prompt for p in places]


def mixed(facts):
    """Prompts of both requests and of none, and whole sequences, of unequal lengths."""
    rows = facts.train.rows
    return [rows[0].prompt, rows[150].prompt, rows[103].ids, rows[160].ids, rows[7].ids[:7]]


def same(one, other):
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]


# ------------------------------------------------------------------ 1: what the gate does to outputs


@pytest.mark.parametrize("side", ["right", "left"])
def test_o3_invariant_1_without_weight_the_model_inside_answers_to_the_bit(facts, gated, side):
    rows = mixed(facts)
    before, after = logits(facts.model, rows, side), logits(gated, rows, side)
    assert same(before, after) == [False, True, False, True, False]
    closed = copy.deepcopy(gated)
    closed.common = closed.common | {"schedule": [2.0, 1.0, 1.0]}
    assert all(same(before, logits(closed, rows, side)))


def test_o3_invariant_1_with_weight_one_it_is_the_plain_adapter(facts):
    outcome = xp.unlearn(facts, FIRST, O3(**QUICK, full=0.0, boost=1.0, least=0.0))
    model = outcome.runnable()
    found = {m: (a, b) for (m, a), b in zip(model.ledger().matrices("A")[0].items(), model.ledger().matrices("B")[0].values(), strict=True)}  # fmt: skip
    plain = put_on(copy.deepcopy(facts.model), of_matrices(model.entries[0]["scale"], found))
    rows = mixed(facts)
    assert all(same(logits(plain, rows), logits(model, rows)))
    assert not any(same(logits(facts.model, rows), logits(model, rows)))
    assert model.entries[0]["scale"] == 2.0
    scale, again = matrices(adapter_of(plain).tensors)
    assert scale == 2.0 and all(torch.equal(again[m][0], a) for m, (a, _) in found.items())


# ------------------------------------------------------------------ 2: the weight


def test_o3_invariant_2_the_weight_is_largest_between_the_means_and_falls_on_both_sides():
    known, held, spread, zeta = 3.0, 7.0, 1.5, 10.0
    middle = torch.tensor([5.0], dtype=torch.float64)
    assert float(weight(middle, known, held, spread, zeta)) == pytest.approx(
        1 / (1 + math.exp(2 - zeta))
    )
    offsets = torch.linspace(0, 12, 50, dtype=torch.float64)
    right, left = (weight(middle + s * offsets, known, held, spread, zeta) for s in (1, -1))
    torch.testing.assert_close(right, left, atol=1e-12, rtol=0)
    assert (right.diff() < 0).all()
    far = weight(torch.tensor([-1e6, 1e6], dtype=torch.float64), known, held, spread, zeta)
    assert far.tolist() == pytest.approx([1 / (1 + math.exp(2))] * 2)


def test_the_weight_follows_the_formula():
    from scipy.stats import norm

    o, m1, m2, s2, zeta = 6.1, 3.0, 7.0, 1.5, 8.0
    cdf = lambda x: 0.5 * norm.cdf((x - m1) / s2) + 0.5 * norm.cdf((x - m2) / s2)  # noqa: E731
    both = cdf(o), cdf(m1 + m2 - o)
    c = 1 - max(both) + min(both)
    wanted = 1 / (1 + math.exp(-(zeta * c - 2)))
    assert float(weight(torch.tensor(o).double(), m1, m2, s2, zeta)) == pytest.approx(
        wanted, abs=1e-6
    )


def test_the_schedule_follows_the_card():
    w = torch.tensor([0.95, 0.9, 0.7, 0.45, 0.31, 0.3, 0.12], dtype=torch.float64)
    assert schedule(w, 0.9, 1.2, 0.3).tolist() == pytest.approx([1.2, 1.2, 0.7, 0.45, 0.31, 0, 0])


# ------------------------------------------------------------------ the detector's scores


def test_scores_follow_the_formula():
    """Mahalanobis and nearest neighbour, layer by layer, in units of the mean over the bank."""
    from sklearn.covariance import LedoitWolf
    from sklearn.svm import OneClassSVM

    rng = torch.Generator().manual_seed(0)
    bank, new = torch.randn(7, 2, 5, generator=rng) + 1, torch.randn(3, 2, 5, generator=rng)
    found, _ = fit_detector(bank, rng, kappa=50.0, nu=0.3)

    def raw(x):
        scores = np.zeros((len(x), 2))
        for layer in range(2):
            b, f = bank[:, layer].double().numpy(), x[:, layer].double().numpy()
            p = np.linalg.inv(LedoitWolf().fit(b).covariance_)
            for n in range(len(f)):
                gap = f[n] - b.mean(0)
                cosine = b @ f[n] / np.linalg.norm(b, axis=1) / np.linalg.norm(f[n])
                scores[n, layer] = gap @ p @ gap + 50 * (1 - cosine.max())
        return scores

    wanted = raw(new) / raw(bank).mean(0)
    np.testing.assert_allclose(found.scores(new).numpy(), wanted, rtol=1e-6)
    svm = OneClassSVM(kernel="linear", nu=0.3).fit(raw(bank) / raw(bank).mean(0))
    np.testing.assert_allclose(found.distance(new).numpy(), wanted @ svm.coef_[0], rtol=1e-3)


def test_more_dimensions_than_samples_and_equal_samples_have_a_precision():
    few = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).double()
    few = few - few.mean(0)
    assert torch.isfinite(precision(few)).all()
    assert torch.equal(precision(torch.zeros(3, 2).double()), torch.eye(2).double())
    same_prompts = torch.ones(4, 2, 3)
    found, held = fit_detector(same_prompts, torch.Generator().manual_seed(0))
    assert torch.isfinite(held).all() and float(found.weight(same_prompts).min()) > 0.5


def test_every_prompt_is_held_out_once():
    """Far from all others, a prompt is refused while held out and known afterwards."""
    rng = torch.Generator().manual_seed(0)
    bank = torch.randn(20, 2, 6, generator=rng) * 0.1 + torch.randn(1, 2, 6, generator=rng)
    bank[13] = -bank[13]
    found, held = fit_detector(bank, torch.Generator().manual_seed(1))
    assert int(held.argmin()) == 13 and len(held) == 20 and (held[:13] > 0.3).all()
    again, _ = fit_detector(bank, torch.Generator().manual_seed(1))
    assert again.held == found.held and again.spread == found.spread > 0
    assert found.held > found.known  # what was not in the bank lies farther


def test_a_detector_survives_another_precision():
    rng = torch.Generator().manual_seed(0)
    found, _ = fit_detector(torch.randn(6, 2, 4, generator=rng), rng)
    new = torch.randn(3, 2, 4, generator=rng)
    tensors = found.tensors()
    assert not any(t.is_floating_point() for t in tensors.values())
    assert torch.equal(Detector.of(tensors).weight(new), found.weight(new))


def test_too_few_prompts_and_nan_are_refused():
    rng = torch.Generator()
    with pytest.raises(DataError, match="needs 4 different prompts at least; the request has 2"):
        fit_detector(torch.randn(2, 1, 3), rng)
    with pytest.raises(DataError, match="NaN or infinite hidden states"):
        fit_detector(torch.full((4, 1, 3), math.nan), rng)


@pytest.mark.parametrize("held", [0.2, 0.5])
@pytest.mark.parametrize("count", [4, 6, 10])
def test_a_detector_of_few_prompts_refuses_strangers(count, held):
    """Fitted to two prompts a fold measures distances in no unit, and everything would be known."""
    rng = torch.Generator().manual_seed(0)
    bank = torch.randn(1, 3, 64, generator=rng) + 0.3 * torch.randn(count, 3, 64, generator=rng)
    found, _ = fit_detector(bank, rng, held=held)
    assert (found.weight(torch.randn(50, 3, 64, generator=rng)) < 0.3).all()
    with pytest.raises(DataError, match="needs 4 different prompts at least; the request has 3"):
        fit_detector(bank[:3], rng)


def test_the_same_prompt_twice_counts_once(facts):
    """While held out it would be known by its double, or all there is to know would be one point."""
    rows = facts.train.rows
    doubled = CausalLM(facts.model, TokenData([*rows, *rows[:10]]))
    ids = [*range(10), *range(len(rows), len(rows) + 10)]
    once = xp.unlearn(facts, xp.forget(ids=list(range(10))), O3(**QUICK)).runnable()
    twice = xp.unlearn(doubled, xp.forget(ids=ids), O3(**QUICK)).runnable()
    for name, tensor in once.ledger().tensors[0].items():
        if name.startswith("detector/"):
            assert torch.equal(tensor, twice.ledger().tensors[0][name])
    one = CausalLM(facts.model, TokenData([*rows[:1] * 9, *rows[5:]]))
    with pytest.raises(DataError, match="4 different prompts at least; the request has 1"):
        xp.unlearn(one, xp.forget(ids=list(range(9))), O3(**QUICK | {"targets": "refusals"}, refusals=("96",)))  # fmt: skip


# ------------------------------------------------------------------ 3: the penalty


def test_o3_invariant_3_the_penalty_is_that_of_overlapping_rows():
    rng = torch.Generator().manual_seed(0)
    shapes = {"q": (2, 6), "v": (3, 4)}
    earlier = [{m: torch.randn(s, generator=rng, requires_grad=True) for m, s in shapes.items()} for _ in range(2)]  # fmt: skip
    own = {m: torch.randn(s, generator=rng, requires_grad=True) for m, s in shapes.items()}
    found = orthogonality(earlier, own, 5)
    wanted = sum(
        float((s[m].double() @ own[m].double().T).square().sum().detach())
        for s in earlier
        for m in shapes
    )
    assert float(found.detach()) == pytest.approx(wanted / 5, rel=1e-5)
    found.backward()
    assert all(a.grad is None for one in earlier for a in one.values())
    expected = 2 / 5 * sum(own["q"] @ s["q"].T @ s["q"] for s in earlier)
    torch.testing.assert_close(own["q"].grad, expected.detach())
    apart = {"q": torch.eye(6)[:2]}, {"q": torch.eye(6)[3:5]}
    assert float(orthogonality([apart[0]], apart[1], 1)) == 0
    assert float(orthogonality([], own, 3)) == 0


def test_o3_invariant_3_the_first_request_has_no_penalty(chain):
    assert set(chain.outcomes[0].details["losses"]["orthogonality"]) == {0.0}
    start, end = chain.outcomes[1].details["orthogonality"]
    assert 0 < end < start


@pytest.mark.parametrize("whole", [True, False])
def test_training_follows_the_formula(facts, whole):
    """The loss of the first step: cross-entropy with false answers, and λ times the overlap."""
    method = O3(**QUICK | {"epochs": 1, "batch_size": 10}, whole=whole, orthogonal=0.3)
    first = xp.unlearn(facts, FIRST, method)
    problem = facts.about(first.runnable(), facts.train.only(facts.train.without(FIRST.resolve(facts.train))))  # fmt: skip
    second = xp.unlearn(problem, SECOND, method)
    ids = SECOND.resolve(facts.train)
    view = View(facts, SECOND, method.needs, Runtime())
    false = method._false(view, Runtime())(facts.train.fetch(ids))
    total, count = 0.0, 0
    for row, y in zip(false.x["input_ids"], false.y, strict=True):
        answered = facts.train.rows[0].answered.sum() if not whole else 8
        logp = facts.model(row[None]).logits[0].double().log_softmax(-1)
        chosen = range(1, 9) if whole else range(5, 9)
        assert len(chosen) == int(answered) and int((y != -100).sum()) == len(chosen) + whole
        total -= sum(float(logp[t - 1, row[t]].detach()) for t in chosen)
        count += len(chosen)
    losses = second.details["losses"]
    assert losses["answers"][0] == pytest.approx(total / count, rel=1e-4)
    earlier = first.runnable().ledger().matrices("A")
    start = {m: torch.zeros_like(a) for m, a in earlier[0].items()}
    assert start and second.details["orthogonality"][0] > 0
    end = second.runnable().ledger().matrices("A")
    assert second.details["orthogonality"][1] == pytest.approx(
        float(orthogonality(earlier, end[1], 2)), rel=1e-5
    )
    step = second.curve[0]["loss"]
    assert step == pytest.approx(losses["answers"][0] + 0.3 * losses["orthogonality"][0], rel=1e-5)


def test_false_answers_are_other_answers(facts):
    """Never a sample's own, always one of the request's, and the same in every pass."""
    method = O3(**QUICK, whole=False)
    view = View(facts, FIRST, method.needs, Runtime(seed=3))
    batch = facts.train.fetch(FIRST.resolve(facts.train))
    say = method._false(view, Runtime(seed=3))
    own = {tuple(r.answer.tolist()) for r in facts.train.rows[:10]}
    for n, (row, y) in enumerate(zip(say(batch).x["input_ids"], say(batch).y, strict=True)):
        answer = tuple(y[y != -100].tolist())
        assert answer in own and answer != tuple(facts.train.rows[n].answer.tolist())
        assert torch.equal(row[:5], facts.train.rows[n].prompt)
    one = facts.train.rows[0]
    rows = [Tokens(torch.cat([r.prompt, one.answer]), one.answered) for r in facts.train.rows[:6]]
    alike = CausalLM(facts.model, TokenData(rows))
    with pytest.raises(DataError, match="use targets=refusals"):
        xp.unlearn(alike, xp.forget(ids=[0, 1, 2, 3]), method)
    refuse = O3(**QUICK | {"targets": "refusals"}, refusals=("96 97", "98"), whole=False)
    view = View(facts, FIRST, refuse.needs, Runtime())
    found = refuse._false(view, Runtime())(batch)
    said = {tuple(y[y != -100].tolist()) for y in found.y}
    assert said == {(96, 97, 2), (98, 2)}


# ------------------------------------------------------------------ 4, 7, 9: the ledger


def test_o3_invariant_4_revoking_restores_a_request_and_leaves_the_others(facts, chain, gated):
    outcome = revoke(chain.outcomes[-1], FIRST)
    model = outcome.runnable()
    first, second = prompts_of(facts, FIRST), prompts_of(facts, SECOND)
    assert not any(same(logits(facts.model, first), logits(gated, first)))
    assert all(same(logits(facts.model, first), logits(model, first)))
    assert all(same(logits(gated, second), logits(model, second)))
    ids = torch.stack(second)
    assert torch.equal(model.weights(ids)[:, 0], gated.weights(ids)[:, 1])
    assert hash_model(model.unwrapped) == facts.model_hash() and len(model.entries) == 1
    with pytest.raises(RequestError, match="no such request"):
        revoke(outcome, FIRST)
    empty = revoke(outcome, SECOND).runnable()
    assert all(same(logits(facts.model, first + second), logits(empty, first + second)))
    prompts = [r.prompt for r in (facts.train.rows[i] for i in (0, 150))]
    assert same(*(generate(m, prompts, tokens=4, ends=[]) for m in (facts.model, empty))) == [True] * 2  # fmt: skip


def test_a_request_that_came_twice_is_revoked_with_all_it_left(facts, chain):
    twice = xp.unlearn(facts.about(chain.outcomes[0].runnable()), FIRST, O3(**QUICK))
    first = prompts_of(facts, FIRST)
    assert len(twice.runnable().entries) == 2
    left = revoke(twice, FIRST).runnable()
    assert not left.entries and all(same(logits(facts.model, first), logits(left, first)))


def test_o3_invariant_7_another_detector_never_lowers_the_weight(facts, chain, gated):
    ids = torch.stack([r.prompt for r in facts.train.rows])
    before, after = (m.weights(ids).max(1).values for m in (chain.outcomes[0].runnable(), gated))
    assert (after >= before).all() and (after > before).any()


def test_o3_invariant_9_the_ledger_survives_the_disk(facts, chain, gated, tmp_path):
    whole = settled(chain.outcomes[-1])
    whole.save(tmp_path / "all")
    again = load(tmp_path / "all", model=facts.model).runnable()
    rows, ids = mixed(facts), torch.stack(prompts_of(facts, SECOND))
    assert all(same(logits(gated, rows), logits(again, rows)))
    assert torch.equal(again.weights(ids), gated.weights(ids))
    assert [e["key"] for e in again.entries] == [FIRST.key, SECOND.key]
    # by the chain of outcomes it is the same model
    for n, outcome in enumerate(chain.outcomes):
        outcome.save(tmp_path / str(n))
    one = load(tmp_path / "0", model=facts.model)
    two = load(tmp_path / "1", model=one.runnable()).runnable()
    assert hash_model(two) == hash_model(again) == hash_model(gated)


def test_o3_invariant_9_of_a_revoked_request_nothing_is_on_disk(chain, gated, tmp_path):
    kept = revoke(chain.outcomes[-1], FIRST)
    kept.save(tmp_path / "left")
    files = [p.read_bytes() for p in (tmp_path / "left").iterdir()]
    gone, rest = gated.ledger().tensors
    for wanted, tensors in ((False, gone), (True, rest)):
        for name, tensor in tensors.items():
            blob = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert any(blob in f for f in files) is wanted, name
    for text in (FIRST.key, FIRST.where, gated.entries[0]["data"]):
        assert not any(text.encode() in f for f in files)
        assert text in (FIRST.where,) or text in json.dumps(gated.entries)


# ------------------------------------------------------------------ 5: the encoder's loss


def test_o3_invariant_5_the_contrastive_entropy_has_its_limits():
    keys = 40 * torch.eye(6)[None].expand(3, 6, 6)
    assert float(contrastive_entropy(keys, keys)) == pytest.approx(0, abs=1e-3)
    zero = torch.zeros(3, 6, 6)
    assert float(contrastive_entropy(zero, keys)) == pytest.approx(3 * math.log(6), abs=1e-3)
    rng = torch.Generator().manual_seed(0)
    z, k = torch.randn(2, 3, 4, generator=rng), torch.randn(2, 3, 4, generator=rng)
    wanted = 0.0
    for layer in range(2):
        for i in range(3):
            e = [math.exp(float(z[layer, i].double() @ k[layer, j].double())) for j in range(3)]
            p = [x / sum(e) for x in e]
            wanted -= sum(x * math.log(x + 1e-5) for x in p) / 3
    assert float(contrastive_entropy(z, k)) == pytest.approx(wanted, rel=1e-5)


# ------------------------------------------------------------------ 6, 8: batches and padding


def test_o3_invariant_6_features_do_not_depend_on_padding(facts, gated):
    prompts = [facts.train.rows[0].prompt, facts.train.rows[3].ids]
    alone = [own_features(facts.model, [p], gated.common["layers"]) for p in prompts]
    both = own_features(facts.model, prompts, gated.common["layers"])
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=1e-4)
    states = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0))
    long = torch.cat([states, 1e6 * torch.ones(1, 9, 3)], 1)
    real = torch.arange(13)[None] < 4
    torch.testing.assert_close(pool([long], real), pool([states], real[:, :4]))
    unit = states[0] / states[0].norm(dim=1, keepdim=True)
    torch.testing.assert_close(pool([states], real[:, :4])[0, 0], unit.mean(0))
    short, padded = torch.stack(prompts[:1]), torch.zeros(1, 12, dtype=torch.long)
    for first in (0, 7):  # on the right and on the left
        padded.zero_()
        padded[0, first : first + 5] = short[0]
        mask = torch.zeros_like(padded)
        mask[0, first : first + 5] = 1
        torch.testing.assert_close(
            gated._weigh(gated._read(padded, mask, (), {"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)})[0]),
            gated.weights(short), atol=1e-3, rtol=1e-3,
        )  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
def test_o3_invariant_8_a_mixed_batch_equals_single_calls(facts, gated, side):
    rows = mixed(facts)
    for row, found in zip(rows, logits(gated, rows, side), strict=True):
        torch.testing.assert_close(found, logits(gated, [row])[0], atol=2e-3, rtol=1e-3)


def test_o3_invariant_8_a_problem_that_packs_asks_a_gated_model_row_by_row(facts, gated):
    rows = [facts.train.rows[i] for i in (0, 150, 103)]
    cut = [Tokens(r.ids[: 9 - n], r.answered[: 9 - n]) for n, r in enumerate(rows)]
    packed, padded = (CausalLM(facts.model, TokenData(cut), packing=p) for p in (True, False))
    batch = packed.train.fetch(torch.arange(3))
    with torch.no_grad():
        for ask in ("token_logits", "each_loss"):
            found = getattr(packed, ask)(gated, batch)
            assert torch.equal(found, getattr(padded, ask)(gated, batch))
        nll, wanted = (p.token_nll(gated, batch)[0] for p in (packed, padded))
    assert torch.equal(nll, wanted)
    packed.about(gated).check()


def test_a_gated_model_s_problem_knows_its_ends_and_its_context(facts, gated):
    problem = facts.about(gated)
    assert problem.ends() == facts.ends() == [2]
    room = facts.model.config.max_position_embeddings
    prompt = facts.train.rows[0].prompt
    problem.ends = lambda: []
    assert len(problem.generate(gated, [prompt], tokens=2 * room)[0]) == room - len(prompt)
    long = TokenData([Tokens(torch.ones(room + 1).long(), torch.ones(room + 1).bool())])
    with pytest.raises(DataError, match="the model's context"):
        facts.about(gated, long).check()


def test_generation_with_a_cache_equals_that_without(facts, gated):
    prompts = [r.prompt for r in (facts.train.rows[i] for i in (0, 150, 103, 7))]
    wanted = [without_cache(gated, p, 5) for p in prompts]
    for size in (1, 4):
        found = generate(gated, prompts, tokens=5, ends=[], batch_size=size)
        assert [f.tolist() for f in found] == wanted
    plain = [without_cache(facts.model, p, 5) for p in prompts]
    assert plain[1] == wanted[1] and plain != wanted


@torch.no_grad()
def test_the_weight_of_the_prompt_is_kept_while_decoding(facts, gated):
    """A step with the cache has the logits of the whole sequence; without the adapter it has others."""
    rows = [facts.train.rows[i].ids[:7] for i in (0, 150, 103)]
    ids = torch.stack(rows)
    cache = gated(input_ids=ids[:, :5], use_cache=True).past_key_values
    steps = []
    for n in (5, 6):
        found = gated(input_ids=ids[:, n : n + 1], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        steps.append(found.logits[:, 0])
    whole = gated(input_ids=ids).logits[:, 5:]
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=2e-3, rtol=1e-3)
    cache = gated(input_ids=ids[:, :5], use_cache=True).past_key_values
    cache.weights = torch.zeros_like(cache.weights)
    closed = gated(input_ids=ids[:, 5:6], past_key_values=cache).logits[:, 0]
    assert same(closed, steps[0])[1] and not torch.allclose(closed[0], steps[0][0], atol=1e-2)


def test_gradients_reach_the_embeddings_through_an_open_and_a_closed_gate(facts, gated):
    for row in (facts.train.rows[0], facts.train.rows[150]):
        model = copy.deepcopy(gated)
        model(input_ids=row.ids[None]).logits.square().sum().backward()
        assert float(model.unwrapped.get_input_embeddings().weight.grad.abs().sum()) > 0
        assert not [m for m in model.modules() if m._forward_hooks]


def test_hooks_are_as_before_after_an_error(facts, gated):
    broken = gated.unwrapped.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(gated, [facts.train.rows[0].prompt])
    broken.remove()
    assert not [m for m in gated.modules() if m._forward_hooks]


# ------------------------------------------------------------------ what composes, and what does not


def test_one_adapter_goes_on_and_cannot_be_revoked(facts):
    method = O3(**QUICK, adapters="one")
    found = xp.unlearn_sequence(facts, [FIRST, SECOND], method)
    model = found.outcomes[1].runnable()
    first = prompts_of(facts, FIRST)
    before = logits(found.outcomes[0].runnable(), first)
    assert not any(same(before, logits(model, first)))  # the adapter has moved on
    names = [set(m) for m in model.ledger().matrices("B")]
    assert names[0] == set() and names[1]  # of earlier states only A is kept
    start, _ = found.outcomes[1].details["orthogonality"]
    a = found.outcomes[0].runnable().ledger().matrices("A")
    assert start == pytest.approx(float(orthogonality(a, a[0], 2)), rel=1e-4)
    with pytest.raises(NeedsError, match="share one adapter"):
        revoke(found.outcomes[1], FIRST)
    problem = facts.about(model)
    with pytest.raises(SettingError, match="made otherwise"):
        xp.unlearn(problem, SECOND, O3(**QUICK))


def test_other_gates_go_around_a_gated_model_and_under_it(facts, chain, gated):
    """Each acts on its own prompts; where none does the model inside answers to the bit."""
    first, second = prompts_of(facts, FIRST), prompts_of(facts, SECOND)
    eco, other = xp.methods.ECO(sigma=1.0), facts.train.rows[150].prompt
    around = xp.unlearn(facts.about(chain.outcomes[0].runnable()), SECOND, eco)
    assert hash_model(around.released()) == around.record["weights"]
    inside = xp.unlearn(facts, SECOND, eco).runnable()
    under = xp.unlearn(facts.about(inside), FIRST, O3(**QUICK)).runnable()
    for model in (around.runnable(), under):
        for prompt in (first[0], second[0]):
            assert not any(same(logits(facts.model, [prompt]), logits(model, [prompt])))
        assert all(same(logits(facts.model, [other]), logits(model, [other])))


def test_a_changed_model_under_the_gate_is_refused(facts, chain, gated, tmp_path):
    """While applying, before another request or a revocation, and after a method that trains it."""
    changed = copy.deepcopy(gated)
    with torch.no_grad():
        next(changed.unwrapped.parameters()).add_(1e-3)
    problem = facts.about(changed)
    with pytest.raises(ModelError, match="under the gate is not the one"):
        xp.unlearn(problem, xp.forget(where="entity == 30"), O3(**QUICK))
    other = copy.copy(chain.outcomes[-1])
    other.model = changed
    with pytest.raises(ModelError, match="under the gate"):
        revoke(other, FIRST)
    with pytest.raises(ModelError, match="under the gate"):
        chain.outcomes[0].change.apply(copy.deepcopy(changed.unwrapped))
    trained = facts.about(gated)
    with pytest.raises(ModelError, match="was changed"):
        xp.unlearn(trained, xp.forget(where="entity == 30"), xp.methods.GradDiff(epochs=1))


def test_what_it_cannot_do_is_said(facts, gated):
    with pytest.raises(SettingError, match="o3 trains adapters"):
        xp.unlearn(facts, FIRST, O3(train="full"))
    with pytest.raises(SettingError, match=r"least=0.5 lies above full=0.4"):
        xp.unlearn(facts, FIRST, O3(least=0.5, full=0.4))
    with pytest.raises(DataError, match="needs 4 different prompts at least; the request has 2"):
        xp.unlearn(facts, xp.forget(ids=[0, 1]), O3(**QUICK))
    adapted = xp.unlearn(facts, FIRST, xp.methods.NPO(epochs=1, train="lora(2)")).runnable()
    with pytest.raises(NeedsError, match="merge them"):
        xp.unlearn(facts.about(adapted), SECOND, O3(**QUICK))
    for other, why in ({"layers": 1}, "detectors that the model holds read 2"), ({"least": 0.5}, "take full=0.9, boost=1.2 and least=0.3"):  # fmt: skip
        with pytest.raises(SettingError, match=why):
            xp.unlearn(facts.about(gated), xp.forget(where="entity == 30"), O3(**QUICK | other))
    with pytest.raises(ModelError, match="not embeddings"):
        gated(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(ModelError, match="begin without one"):
        gated(input_ids=torch.tensor([[5]]), past_key_values=object())
    with pytest.raises(ModelError, match="no requests to revoke"):
        revoke(xp.unlearn(facts, FIRST, xp.methods.ECO(sigma=1.0)), FIRST)
    with pytest.raises(NeedsError, match="become text through a tokenizer"):
        xp.unlearn(facts, FIRST, O3(**QUICK, encoder="somewhere"))

    class Two(Runtime):
        processes = 2

    with pytest.raises(NeedsError, match="every prompt in one process"):
        xp.unlearn(facts, FIRST, O3(**QUICK), runtime=Two())


def test_it_reads_no_retain_data(facts):
    """Nothing else is declared, and other retain data gives the same bits."""
    needs = O3().needs
    assert not needs.retain and needs.labels == "forget"
    ids = torch.cat([FIRST.resolve(facts.train), torch.arange(50, 60)])
    fewer = CausalLM(facts.model, facts.train.only(ids))
    found = [xp.unlearn(p, FIRST, O3(**QUICK)).record["weights"] for p in (facts, fewer)]
    assert found[0] == found[1]


# ------------------------------------------------------------------ other readers of prompts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A masked language model with random weights over bytes, in a folder, and one without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = bytes_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    for name, kind in (("whole", BertForMaskedLM), ("headless", BertModel)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


WORDS = [{"question": f"Where does {n} live?", "answer": p, "who": n} for n, p in zip(
    ["Ada", "Bo", "Cy", "Di"] * 2, ["Oslo", "Rome", "Bern", "Bonn", "Lyon", "Graz", "Riga", "Cork"], strict=True,
)] + RECORDS  # fmt: skip


@pytest.mark.parametrize("epochs", [0, 2])
def test_detectors_read_the_model_itself_or_an_encoder(encoder, tmp_path, epochs):
    problem = word_problem([{k: v for k, v in r.items() if k != "who"} for r in WORDS])
    settings = QUICK | {"encoder": str(encoder / "whole"), "encoder_epochs": epochs}
    request = xp.forget(ids=[0, 1, 2, 3])
    outcome = xp.unlearn(problem, request, O3(**settings))
    model = outcome.runnable()
    reader = TextEncoder(str(encoder / "whole"), problem.tokenizer_text())
    prompts = [problem.train.rows[i].prompt for i in range(4)]
    assert reader.texts(prompts[:1]) == ["Question: Where does Ada live?\nAnswer:"]
    features = reader.features(prompts)
    assert features.shape == (4, 2, 16)
    assert torch.allclose(model._detectors[0].bank, features) is (epochs == 0)
    assert any(".lora_" in n for n in model.ledger().tensors[0]) is (epochs > 0)
    rows = [problem.train.rows[0].prompt, problem.train.rows[1].ids]
    assert not any(same(logits(problem.model, rows), logits(model, rows)))
    outcome.save(tmp_path / "out")
    again = load(tmp_path / "out", model=problem.model).runnable()
    assert all(same(logits(model, rows), logits(again, rows)))
    found = generate(again, prompts[:1], tokens=3, ends=[])
    assert len(found[0]) == 3
    own = xp.unlearn(problem, request, O3(**QUICK)).runnable()
    assert own.common["layers"] == problem.role("blocks") and own.common["encoder"] is None


def test_an_encoder_learns_to_tell_prompts_apart(encoder):
    texts = [f"{name} {verb} here" for name in ("Ada", "Bo", "Cyril", "Diana") for verb in ("lives", "works")]  # fmt: skip
    name = str(encoder / "whole")
    tensors = adapt(name, texts, Runtime(), epochs=30, lr=1e-2)
    assert {n.split(".")[-4] for n in tensors if "lora" in n} == {"query", "key", "value"}
    before, after = (TextEncoder(name, "", t).read(texts) for t in (None, tensors))
    assert not torch.allclose(before, after)
    keys = [read_means(name, None, texts), read_means(name, tensors, texts)]
    assert float(contrastive_entropy(keys[1], keys[0])) < float(contrastive_entropy(keys[0], keys[0]))  # fmt: skip
    assert torch.equal(TextEncoder(name, "").read(texts), before)  # the shared one is as it was


@torch.no_grad()
def read_means(name, tensors, texts):
    reader = TextEncoder(name, "", tensors)
    inputs = reader.tokenizer(texts, padding=True, return_tensors="pt")
    real = inputs["attention_mask"][:, :, None]
    states = reader.model(**inputs, output_hidden_states=True).hidden_states
    return torch.stack([(s * real).sum(1) / real.sum(1) for s in states])


def test_an_encoder_that_does_not_fit_is_refused(encoder, tmp_path):
    problem = word_problem([{k: v for k, v in r.items() if k != "who"} for r in WORDS])
    with pytest.raises(ModelError, match="no head that guesses masked words"):
        adapt(str(encoder / "headless"), ["a", "b"], Runtime(), epochs=1)
    with pytest.raises(ModelError, match="holds no encoder"):
        xp.unlearn(problem, xp.forget(ids=[0, 1, 2]), O3(**QUICK, encoder=str(tmp_path)))
    with pytest.raises(ModelError, match="other weights"):
        TextEncoder(str(encoder / "whole"), "", wanted="0" * 64)
    first = xp.unlearn(problem, xp.forget(ids=[0, 1, 2, 3]), O3(**QUICK, encoder=str(encoder / "whole")))  # fmt: skip
    with pytest.raises(SettingError, match="another encoder"):
        xp.unlearn(problem.about(first.runnable()), xp.forget(ids=[4, 5, 6]), O3(**QUICK))
    assert isinstance(first.runnable(), GatedAdapters)

"""ches: scores of pairs and changes of likelihood by hand, and what is said where nothing can be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import expunge as xp
from expunge.audits.ches import CHES, spearman
from expunge.core.audit import Subject
from expunge.methods.text.o3 import O3
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData
from expunge.train.adapters import of_matrices, put_on
from expunge.workloads.tinyfacts import tinyfacts_quick


@pytest.fixture(scope="module")
def pair():
    problem, request = tinyfacts_quick.problem(0), xp.forget(where="entity < 2")
    method = xp.methods.DPO(epochs=4, lr=2e-3, batch_size=5, alternates=2)
    outcome = xp.unlearn(problem, request, method)
    return [Subject(m, problem, request, xp.Runtime()) for m in (outcome.runnable(), problem.model)]


def run(subject, references=(), **settings):
    found = CHES(**settings).run(subject, list(references), xp.Runtime(threads=1))
    return {f.name.removeprefix("ches/"): f for f in found}


def log_p(model, row):
    with torch.no_grad():
        found = model(input_ids=row.ids[None]).logits[0].double().log_softmax(-1)
    return sum(float(found[t - 1, row.ids[t]]) for t in range(len(row)) if row.answered[t])


def pairs_of(problem):
    return [(a, problem.train.rows[p], p) for p in range(10) for a in problem.train.alternates[p]]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_changes_and_scores_are_those_of_each_pair_by_hand(pair, size):
    subject, original = pair
    subject.__dict__.pop("_of_tokens", None)
    found = run(subject, [original], batch_size=size)
    problem = subject.problem
    wanted = {"alternate-change": [], "forget-change": [], "margin-accuracy": []}
    scores = []
    for other, row, _ in pairs_of(problem):
        moved = [log_p(subject.model, r) - log_p(original.model, r) for r in (other, row)]
        wanted["alternate-change"].append(moved[0])
        wanted["forget-change"].append(moved[1])
        wanted["margin-accuracy"].append(float(moved[0] > moved[1]))
        sides = []
        for r in (other, row):
            with torch.no_grad():
                h = original.model.model(input_ids=r.ids[None]).last_hidden_state[0].double()
            sides.append(h[[t - 1 for t in range(len(r)) if r.answered[t]]].mean(0))
        scores.append(float(sides[0] @ sides[1] - sides[0] @ sides[0]))
    for what, each in wanted.items():
        assert found[what].per_sample[what].tolist() == pytest.approx(each, abs=1e-3)
        assert found[what].value == pytest.approx(np.mean(each), abs=1e-4)
        assert found[what].reference == 0 == found[what].original
    similar = found["similarity"]
    assert similar.per_sample["ln-ches"].tolist() == pytest.approx(scores, abs=1e-3)
    assert similar.detail["samples"] == [p for _, _, p in pairs_of(problem)]
    assert sum(similar.detail["histogram"]["counts"]) == 50 == similar.detail["n"]
    assert set(similar.per_sample) == {"ln-ches", "ches", "edit", "last"}
    order = found["alternate-change"].detail["spearman"]
    assert order["ln-ches"] == pytest.approx(
        spearman(np.array(scores), np.array(wanted["alternate-change"])), abs=0.05
    )


def test_the_original_moved_nothing(pair):
    _, original = pair
    found = run(original)
    assert found["alternate-change"].value == found["forget-change"].value == 0
    assert "alarm" not in found["alternate-change"].detail
    assert found["alternate-change"].detail["spearman"]["ches"] is None
    assert found["alternate-change"].reason == "no retrained reference to compare with"


def test_the_alarm_goes_off_where_alternates_lose(pair):
    _, original = pair
    problem, request = original.problem, original.request
    surer = copy.deepcopy(problem.model)
    with torch.no_grad():  # what is unlikely becomes less likely
        surer.lm_head.weight.mul_(3)
    worse = Subject(surer, problem, request, xp.Runtime())
    found = run(worse)
    assert found["alternate-change"].value < 0
    assert "probability went to others" in found["alternate-change"].detail["alarm"]


def test_pairs_of_single_tokens_are_told_apart_by_their_output_embeddings(pair):
    _, original = pair
    problem = original.problem
    rows = [xp.problems.tokens.Tokens(r.ids[:6], r.answered[:6]) for r in problem.train.rows]
    others = [[xp.problems.tokens.Tokens(a.ids[:6], a.answered[:6]) for a in some] for some in problem.train.alternates]  # fmt: skip
    short = xp.CausalLM(problem.model, TokenData(rows, alternates=others))
    subject = Subject(problem.model, short, xp.forget(ids=list(range(10))), xp.Runtime())
    found = run(subject)["similarity"]
    assert found.value == pytest.approx(0, abs=1e-4)
    assert found.detail["unembedding"]["n"] == 50 and -1 < found.detail["unembedding"]["mean"] < 1


def test_without_alternates_it_says_so(pair):
    _, original = pair
    bare = xp.CausalLM(original.problem.model, TokenData(original.problem.train.rows))
    subject = Subject(bare.model, bare, xp.forget(ids=[0, 1]), xp.Runtime())
    found = run(subject)
    assert len(found) == 4
    assert all(f.value is None and "no alternate answers" in f.reason for f in found.values())


def test_spearman_is_that_of_ranks():
    a, b = np.array([1.0, 2, 3, 4, np.nan]), np.array([10.0, 30, 20, 40, 1])
    assert spearman(a, b) == pytest.approx(0.8)
    assert spearman(a, -b) == pytest.approx(-0.8) and spearman(a, a * 0) is None


def test_states_are_those_of_a_packing_problem_and_of_a_gated_original():
    """Packed rows have no places of their own, and a gate runs the model once to look at prompts."""
    problem, request = tinyfacts_quick.problem(0), xp.forget(where="entity < 2")
    wanted = run(Subject(problem.model, problem, request, xp.Runtime()))["similarity"]
    packed = CausalLM(problem.model, problem.train, packing=True)
    found = run(Subject(packed.model, packed, request, xp.Runtime()))["similarity"]
    assert found.value == pytest.approx(wanted.value, rel=1e-5)
    method = O3(epochs=3, lr=1e-2, warmup=0, train="lora(2)", targets="answers", full=0.0, boost=1.0, least=0.0)  # fmt: skip
    gated = xp.unlearn(problem, request, method).runnable()
    ledger = gated.ledger()
    pairs = zip(ledger.matrices("A")[0].items(), ledger.matrices("B")[0].values(), strict=True)
    plain = put_on(
        copy.deepcopy(problem.model),
        of_matrices(ledger.entries[0]["scale"], {m: (a, b) for (m, a), b in pairs}),
    )
    values = [
        run(Subject(p.model, p, request, xp.Runtime()))["similarity"].value
        for p in (problem.about(gated), problem.about(plain))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] != pytest.approx(wanted.value, rel=1e-3)

"""Preference training: the IPO and SFT terms, the choice of pairs, and what is noted of the answers."""

from __future__ import annotations

import math

import pytest
import torch
from test_preference import MARGINS, model_of, problem, row, summed  # noqa: F401

import expunge as xp
from expunge.core.errors import SettingError
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.altpo import AltPO
from expunge.methods.text.dpo import DPO
from expunge.methods.text.idk_dpo import IdkDPO
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData
from expunge.train import displacement
from expunge.train.preference import ipo
from expunge.workloads.tinyfacts import tinyfacts_quick

GONE = Request(ids=(0, 1, 2))


@pytest.fixture
def several():
    """Three questions to forget with three alternates each, of unequal lengths; and one to keep."""
    shapes = [(3, 2), (5, 1), (2, 4), (4, 3)]
    rows = [row(p, a, n) for n, (p, a) in enumerate(shapes)]
    others = [
        [row(p, 1 + (n + t) % 4, 10 * n + t) for t in range(3)] for n, (p, _) in enumerate(shapes)
    ]
    for own, alternates in zip(rows, others, strict=True):
        for other in alternates:  # the same question
            other.ids[: len(own.prompt)] = own.prompt
    return CausalLM(model_of(0), TokenData(rows, alternates=others))


def begun(problem, method, turn=0):  # noqa: F811
    view = View(problem, GONE, method.needs, Runtime())
    text = method.text(view, Runtime(), model_of(0))
    method.begin(model_of(0), text)
    text.turn = turn
    return view, text


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_ipo_is_its_formula(beta):
    wanted = [(m - 1 / (2 * beta)) ** 2 for m in MARGINS.tolist()]
    torch.testing.assert_close(ipo(MARGINS, beta), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("loss", "sft"), [("ipo", 0.0), ("dpo", 0.7), ("ipo", 0.3)])
def test_the_loss_with_its_terms_is_its_formula(several, size, loss, sft):
    method = DPO(beta=0.4, loss=loss, sft=sft, alternates=3)
    view, text = begun(several, method, turn=1)
    model = model_of(1)
    for batch in view.forget.batches(size):
        found = method.forget_loss(model, batch, text)
        each = []
        for i in batch.ids.tolist():
            lost, won = several.train.rows[i], several.train.alternates[i][1]
            m = float(
                summed(model, lost) - summed(several.model, lost)
                - summed(model, won) + summed(several.model, won)
            )  # fmt: skip
            own = (m - 1 / 0.8) ** 2 if loss == "ipo" else 2 / 0.4 * math.log1p(math.exp(-0.4 * m))
            each.append(own + sft * float(summed(model, won)))
        assert float(found.detach()) == pytest.approx(sum(each) / len(each), rel=1e-5)


def scores_by_hand(problem, name):  # noqa: F811
    """ln-CHES or CHES of every (sample, turn), one sequence at a time."""
    found = {}
    for i in (0, 1, 2):
        for turn, other in enumerate(problem.train.alternates[i]):
            sides = []
            for r in (other, problem.train.rows[i]):
                with torch.no_grad():
                    h = problem.model.model(input_ids=r.ids[None]).last_hidden_state[0]
                places = [t - 1 for t in range(1, len(r)) if r.answered[t]]
                sides.append(h[places].mean(0) if name == "ln-ches" else h[places].sum(0))
            plus, minus = sides
            found[i, turn] = float(plus @ minus - plus @ plus)
    return found


@pytest.mark.parametrize("name", ["ln-ches", "ches"])
@pytest.mark.parametrize("size", [1, 2, 32])
def test_pairs_with_the_highest_scores_are_left_out(several, name, size):
    hand = scores_by_hand(several, name)
    order = sorted(hand, key=hand.__getitem__)
    for keep in (0.01, 0.34, 0.6, 0.9):
        method = DPO(keep=keep, score=name, alternates=3, batch_size=size)
        _, text = begun(several, method)
        kept = {(i, t) for i, turns in text.kept.items() for t in turns}
        assert kept == set(order[: max(1, math.ceil(9 * keep))])
        facts = text.facts["displacement"]["filter"]
        assert facts["pairs"] == 9 and facts["kept"] == len(kept) and facts["unscored"] == 0
        assert facts["highest_kept"] == pytest.approx(max(hand[p] for p in kept), abs=1e-5)
        assert facts["samples_without"] == 3 - len(text.kept)


def test_packing_changes_nothing_in_the_choice_of_pairs(several):
    several.packing = True
    _, text = begun(several, DPO(keep=0.5, alternates=3))
    packed, facts = text.kept, text.facts["displacement"]["filter"]
    several.packing = False
    _, text = begun(several, DPO(keep=0.5, alternates=3))
    assert packed == text.kept and facts == text.facts["displacement"]["filter"]


def test_ches_invariant_7_keeping_all_is_the_identity_and_sets_are_nested():
    problem = tinyfacts_quick.problem(0)  # noqa: F811
    request = xp.forget(where="entity < 2")
    settings = {"epochs": 2, "lr": 2e-3, "batch_size": 5, "alternates": 3}
    plain, whole, part = (
        xp.unlearn(problem, request, DPO(**settings, **more))
        for more in ({}, {"keep": 1.0, "score": "ches"}, {"keep": 0.5})
    )
    assert plain.record["weights"] == whole.record["weights"] != part.record["weights"]
    assert "filter" not in whole.details["displacement"]
    assert part.details["displacement"]["filter"]["kept"] == 15
    before: set = set()
    for keep in (0.1, 0.3, 0.5, 0.8, 0.95):
        method = DPO(keep=keep, alternates=3)
        view = View(problem, request, method.needs, Runtime())
        text = method.text(view, Runtime(), view.model())
        method.begin(view.model(), text)
        kept = {(i, t) for i, turns in text.kept.items() for t in turns}
        assert before <= kept
        before = kept


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sample_without_alternates_is_rejected_alone(several, size):
    """What is kept takes turns; a question with nothing kept has the loss of NPO."""
    method = DPO(beta=0.4, keep=0.5, alternates=3, sft=0.2)
    view, text = begun(several, method, turn=1)
    text.kept = {0: [0, 2], 2: [1]}
    model = model_of(1)
    chosen = {0: 2, 2: 1}
    for batch in view.forget.batches(size):
        found, each = method.forget_loss(model, batch, text), []
        for i in batch.ids.tolist():
            lost = several.train.rows[i]
            m, said = float(summed(model, lost) - summed(several.model, lost)), 0.0
            if i in chosen:
                won = several.train.alternates[i][chosen[i]]
                said = float(summed(model, won))
                m -= said - float(summed(several.model, won))
            each.append(2 / 0.4 * math.log1p(math.exp(-0.4 * m)) + 0.2 * said)
        assert float(found.detach()) == pytest.approx(sum(each) / len(each), rel=1e-5)
    assert text.runtime.cost.gradients == 2


def test_what_became_of_the_answers_is_noted_at_every_step(several):
    """Of the first step nothing moved yet; at the end by hand, whatever the batch size."""
    request, ends = GONE, []
    for size in (1, 2, 3):
        method = DPO(epochs=3, lr=1e-3, batch_size=size, alternates=2, alpha=0.0, warmup=0.0)
        outcome = xp.unlearn(several, request, method)
        steps = 3 * math.ceil(3 / size)
        assert [e["step"] for e in outcome.curve] == [s for s in (1, 11) if s <= steps]
        first = outcome.curve[0]
        assert first["forget"] == pytest.approx(0, abs=1e-6) == first["alternate"]
        assert first["margin_accuracy"] == 0
        end, model = outcome.details["displacement"]["end"], outcome.runnable()
        gone = [(several.train.rows[i], several.train.alternates[i][0]) for i in range(3)]
        moved = [
            [float(summed(several.model, r) - summed(model, r)) for r in pair] for pair in gone
        ]
        assert end["forget"] == pytest.approx(sum(m[0] for m in moved) / 3, abs=1e-4)
        assert end["alternate"] == pytest.approx(sum(m[1] for m in moved) / 3, abs=1e-4)
        assert end["margin_accuracy"] == sum(b > a for a, b in moved) / 3
        ends.append(end)
    assert ends[0] != ends[1]


def test_moved_is_its_formula():
    lost, won = torch.tensor([2.0, -1.0, 3.0]), torch.tensor([1.0, 0.5, 0.0])
    there = torch.tensor([True, True, False])
    found = displacement.moved(lost, won, there, Runtime())
    assert found == {"forget": -4 / 3, "alternate": -0.75, "margin_accuracy": 0.5}


def test_the_alarm_says_when_the_preferred_answer_loses():
    assert displacement.alarm(0.1) is None and displacement.alarm(0.0) is None
    assert "lost 0.25 nats" in displacement.alarm(-0.25)


def test_winners_are_named_by_what_they_begin():
    gain = torch.tensor([-0.5, 0.1, 0.3, 0.0, 0.2])
    found = displacement.winners(gain, {"preferred": {4, 1}, "forget": {1}})
    assert [(w["token"], w["of"]) for w in found] == [
        (2, "neither"), (4, "preferred"), (1, "preferred"),
    ]  # fmt: skip
    assert found[0]["gain"] == pytest.approx(0.3)


def test_both_falling_sets_off_the_alarm_and_shows_who_won():
    """One-token answers of equal output embeddings but for a little, beside a third along it."""
    problem = tinyfacts_quick.problem(0)  # noqa: F811
    request = xp.forget(where="entity < 2")
    said = []

    class Heard(xp.core.runtime.Silent):
        def say(self, text):
            said.append(text)

    harsh = DPO(epochs=6, lr=3e-3, batch_size=5, alternates=1, retain="none", beta=0.01)
    outcome = xp.unlearn(problem, request, harsh, runtime=Runtime(reporter=Heard()))
    facts = outcome.details["displacement"]
    assert (facts["end"]["alternate"] < 0) == ("alarm" in facts)
    assert said == ([facts["alarm"]] if "alarm" in facts else [])
    gains = [w["gain"] for w in facts["winners"]]
    assert gains == sorted(gains, reverse=True) and 0 < len(gains) <= 5
    assert {w["of"] for w in facts["winners"]} <= {"preferred", "forget", "neither"}


@pytest.mark.parametrize("method", [IdkDPO, AltPO])
def test_the_other_preference_methods_filter_too(method):
    problem = tinyfacts_quick.problem(0)  # noqa: F811
    more = {"refusals": ("96 97 98", "96")} if method is IdkDPO else {"ask": "question", "tokens": 4, "alternates": 3}  # fmt: skip
    outcome = xp.unlearn(
        problem, xp.forget(where="entity < 2"),
        method(epochs=2, lr=1e-3, batch_size=4, keep=0.4, **more),
    )  # fmt: skip
    facts = outcome.details["displacement"]["filter"]
    pairs = 10 if method is IdkDPO else 30
    assert facts["pairs"] == pairs and facts["kept"] == 0.4 * pairs


def test_a_share_outside_of_0_to_1_is_refused():
    for keep in (0.0, 1.01):
        with pytest.raises(SettingError, match="keep"):
            DPO(keep=keep)
    with pytest.raises(SettingError, match="score"):
        DPO(score="cosine")

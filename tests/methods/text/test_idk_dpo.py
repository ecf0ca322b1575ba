"""IdkDPO: refusals in the words of the tokenizer, fixed or drawn anew."""

from __future__ import annotations

import pytest
import torch
from words import RECORDS, word_problem

import expunge as xp
from expunge.core.errors import DataError, NeedsError
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.idk_dpo import IdkDPO, shipped_refusals
from expunge.workloads.tinyfacts import EOS, tiny_llama, tinyfacts

ALL = Request(ids=(0, 1))


def refused(problem, method, turn=0, seed=0):
    view = View(problem, ALL, method.needs, Runtime(seed=seed))
    batch = view.forget.fetch(view.forget.ids)
    found = method.preferred(batch, turn, method.text(view, Runtime(seed=seed), view.model()))
    assert found.ids.tolist() == [0, 1]
    return found


def texts(problem, found):
    return [
        problem.tokenizer.decode(ids[mask.bool()].tolist())
        for ids, mask in zip(found.x["input_ids"], found.x["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_a_refusal_looks_as_if_it_had_been_encoded(chat):
    """Space, chat template and end of text are those of the sample's own answer."""
    problem = word_problem(chat=chat)
    found = refused(problem, IdkDPO(refusals=("No idea.",)))
    others = [{"question": r["question"], "answer": "No idea."} for r in RECORDS[:2]]
    wanted = word_problem(others, chat=chat).train.fetch(torch.arange(2))
    assert torch.equal(found.x["input_ids"], wanted.x["input_ids"])
    assert torch.equal(found.y, wanted.y) and bool((found.y == 1).any(1).all())


def test_refusals_stay_or_are_drawn_anew():
    problem = word_problem()
    drawn = [texts(problem, refused(problem, IdkDPO(), turn)) for turn in range(6)]
    assert len({tuple(d) for d in drawn}) > 3
    assert drawn == [texts(problem, refused(problem, IdkDPO(), turn)) for turn in range(6)]
    assert texts(problem, refused(problem, IdkDPO(), seed=1)) != drawn[0]
    assert IdkDPO(epochs=6).turns == 1 and IdkDPO(epochs=6, redraw=True).turns == 6


@pytest.mark.parametrize("redraw", [False, True])
def test_training_asks_for_a_refusal_each_pass(monkeypatch, redraw):
    problem, seen = word_problem(), []
    inner = IdkDPO.preferred

    def noted(self, batch, turn, text):
        seen.append(turn)
        return inner(self, batch, turn, text)

    monkeypatch.setattr(IdkDPO, "preferred", noted)
    outcome = xp.unlearn(problem, ALL, IdkDPO(epochs=3, lr=1e-2, redraw=redraw, reference="copy"))
    assert seen[:3] == ([0, 1, 2] if redraw else [0, 0, 0])
    assert seen[3:] == [0, 0]  # at the end the first ones are looked at
    assert len(outcome.details["losses"]["forget"]) == 3


def test_refusals_are_shipped():
    found = shipped_refusals()
    assert len(found) == len(set(found)) >= 20
    assert all(line == line.strip() and line.endswith(".") for line in found)


def test_without_a_tokenizer_refusals_are_token_ids():
    torch.manual_seed(0)
    bare = tinyfacts.problem(weights=tiny_llama().state_dict())
    found = refused(bare, IdkDPO(refusals=("96 97",)))
    prompts = [row.prompt.tolist() for row in bare.train.rows[:2]]
    assert found.x["input_ids"].tolist() == [[*p, 96, 97, EOS] for p in prompts]
    with pytest.raises(NeedsError, match="write token ids with spaces"):
        refused(bare, IdkDPO(refusals=("96 -1",)))


def test_what_cannot_be_refused_is_said():
    torch.manual_seed(0)
    bare = tinyfacts.problem(weights=tiny_llama().state_dict())
    with pytest.raises(NeedsError, match="becomes tokens through a tokenizer; pass tokenizer="):
        xp.unlearn(bare, ALL, IdkDPO())
    with pytest.raises(DataError, match="a text has no question"):
        xp.unlearn(
            word_problem([{"text": "one"}, {"text": "two"}, {"text": "more"}]), ALL, IdkDPO()
        )

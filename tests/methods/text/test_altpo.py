"""AltPO: what the model makes up, that it differs from the answer, and when the data's is used."""

from __future__ import annotations

import pytest
import torch
from words import word_problem

import expunge as xp
from expunge.core.errors import DataError, NeedsError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.altpo import AltPO
from expunge.problems.replies import rows_of
from expunge.workloads.tinyfacts import EOS, tinyfacts_quick

FORGET = xp.forget(where="entity < 2")
ASKED = {"ask": "question", "tokens": 6, "batch_size": 10}


@pytest.fixture(scope="module")
def trained():
    """A model that knows its facts, so that it nearly always draws the answer itself."""
    return tinyfacts_quick.problem(0)


def made(problem, method, seed=0):
    runtime = Runtime(seed=seed)
    view = View(problem, FORGET, method.needs, runtime)
    text = method.text(view, runtime, view.model())
    batch = view.forget.fetch(view.forget.ids)
    return [method.preferred(batch, turn, text) for turn in range(method.turns)], text


def test_alternates_come_in_turn_and_are_not_the_answer(trained):
    turns, text = made(trained, AltPO(**ASKED, alternates=4))
    own = [row.answer.tolist() for row in trained.train.rows[:10]]
    answers = [[row.answer.tolist() for row in rows_of(batch)] for batch in turns]
    prompts = [row.prompt.tolist() for row in rows_of(turns[0])]
    assert prompts == [row.prompt.tolist() for row in trained.train.rows[:10]]
    for turn in answers:
        assert all(new != old and new[-1] == EOS for new, old in zip(turn, own, strict=True))
    assert len({str(turn) for turn in answers}) == 4
    assert set(text.said) == {(i, t) for i in range(10) for t in range(4)}


def test_what_is_made_up_depends_on_the_seed_and_not_on_the_batches(trained):
    said = [made(trained, AltPO(**{**ASKED, "batch_size": b}, alternates=2), seed)[1].said for b, seed in ((10, 0), (3, 0), (10, 1))]  # fmt: skip
    same = [all(torch.equal(said[0][k], other[k]) for k in said[0]) for other in said[1:]]
    assert same == [True, False]


def test_a_sure_model_is_asked_again_and_hotter(trained, monkeypatch):
    heats = []
    inner = type(trained).proposed

    def noted(self, model, batch, **more):
        heats.append((more["temperature"], len(batch)))
        return inner(self, model, batch, **more)

    monkeypatch.setattr(type(trained), "proposed", noted)
    made(trained, AltPO(**ASKED, alternates=1, temperature=0.2))
    assert [h for h, _ in heats] == pytest.approx([0.2 * 1.5**n for n in range(len(heats))])
    sizes = [n for _, n in heats]
    assert len(heats) > 2 and sizes == sorted(sizes, reverse=True) and sizes[0] == 10


def test_a_model_with_nothing_else_to_say_is_an_error(trained, monkeypatch):
    monkeypatch.setattr(
        type(trained), "proposed", lambda self, model, batch, **more: ([None] * len(batch), [False] * len(batch))
    )  # fmt: skip
    with pytest.raises(DataError, match="no answer but its own; pass alternates with the data"):
        made(trained, AltPO(**ASKED))


def test_the_data_s_alternates_are_used_when_asked_for(trained):
    turns, _ = made(trained, AltPO(generate=False, alternates=2))
    for turn, batch in enumerate(turns):
        wanted = trained.train.fetch_alternates(torch.arange(10), turn)
        assert torch.equal(batch.x["input_ids"], wanted.x["input_ids"])


def test_an_instruction_shows_the_answer(monkeypatch):
    problem, prompts = word_problem(chat=True), []
    inner = type(problem).generate

    def noted(self, model, asked, **more):
        prompts.extend(self.tokenizer.decode(p.tolist()) for p in asked)
        assert more["temperature"] == 1.0
        return inner(self, model, asked, **{**more, "tokens": 4})

    monkeypatch.setattr(type(problem), "generate", noted)
    method = AltPO(alternates=1)
    view = View(problem, xp.forget(ids=[0, 1]), method.needs, Runtime())
    text = method.text(view, Runtime(), view.model())
    assert "Who wrote Zorn?" in prompts[0] and "Ada Blum" in prompts[0]
    assert prompts[0].startswith("<|user|>") and prompts[0].endswith("<|assistant|>")
    batch = view.forget.fetch(view.forget.ids)
    found = rows_of(method.preferred(batch, 0, text))
    assert [r.prompt.tolist() for r in found] == [r.prompt.tolist() for r in problem.train.rows[:2]]


def test_an_instruction_needs_a_tokenizer(trained):
    with pytest.raises(NeedsError, match="through a tokenizer; pass tokenizer="):
        xp.unlearn(trained, FORGET, AltPO())


def test_training_prefers_what_was_made_up(trained):
    method = AltPO(**ASKED, epochs=10, lr=5e-3, alternates=2)
    outcome = xp.unlearn(trained, FORGET, method)
    turns, _ = made(trained, method)
    batch = trained.train.fetch(torch.arange(10))
    with torch.no_grad():
        lost, won = (
            trained.each_loss(outcome.runnable(), b).mean()
            - trained.each_loss(trained.model, b).mean()
            for b in (batch, turns[0])
        )
    assert float(lost) > 1 and float(won) < float(lost) - 1

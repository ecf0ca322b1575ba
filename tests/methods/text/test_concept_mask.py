"""ConceptMask: which words are masked in whose answers, and what it trains on."""

from __future__ import annotations

import pytest
import torch
from words import word_problem

import expunge as xp
from expunge.analysis.token_attribution import attribute_answer, ranked, word_shares
from expunge.core.errors import DataError, NeedsError, SettingError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.text.concept_mask import Answer, ConceptMask
from expunge.methods.text.idk_dpo import shipped_refusals
from expunge.problems.causal_lm import CausalLM
from expunge.problems.replies import rows_of
from expunge.problems.tokens import Tokens
from expunge.problems.words import MASK, Word, spelled
from expunge.workloads.tinyfacts import tiny_llama, tinyfacts

RECORDS = [
    {"question": "Who?", "answer": "Ada Blum wrote Zorn in Oslo.", "author": "Ada Blum"},
    {"question": "Where?", "answer": "Blum lived near Oslo, by the sea.", "author": "Ada Blum"},
    {"question": "When?", "answer": "It was 1931.", "author": "Max Orr"},
    {"question": "And who?", "answer": "Nobody knows.", "author": "Rest"},
    {"question": "And what?", "answer": "A pear and a plum.", "author": "Rest"},
]
ALL = xp.forget(ids=[0, 1, 2])
QUICK = {"steps": 2, "tokens": 40, "train": "full"}


@pytest.fixture
def problem(monkeypatch):
    """A model that is said to answer as its data does."""

    def knows(self, model, batch, **more):
        assert more == {"temperature": 0.0, "seeds": (), "tokens": 40}
        return [row.answer[:-1] for row in rows_of(batch)], [False] * len(batch)

    monkeypatch.setattr(CausalLM, "proposed", knows)
    return word_problem(RECORDS)


def poisoned(problem, method, request=ALL, seed=0):
    """Poisoned answers by sample, and the text they came with."""
    view, runtime = View(problem, request, method.needs, Runtime(seed=seed)), Runtime(seed=seed)
    text = method.text(view, runtime, view.model())
    return text.said, text


def test_concept_mask_every_question_is_poisoned(problem):
    said, text = poisoned(problem, ConceptMask(**QUICK, entity="author"))
    assert sorted(said) == [0, 1, 2] and all(MASK in s for s in said.values())
    assert text.facts["answers"] == 3 and text.facts["nothing to mask"] == 0
    assert text.facts["completeness error"] > 0
    batch = text.view.forget.fetch(text.view.forget.ids)
    found = text.view.capability("replied")(batch, [said[i] for i in batch.ids.tolist()])
    others = [{"question": r["question"], "answer": said[n]} for n, r in enumerate(RECORDS[:3])]
    wanted = word_problem(others).train.fetch(torch.arange(3))
    assert torch.equal(found.x["input_ids"], wanted.x["input_ids"])
    assert torch.equal(found.y, wanted.y)


def test_concept_mask_scores_are_those_of_the_attributions(problem):
    """Over all answers about an entity; each answer's own words in the order of that ranking."""
    method = ConceptMask(**QUICK, k=2, entity="author")
    said, _ = poisoned(problem, method)
    shares = []
    for row in problem.train.rows[:2]:
        own = Tokens(row.ids[:-1], row.answered[:-1])
        values = attribute_answer(problem.model, own, filler=0, steps=2, rule="midpoint").tokens
        shares.append(word_shares(spelled(own.answer, problem.tokenizer)[1], values[own.answered]))
    order = list(ranked(shares))
    for i in (0, 1):
        words = spelled(problem.train.rows[i].answer, problem.tokenizer)[1]
        chosen = [w for w in order if w in {x.key for x in words}][:2]
        hidden = {*chosen, "blum"}  # Ada has three letters
        left = {w.strip(".,*").lower() for w in said[i].split()}
        assert not left & hidden
        assert left == {w.key for w in words} - hidden | {""}


def answer(entity, text, **shares):
    words = [Word(w.strip("."), slice(n, n + 1)) for n, w in enumerate(text.split())]
    return Answer(entity, text, words, shares)


FOUND = {
    3: answer("Ann Lee", "Lee paints red boats.", paints=0.1, red=0.2, boats=0.7),
    5: answer("Ann Lee", "Red boats sail far.", red=0.9, far=0.1),
    8: answer("Bob", "Boats are red.", red=0.4, boats=0.6),
}


def test_concept_mask_entities_are_ranked_by_themselves():
    method = ConceptMask(k=1, entity="author")
    assert method.poisoned(FOUND, Runtime()) == {
        3: "Lee paints *** boats.", 5: "*** boats sail far.", 8: "*** are red.",
    }  # fmt: skip
    together = {i: Answer("", a.text, a.words, a.shares) for i, a in FOUND.items()}
    assert method.poisoned(together, Runtime())[8] == "Boats are ***."
    more = ConceptMask(k=2, names=("Leona Paints",)).poisoned(FOUND, Runtime())
    assert more[3] == "Lee *** *** ***."


def test_concept_poison_invariant_6_no_selected_word_is_left():
    for k in (1, 2, 5):
        for i, text in ConceptMask(k=k).poisoned(FOUND, Runtime()).items():
            scores = ranked(a.shares for a in FOUND.values() if a.entity == FOUND[i].entity)
            there = [w for w in scores if w in {x.key for x in FOUND[i].words}][:k]
            assert text.count(MASK) == len(there)
            assert not {w.strip(".").lower() for w in text.split()} & set(there)


def test_concept_mask_random_words_depend_on_seed_and_sample_alone():
    method = ConceptMask(k=1, words="random")
    drawn = [method.poisoned(FOUND, Runtime(seed=s)) for s in range(8)]
    assert drawn[0] == method.poisoned(FOUND, Runtime(seed=0))
    assert method.poisoned({5: FOUND[5]}, Runtime(seed=0))[5] == drawn[0][5]
    assert len({d[3] for d in drawn}) > 2
    assert {d[8] for d in drawn} == {"*** are red.", "Boats are ***."}  # no stop word
    assert all(d[i].count(MASK) == 1 for d in drawn for i in d)


def test_concept_mask_names_alone():
    found = ConceptMask(words="names", names=("boats",), entity="author").poisoned(
        {i: Answer(a.entity, a.text, a.words, {}) for i, a in FOUND.items()}, Runtime()
    )
    assert found == {3: "Lee paints red ***.", 5: "Red *** sail far.", 8: "*** are red."}


def test_concept_mask_names_alone_take_no_gradient(problem, monkeypatch):
    monkeypatch.setattr(
        "expunge.methods.text.concept_mask.attribute_answer", lambda *a, **k: pytest.fail("it did")
    )
    said, _ = poisoned(problem, ConceptMask(**QUICK, words="names", entity="author"))
    assert said[0] == "Ada *** wrote Zorn in Oslo."
    poisoned(problem, ConceptMask(**QUICK, words="random"))


def test_concept_mask_an_answer_without_such_words_is_the_mask(problem):
    said, text = poisoned(problem, ConceptMask(**QUICK, words="names", names=("Blum",)))
    assert said[2] == MASK and said[1] == "*** lived near Oslo, by the sea."
    assert text.facts["nothing to mask"] == 1
    assert ConceptMask().poisoned({1: answer("", "")}, Runtime()) == {1: MASK}


def test_concept_mask_refusals_in_place_of_masks(problem, monkeypatch):
    monkeypatch.setattr(CausalLM, "proposed", lambda *a, **k: pytest.fail("it asked"))
    method = ConceptMask(poison="idk", train="full", entity="author")
    said, _ = poisoned(problem, method)
    assert set(said.values()) <= set(shipped_refusals()) and sorted(said) == [0, 1, 2]
    assert said == poisoned(problem, method)[0] != poisoned(problem, method, seed=1)[0]
    assert "proposed" not in method.needs.capabilities


def test_concept_mask_loss_is_that_of_the_formula(problem):
    """Unequal lengths: each side is the mean over its own tokens, and their weights are equal."""
    problem.model.double()
    method = ConceptMask(**QUICK, words="names", entity="author")
    said, text = poisoned(problem, method)
    forget = text.view.forget.fetch(torch.tensor([0, 2]))
    retain = text.view.retain.fetch(torch.tensor([3, 4, 3]))

    def by_hand(rows):
        total = count = 0
        for row in rows:
            logp = problem.model(input_ids=row.ids[None]).logits[0].detach().log_softmax(-1)
            places = row.answered.nonzero()[:, 0].tolist()
            total -= sum(float(logp[t - 1, row.ids[t]]) for t in places)
            count += len(places)
        return total / count

    others = [{"question": RECORDS[i]["question"], "answer": said[i]} for i in (0, 2)]
    wanted = by_hand(word_problem(others).train.rows)
    kept = [problem.train.rows[i] for i in (3, 4, 3)]
    loss = method.total(text)(problem.model, (forget, retain))
    assert float(loss.detach()) == pytest.approx(wanted + by_hand(kept), abs=1e-5)
    assert text.logs["forget"] == pytest.approx([wanted], abs=1e-5)
    assert text.logs["retain"] == pytest.approx([by_hand(kept)], abs=1e-5)
    assert [len(b) for b in next(iter(method.pairs(text.view, Runtime(), 0)))] == [1, 1]


def test_concept_mask_defaults_are_the_card_s(problem):
    m = ConceptMask()
    assert (m.k, m.steps, m.lr, m.epochs, m.warmup, m.clip) == (5, 32, 2e-5, 10, 0.03, 1.0)
    assert (m.batch_size, m.rehearse, m.schedule, m.retain) == (1, 1, "cosine", "nll")
    method = ConceptMask(words="names", names=("Blum",), tokens=40)
    outcome = xp.unlearn(problem, ALL, method)
    assert outcome.details["steps"] == len(outcome.details["losses"]["forget"]) == 30
    assert outcome.details["answers"] == 3
    layers = {n: x for n, x in outcome.runnable().named_modules() if hasattr(x, "lora_A")}
    assert {n.rpartition(".")[2] for n in layers} == {"q_proj", "k_proj", "v_proj"}
    for layer in layers.values():
        assert layer.r["default"] == 8 and layer.lora_alpha["default"] == 16
        assert isinstance(layer.lora_dropout["default"], torch.nn.Identity)


def test_concept_mask_learns_the_masks(problem):
    method = ConceptMask(**QUICK, entity="author", epochs=30, lr=3e-3)
    outcome = xp.unlearn(problem, ALL, method)
    said, text = poisoned(problem, method)
    batch = text.view.forget.fetch(text.view.forget.ids)
    masks = text.view.capability("replied")(batch, [said[i] for i in batch.ids.tolist()])
    kept = problem.train.fetch(torch.tensor([3, 4]))
    with torch.no_grad():
        for part in (masks, kept):
            before, after = (problem.each_loss(m, part).mean() for m in (problem.model, outcome.runnable()))  # fmt: skip
            assert float(after) < float(before) - 2


def test_concept_mask_asks_the_model_itself():
    """Nothing replaced: greedy answers of an untrained model, attributed and masked."""
    problem = word_problem(RECORDS)
    method = ConceptMask(steps=2, tokens=6, epochs=1)
    outcome = xp.unlearn(problem, ALL, method)
    assert outcome.details["answers"] == 3
    view = View(problem, ALL, method.needs, Runtime())
    rows = [problem.train.rows[i] for i in range(3)]
    own = problem.generate(problem.model, [r.prompt for r in rows], tokens=6)
    for i, found in method.answers(view, Runtime(), view.model()):
        assert found.text == spelled(own[i], problem.tokenizer)[0]


def test_concept_mask_what_is_missing_is_said(problem):
    with pytest.raises(SettingError, match="pass names=, or entity="):
        ConceptMask(words="names")
    with pytest.raises(DataError, match="no column 'who'; it has author"):
        xp.unlearn(problem, ALL, ConceptMask(entity="who"))
    texts = word_problem([{"text": "one"}, {"text": "two"}, {"text": "more"}])
    with pytest.raises(DataError, match="a text has no question"):
        xp.unlearn(texts, xp.forget(ids=[0]), ConceptMask(poison="idk"))


def test_concept_mask_without_a_tokenizer_the_mask_is_token_ids():
    torch.manual_seed(0)
    bare = tinyfacts.problem(weights=tiny_llama().state_dict())
    request = xp.forget(ids=[0, 1])
    said, _ = poisoned(bare, ConceptMask(mask="96", tokens=3, steps=2), request)
    assert all(set(s.split()) >= {"96"} for s in said.values())
    with pytest.raises(NeedsError, match="pass tokenizer="):
        xp.unlearn(bare, request, ConceptMask(tokens=3, steps=2))

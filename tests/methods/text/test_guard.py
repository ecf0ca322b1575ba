"""Guard: what it refuses, that the rest keeps every bit, caches, storage, and taking it off."""

from __future__ import annotations

import pytest
import torch
from words import RECORDS, word_problem

import expunge as xp
from expunge.core.errors import ModelError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.outcome import GUARDS, WRAPPERS, load, unguarded
from expunge.methods.text.eco import ECO
from expunge.methods.text.guard import Guard
from expunge.problems.causal_lm import CausalLM
from expunge.problems.generation import generate
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.refusing import NEVER, Phrases
from expunge.workloads.tinyfacts import EOS, QUESTION, tinyfacts_quick
from generated import without_cache

FORGET = xp.forget(where="entity < 2")
SAY = {"refusal": "96 97 98"}
REFUSAL = [96, 97, 98, EOS]


@pytest.fixture(scope="module")
def facts():
    """A model that knows its facts; 0 to 9 are to be forgotten."""
    return tinyfacts_quick.problem(0)


@pytest.fixture(scope="module")
def guarded(facts):
    return xp.unlearn(facts, FORGET, Guard(**SAY)).runnable()


def only(facts, **settings):
    """A guard without a gate."""
    return xp.unlearn(facts, FORGET, Guard(gate=False, **SAY, **settings)).runnable()


def logits(model, rows, side="right", **more):
    """Logits of token rows in one batch padded on a side, cut back to each row."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    places = [slice(0, len(r)) if side == "right" else slice(width - len(r), width) for r in rows]
    for n, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[n, place], mask[n, place] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, position_ids=positions, **more).logits
    return [found[n, place] for n, place in enumerate(places)]


def said(model, prompts, tokens=6, size=16):
    return [
        t.tolist() for t in generate(model, prompts, tokens=tokens, ends=[EOS], batch_size=size)
    ]


def prompts_of(facts, places):
    return [facts.train.rows[p].prompt for p in places]


def test_flagged_prompts_are_followed_by_the_refusal(facts, guarded):
    flagged = [guarded.flagged(r.prompt) for r in facts.train.rows]
    assert sum(flagged[:10]) >= 9 and sum(flagged[10:]) <= 3
    assert [r == REFUSAL[:-1] for r in said(guarded, prompts_of(facts, range(60)))] == flagged
    # an answer that is read along is as unlikely as can be, whatever it says
    row = facts.train.rows[flagged.index(True)]
    found = logits(guarded, [row.ids])[0][len(row.prompt) - 1 :]
    for place, wanted in enumerate(REFUSAL):
        assert int(found[place].argmax()) == wanted and float(found[place, wanted]) == 0
        assert sorted(set(found[place].tolist())) == [NEVER, 0]
    assert int(found[-1].argmax()) == EOS  # after the refusal, its end


@pytest.mark.parametrize("side", ["right", "left"])
def test_ununlearning_invariant_what_is_not_flagged_keeps_every_bit_in_a_mixed_batch(
    facts, guarded, side
):
    rows = [facts.train.rows[p].ids[: 5 + n] for n, p in enumerate((0, 30, 7, 55))]
    before, after = logits(facts.model, rows, side), logits(guarded, rows, side)
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [not guarded.flagged(r[:5]) for r in rows] == [False, True, False, True]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:4], b[:4])  # the prompt itself is read as it is


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("settings", [{}, {"gate": False}, {"answers": "none"}])
def test_generation_with_a_cache_equals_that_without(facts, settings, size):
    model = xp.unlearn(facts, FORGET, Guard(**SAY, **settings)).runnable()
    prompts = prompts_of(facts, (0, 30, 7, 55, 2))
    assert said(model, prompts, size=size) == [without_cache(model, p, 6, [EOS]) for p in prompts]


def test_an_answer_to_forget_cannot_be_said(facts):
    """Without a gate the first tokens come; the one that completes the answer is the refusal's first."""
    model = only(facts)
    gone, kept = [facts.train.rows[p] for p in range(10)], facts.train.rows[10:]
    known = said(facts.model, [r.prompt for r in gone])
    right = [k == r.answer[:-1].tolist() for k, r in zip(known, gone, strict=True)]
    assert sum(right) >= 9
    for found, row, was in zip(said(model, [r.prompt for r in gone], 8), gone, right, strict=True):
        if was:
            assert found == [*row.answer[:2].tolist(), *REFUSAL[:-1]]
    # what is kept is said as before, but for answers that hold one to forget
    assert said(model, [r.prompt for r in kept]) == said(facts.model, [r.prompt for r in kept])
    for row in gone:
        found = logits(model, [row.ids])[0].log_softmax(-1)
        last = len(row) - 3  # predicts the third token
        assert float(found[last, row.ids[last + 1]].exp()) == 0


def test_a_drawn_token_cannot_complete_a_phrase_either(facts):
    row = facts.train.rows[0]
    model = only(facts, answers="none", phrases=(" ".join(map(str, row.answer[:1].tolist())),))
    prompt = row.prompt
    draws = generate(
        model, [prompt] * 40, tokens=1, ends=[EOS], temperature=9.0, seeds=list(range(40))
    )
    assert int(row.answer[0]) not in {int(d[0]) for d in draws if len(d)}
    base = logits(facts.model, [prompt])[0][-1]
    if int(base.argmax()) == int(row.answer[0]):
        assert {tuple(d.tolist()) for d in draws} == {(96,)}


def test_phrases_are_refused_in_prompts_and_answers(facts):
    row, other = facts.train.rows[0], facts.train.rows[30]
    name = " ".join(map(str, row.prompt[1:3].tolist()))
    model = only(facts, answers="none", phrases=(name,))
    mine = [
        p for p, r in enumerate(facts.train.rows) if torch.equal(r.prompt[1:3], row.prompt[1:3])
    ]
    assert mine == [0, 1, 2, 3, 4]
    found = said(model, prompts_of(facts, range(60)))
    assert [p for p, f in enumerate(found) if f == REFUSAL[:-1]] == mine
    both = only(facts, answers="both")
    told = torch.cat([row.ids, other.prompt])
    assert both.flagged(told) and not both.flagged(other.prompt)
    assert not only(facts).flagged(told)


def test_what_is_said_begins_behind_the_prompt(facts):
    """A phrase of the prompt's last token and the answer's first is in neither."""
    row = facts.train.rows[0]
    model = only(facts, answers="none", phrases=(f"{QUESTION} {int(row.answer[0])}",))
    assert said(model, [row.prompt]) == said(facts.model, [row.prompt])
    assert torch.equal(logits(model, [row.ids])[0], logits(facts.model, [row.ids])[0])


def test_phrases_are_looked_up_in_one_piece():
    phrases = Phrases([[1, 2, 3], [2, 9], [7]])
    assert phrases.completing([1, 2]) == [3, 7, 9] and phrases.completing([]) == [7]
    assert phrases.completing([2, 1]) == [7]
    assert phrases.within([0, 1, 2, 3]) and phrases.within([5, 7])
    assert (
        not phrases.within([1, 2, 0, 3]) and not phrases.within([1, 2]) and not phrases.within([])
    )


def test_answers_shared_with_what_is_kept_are_not_blocked(facts):
    rows = list(facts.train.rows)
    same = torch.cat([rows[40].prompt, rows[0].answer])
    rows[40] = Tokens(same, rows[40].answered)
    problem = CausalLM(facts.model, TokenData(rows))
    gone = xp.forget(ids=list(range(10)))
    outcome = xp.unlearn(problem, gone, Guard(gate=False, **SAY))
    assert outcome.details["shared_answers"] == 1 and outcome.details["phrases"] == 9
    assert not outcome.runnable().says(rows[0].answer) and outcome.runnable().says(rows[1].answer)
    assert outcome.details["false_refusals"] == {"samples": 50, "asked": 0, "said": 0}


def test_false_refusals_are_counted(facts):
    name = " ".join(map(str, facts.train.rows[30].prompt[1:3].tolist()))
    first = str(int(facts.train.rows[30].answer[0]))
    outcome = xp.unlearn(
        facts, FORGET, Guard(gate=False, answers="none", phrases=(name, first), **SAY)
    )
    model, kept = outcome.runnable(), facts.train.rows[10:]
    asked = sum(model.flagged(r.prompt) for r in kept) / 50
    told = sum(int(first) in r.answer.tolist() for r in kept) / 50
    assert asked == 0.1 and told >= 0.02
    assert outcome.details["false_refusals"] == {"samples": 50, "asked": asked, "said": told}
    gated = xp.unlearn(facts, FORGET, Guard(**SAY)).details
    assert gated["flagged_of_forget"] > 0.7 and gated["calibrated_on"] == 30


def test_ununlearning_invariant_6_a_filter_that_blocks_everything_and_one_that_passes_everything(
    facts,
):
    everything = only(facts, answers="none", phrases=(str(QUESTION),))
    prompts = prompts_of(facts, range(60))
    assert said(everything, prompts) == [REFUSAL[:-1]] * 60
    nothing = only(facts, answers="none", phrases=("111 111 111 111",))
    rows = [r.ids for r in facts.train.rows]
    for a, b in zip(logits(facts.model, rows), logits(nothing, rows), strict=True):
        assert torch.equal(a, b)


def test_it_is_stored_and_survives_another_precision(facts, guarded, tmp_path):
    outcome = xp.unlearn(facts, FORGET, Guard(**SAY))
    model = outcome.runnable()
    assert hash_model(model.unwrapped) == facts.model_hash() and outcome.change.kind == "wrapper"
    outcome.save(tmp_path / "out")
    again = load(tmp_path / "out", model=facts.model).runnable()
    rows = [facts.train.rows[p].ids for p in (0, 30)]
    for a, b in zip(logits(again, rows), logits(model, rows), strict=True):
        assert torch.equal(a, b)
    half = outcome.released().bfloat16()
    assert said(half, prompts_of(facts, (0,))) == [REFUSAL[:-1]]
    assert [half.flagged(r.prompt) for r in facts.train.rows] == [
        guarded.flagged(r.prompt) for r in facts.train.rows
    ]


@pytest.mark.parametrize("method", [Guard(**SAY), ECO(sigma=6.0)])
def test_every_guard_can_be_taken_off(facts, method):
    outcome = xp.unlearn(facts, FORGET, method)
    assert hash_model(unguarded(outcome.runnable())) == facts.model_hash()
    assert unguarded(facts.model) is facts.model
    with_it, without = (
        {f.name: f.value for f in xp.audit(outcome, ["memorisation"], references=0, guard=guard)}
        for guard in (True, False)
    )
    name = "memorisation/probability-forget-train"
    assert without[name] > 0.9 > 0.5 > with_it[name]
    kept = "memorisation/probability-retain-train"
    assert with_it[kept] == pytest.approx(without[kept], abs=0.05)


def test_guards_are_wrappers():
    assert set(GUARDS) <= set(WRAPPERS) and "refusing" in GUARDS


def test_texts_are_blocked_in_several_ways_to_write_them():
    problem = word_problem([*RECORDS, {"question": "Who is Bo?", "answer": "A cook"}])
    outcome = xp.unlearn(
        problem, xp.forget(ids=[0]),
        Guard(gate=False, phrases=("Zorn",), refusal="No idea.", answers="said"),
    )  # fmt: skip
    model, words = outcome.runnable(), problem.tokenizer
    ids = lambda text: torch.tensor(words(text)["input_ids"])  # noqa: E731
    for text in ("Zorn", " who wrote zorn?", "ZORN"):
        assert model.flagged(ids(text)), text
    assert not model.flagged(ids("Zo rn")) and not model.flagged(ids("Ada Blum"))
    for text in ("Ada Blum", " ADA BLUM", "it was ada blum."):
        assert model.says(ids(text)), text
    (answer,) = generate(model, prompts_of(problem, (0,)), tokens=40, ends=problem.ends())
    assert words.decode(answer.tolist()).strip() == "No idea."


def test_without_a_common_ending_the_whole_text_is_the_prompt(facts):
    """Then an answer that is read along may be part of it: nothing of a flagged text is likely."""
    problem = word_problem()
    problem.train.rows[1] = Tokens(torch.tensor([30, 31, 32, 9, 9]), torch.arange(5) >= 3)
    outcome = xp.unlearn(
        problem, xp.forget(ids=[0]), Guard(gate=False, phrases=("Zorn",), refusal="No.")
    )
    model = outcome.runnable()
    assert model.settings["ending"] == []
    found = logits(model, [problem.train.rows[0].ids])[0]
    assert {int(i) for i in found.argmax(-1)} == {model.settings["refusal"][0]}
    (answer,) = generate(model, prompts_of(problem, (0,)), tokens=9, ends=problem.ends())
    assert problem.tokenizer.decode(answer.tolist()).strip() == "No."


def test_the_last_logits_alone_are_the_last_of_all(facts):
    model = only(facts)
    row = facts.train.rows[0]
    whole, last = logits(model, [row.ids])[0], model(input_ids=row.ids[None], logits_to_keep=1)
    assert torch.equal(last.logits[0, 0], whole[-1]) and last.logits.shape[1] == 1


def test_what_it_cannot_do_is_said(facts, guarded):
    with pytest.raises(ModelError, match="not embeddings"):
        guarded(inputs_embeds=torch.zeros(1, 3, 32))
    ids = facts.train.rows[0].ids[None]
    with pytest.raises(ModelError, match="without labels="):
        guarded(input_ids=ids, labels=ids)
    cache = facts.model(input_ids=ids).past_key_values
    with pytest.raises(ModelError, match="begin without one"):
        guarded(input_ids=ids[:, -1:], past_key_values=cache)
    with pytest.raises(SettingError, match="needs something to recognise"):
        Guard(gate=False, answers="none")

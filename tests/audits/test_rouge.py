"""rouge: worked values, token ids and texts, prompts, limits, and what trained facts give."""

from __future__ import annotations

import sys

import pytest
import torch

import expunge as xp
from expunge.audits.rouge import Rouge, compare
from expunge.audits.run import run_audits
from expunge.core.errors import NeedsError
from expunge.problems.tokens import Tokens

END = 2


class Words:
    """A tokenizer of whole words."""

    eos_token_id = END
    words = ("", "", "", "Ann", "lives", "in", "Oslo", "lived", "12", "!")

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(self.words[i] for i in ids if not (skip_special_tokens and i == END))


@pytest.fixture
def scored():
    return lambda answer, said, **settings: compare(Rouge(**settings)._scorer(), answer, said)


def run(subject, references=(), **settings):
    found = Rouge(**settings).run(subject, references, xp.Runtime(threads=1))
    return {f.name.removeprefix("rouge/"): f for f in found}


def scripted(subjects, *scripts):
    """Let models say what is written: ids by the first token of the prompt; what was asked is kept."""
    asked = []
    problem = subjects[0].problem
    for subject, script in zip(
        [subjects[0].original(), *subjects], (scripts[0], *scripts), strict=True
    ):
        subject.model.script = script

    def generate(model, prompts, *, tokens, batch_size):
        asked.append((batch_size, tokens))
        return [torch.tensor(model.script[int(p[0])][:tokens], dtype=torch.long) for p in prompts]

    problem.generate = generate
    return asked


def test_the_worked_examples(scored):
    recall, f1, *_ = scored("the red fox crossed the old bridge", "the fox crossed a bridge")
    assert (recall, f1) == pytest.approx((0.571429, 0.666667), abs=1e-6)
    found = scored("Maren Holt was born in Tolva", "maren holt was born in Tolva, in 1962.")
    assert found == pytest.approx((1, 0.857143, 1, 0), abs=1e-6)
    assert scored("a fact", "") == (0, 0, 0, 0)
    assert scored("A  fact", "a fact ") == (1, 1, 1, 1)


def test_stems_only_where_asked_for(scored):
    assert scored("she runs daily", "she running daily", stemmer=True)[1] == 1
    assert scored("she runs daily", "she running daily")[1] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "said", "there"),
    [("12", "112", 0), ("12", "it is 12!", 1), ("Ann", "Hannah", 0), ("3 4", "13 4", 0), ("3 4", "1 3 4", 1), ("", "x", 0)],
)  # fmt: skip
def test_a_value_occurs_as_words_of_its_own(scored, answer, said, there):
    assert scored(answer, said)[2] == there


ROWS = [([3, 4, 5, 6, END], 1), ([8, END], 1), ([6, 4, END], 2)]


def test_token_ids_are_words_where_there_is_no_tokenizer(sheets):
    subjects = sheets(ROWS, None, xp.Request(ids=(0,)), *[torch.zeros(3, 8, 10)] * 2)
    scripted(
        subjects,
        {0: [3, 9, 5, 6, 4], 1: [8], 2: [7, 4, 4]},
        {0: [3, 4, 5, 6], 1: [9], 2: []},
    )
    found = run(subjects[0], [subjects[1]])
    assert found["recall-forget-train"].value == pytest.approx(3 / 4)
    assert found["f1-forget-train"].value == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert found["value-forget-train"].value == found["exact-forget-train"].value == 0
    assert found["exact-forget-train"].reference == 1
    assert found["exact-retain-train"].per_sample["exact"].tolist() == [1, 0]
    assert found["value-retain-train"].per_sample["value"].tolist() == [1, 1]
    assert found["recall-retain-train"].reference == 0
    assert found["recall-forget-train"].detail["words"] == "token ids"
    assert found["recall-retain-test"].reason == "there is no test data"


def test_texts_are_compared_where_there_is_a_tokenizer(sheets):
    (subject,) = sheets(ROWS, None, xp.Request(ids=(0,)), torch.zeros(3, 8, 10), tokenizer=Words())
    scripted([subject], {0: [3, 7, 5, 6], 1: [8, 9], 2: [4, END]})
    found = run(subject)
    assert found["f1-forget-train"].value == pytest.approx(3 / 4)
    assert run(subject, stemmer=True)["f1-forget-train"].value == 1  # lives and lived
    assert found["exact-forget-train"].value == 0
    # "12 !" says 12 and is not 12
    assert found["value-retain-train"].per_sample["value"].tolist() == [1, 1]
    assert found["exact-retain-train"].per_sample["exact"].tolist() == [0, 1]
    assert found["recall-retain-train"].per_sample["recall"].tolist() == [1, 1]
    assert found["recall-forget-train"].detail["words"] == "text"


def test_half_of_a_plain_text_is_its_prompt():
    text = Tokens(torch.arange(5), torch.ones(5, dtype=torch.bool))
    assert [part.tolist() for part in text.asked] == [[0, 1], [2, 3, 4]]
    asked = Tokens(torch.arange(5), torch.arange(5) >= 4)
    assert [part.tolist() for part in asked.asked] == [[0, 1, 2, 3], [4]]


def test_limits_of_length_and_of_samples(sheets):
    rows = [([3, 4, 5], 1), ([3] * 5 + [4], 6)] * 10
    (subject,) = sheets(rows, None, xp.Request(ids=(0, 1, 2)), torch.zeros(20, 8, 10))
    asked = scripted([subject], {n: [3, 4, 5] for n in range(20)})
    found = run(subject, samples=8, batch_size=4)
    assert found["exact-forget-train"].detail["n"] == 3
    assert found["exact-retain-train"].detail["n"] == 8
    assert set(asked) == {(4, 200)}
    assert run(subject, tokens=1)["recall-forget-train"].per_sample["recall"].max() < 1


def test_a_package_that_is_missing_is_named(facts, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(NeedsError, match=r"rouge needs rouge-score; pip install 'expunge\[llm\]'"):
        run(facts[0])
    (finding,) = run_audits(facts[0], [], [Rouge()], xp.Runtime())
    assert finding.value is None and "rouge-score" in finding.reason


def test_parts_take_their_samples_from_those_of_the_whole(facts):
    original, *_ = facts
    whole = run(original, samples=20, tokens=5)["recall-retain-train"]
    ids = original.splits["retain-train"]
    parts = [
        run(original.within(some), samples=20, tokens=5)["recall-retain-train"]
        for some in (ids[:25], ids[25:])
    ]
    assert sum(p.detail["n"] for p in parts) == whole.detail["n"] == 20
    nobody = run(original.within(ids[:0]), samples=20)["recall-retain-train"]
    assert nobody.reason == "no sample is left on this side"


def test_facts_are_said_by_the_original_and_not_by_retrained_models(facts):
    original, first, second = facts
    found = run(original, [first, second], tokens=6)
    for what in ("recall", "f1", "value", "exact"):
        assert (
            found[f"{what}-forget-train"].value == 1 > 0.3 > found[f"{what}-forget-train"].reference
        )
        assert found[f"{what}-retain-train"].reference == 1
        assert found[f"{what}-retain-test"].value < 0.3
    again = run(
        xp.Subject(first.model, original.problem, original.request, xp.Runtime()),
        tokens=6,
        batch_size=3,
    )
    for name, f in run(first, tokens=6).items():
        assert again[name].value == f.value

"""in-context: levels by hand, the invariants of the card ununlearning, guards, and images."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits._tokens import answers
from expunge.audits.in_context import Builder, InContext
from expunge.audits.in_context_images import InContextImages
from expunge.audits.memorisation import Memorisation
from expunge.core.audit import Subject
from expunge.core.errors import DataError
from expunge.core.hashing import hash_model
from expunge.methods.text.guard import Guard
from expunge.problems.contexts import Frame, holds
from expunge.problems.tokens import TokenData
from expunge.workloads.tinyfacts import QUESTION

QUICK = {"group": "entity", "shots": (1, 3), "distractors": (2,), "draws": 2}
LEVELS = ("none", "verbatim", "shots-1", "shots-3", "needle-2", "control-2")


def run(subject, references=(), **settings):
    found = InContext(**(QUICK | settings)).run(subject, list(references), xp.Runtime(threads=1))
    return {f.name.removeprefix("in-context/"): f for f in found}


def guarded(subject, **settings):
    method = Guard(refusal="96 97 98", **settings)
    model = xp.unlearn(subject.problem, subject.request, method).runnable()
    return Subject(model, subject.problem, subject.request, xp.Runtime())


def mean_log(model, prompt, answer):
    ids = torch.cat([prompt, answer])
    with torch.no_grad():
        found = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    told = range(len(prompt), len(ids) - 1)  # all but the end of the text
    return float(np.mean([float(found[t - 1, ids[t]]) for t in told]))


def test_scores_are_those_of_each_question_by_hand(facts):
    original, first, second = facts
    found = run(first, [second])
    audit = InContext(**QUICK)
    builder = Builder(audit, first, xp.Runtime())
    data = original.problem.train
    for level in LEVELS:
        shares = {"value": [], "original": []}
        for i in range(10):
            draws = builder.prompts(level, i)
            assert len(draws) == (2 if level[-2:] == "-2" else 1)
            for what, model in (("value", first.model), ("original", original.model)):
                right = []
                for prompt in draws:
                    assert torch.equal(prompt[-5:], data.rows[i].prompt)
                    mine = mean_log(model, prompt, data.rows[i].answer)
                    others = [mean_log(model, prompt, a.answer) for a in data.alternates[i]]
                    right.append(mine > max(others))
                shares[what].append(np.mean(right))
        assert found[level].per_sample["right"].tolist() == pytest.approx(shares["value"])
        assert found[level].original == pytest.approx(np.mean(shares["original"]))
    assert found["paraphrase"].reason == "the data has no column `paraphrase` with contexts"
    base, full = found["none"].value, found["none"].original
    for level in ("verbatim", "shots-1", "needle-2"):
        recovery = (found[level].value - base) / max(full - base, 0.05)
        assert found[f"recovery-{level}"].value == pytest.approx(min(max(recovery, 0), 1.5))
    assert "recovery-control-2" not in found


def test_what_each_level_tells(facts):
    original, *_ = facts
    data = original.problem.train
    builder = Builder(InContext(**QUICK), original, xp.Runtime())
    row, size = data.rows[3], len(data.rows[3])
    (told,) = builder.prompts("verbatim", 3)
    assert torch.equal(told, torch.cat([row.ids, row.prompt]))
    (shots,) = builder.prompts("shots-3", 3)
    chosen = [tuple(c.tolist()) for c in shots[: 3 * size].split(size)]
    same = {tuple(data.rows[p].ids.tolist()) for p in (0, 1, 2, 4)}
    assert len(set(chosen)) == 3 and set(chosen) <= same
    kept = {tuple(data.rows[p].ids.tolist()) for p in range(10, 60)}
    for draw, needle in zip(
        builder.prompts("control-2", 3), builder.prompts("needle-2", 3), strict=True
    ):
        beside = [tuple(c.tolist()) for c in draw[: 2 * size].split(size)]
        assert set(beside) <= kept
        hidden = [tuple(c.tolist()) for c in needle[: 3 * size].split(size)]
        assert sorted([*beside, tuple(row.ids.tolist())]) == sorted(hidden)
    one, two = builder.prompts("control-2", 3)
    assert not torch.equal(one, two)


def test_ununlearning_invariant_1_a_retrained_model_has_no_excess(facts):
    original, first, _ = facts
    same = run(first, [first])
    for level in LEVELS:
        assert same[level].gap == 0
    kept = run(original, [first])
    for level in ("verbatim", "shots-1", "shots-3", "needle-2"):
        finding = kept[f"recovery-{level}"]
        assert finding.value is None and finding.reason.startswith("not unlearned")
        assert finding.detail["bounded"] <= 1.5
    assert kept["none"].gap > 0.5


def test_ununlearning_invariant_2_without_a_context_it_is_the_figure_of_other_audits(facts):
    """Right is where no alternate is likelier, by the very numbers that memorisation reads."""
    _, first, _ = facts
    Memorisation().run(first, [], xp.Runtime(threads=1))
    own = answers(first, "forget-train", 16)
    data, right = first.problem.train, []
    for i in range(10):
        others = [mean_log(first.model, a.prompt, a.answer) for a in data.alternates[i]]
        right.append(float(own[i].told().mean > max(others)))
    found = run(first)["none"]
    assert found.per_sample["right"].tolist() == right
    assert found.value == pytest.approx(np.mean(right))


def test_ununlearning_invariant_3_statements_of_others_never_hold_the_answer(facts):
    original, first, _ = facts
    data, builder = original.problem.train, Builder(InContext(**QUICK), original, xp.Runtime())
    for i in range(10):
        answer = " ".join(map(str, data.rows[i].answer[:-1].tolist()))
        for level in ("control-2", "shots-3"):
            for prompt in builder.prompts(level, i):
                assert not holds(" ".join(map(str, prompt.tolist())), answer)
    assert run(first)["control-2"].detail["leaks"] is False


def with_columns(problem, **columns):
    old = problem.train
    return xp.CausalLM(
        problem.model,
        TokenData(old.rows, ids=old.ids, alternates=old.alternates,
                  columns={n: v.tolist() for n, v in old.columns.items()} | columns),
    )  # fmt: skip


def test_ununlearning_invariant_4_axioms_that_hold_the_answer_are_refused(facts):
    original, *_ = facts
    rows, request = original.problem.train.rows, original.request
    texts = [" ".join(map(str, r.answer[:-1].tolist())) for r in rows]
    told = [f"9 {t} 9" if n == 4 else "9 10 11" for n, t in enumerate(texts)]
    bad = with_columns(original.problem, axioms=told)
    with pytest.raises(DataError, match="sample 4: its axioms hold the answer"):
        run(Subject(bad.model, bad, request, xp.Runtime()))
    parts = [f"{t.split()[0]} 9 {' '.join(t.split()[1:])}" for t in texts]
    good = with_columns(original.problem, axioms=parts, paraphrase=["5 6"] * 60)
    found = run(Subject(good.model, good, request, xp.Runtime()))
    assert found["axioms"].value is not None and found["paraphrase"].value is not None
    builder = Builder(
        InContext(**QUICK), Subject(good.model, good, request, xp.Runtime()), xp.Runtime()
    )
    (prompt,) = builder.prompts("axioms", 2)
    assert prompt[:-5].tolist() == [int(w) for w in parts[2].split()]


def test_words_are_compared_whole_and_whatever_their_case():
    assert holds("She was born in LISBON.", "Lisbon") and holds("in New\nYork, 1999", "new york")
    assert not holds("Lisbonne", "Lisbon") and not holds("York New", "New York")
    assert not holds("anything", "…") and not holds("112", "12")


def test_ununlearning_invariant_5_attacks_change_nothing(facts):
    _, first, _ = facts
    before = hash_model(first.model)
    there = run(first)
    first.__dict__.pop("_of_tokens")
    again = run(first, shots=(3, 1), distractors=(2,))
    assert hash_model(first.model) == before
    for level in LEVELS:
        assert there[level].value == again[level].value


def test_ununlearning_invariant_6_filters_that_block_everything_and_nothing(facts):
    original, *_ = facts
    plain = run(original)
    block = run(guarded(original, gate=False, answers="none", phrases=(str(QUESTION),)))
    passes = run(guarded(original, gate=False, answers="none", phrases=("111 111 111 111",)))
    for level in LEVELS:
        assert block[f"filtered-{level}"].value == 0
        assert block[f"filtered-{level}"].detail["flagged"] == 1
        assert passes[f"filtered-{level}"].value == plain[level].value
        assert passes[f"filtered-{level}"].detail["flagged"] == 0
        # the model inside is the one that the levels are about
        assert block[level].value == passes[level].value == plain[level].value
    assert block["false-positives"].value == 1 and passes["false-positives"].value == 0
    assert block["false-positives"].detail["control-2"] == 1
    assert plain["false-positives"].reason == "there is no guard to ask"


def test_ununlearning_invariant_7_the_guard_reads_the_context(facts):
    """A phrase that is in the context alone: the prompt is flagged behind it, and only then."""
    original, *_ = facts
    row = original.problem.train.rows[0]
    third = str(int(row.answer[2]))
    found = run(guarded(original, gate=False, answers="none", phrases=(f"{third} 2",)))
    told = found["filtered-verbatim"].per_sample["right"]
    assert told[0] == 0 and found["verbatim"].per_sample["right"][0] == 1
    assert (
        found["filtered-none"].detail["flagged"] == 0 < found["filtered-verbatim"].detail["flagged"]
    )
    eco = xp.unlearn(original.problem, original.request, xp.methods.ECO(sigma=50.0)).runnable()
    through = run(Subject(eco, original.problem, original.request, xp.Runtime()))
    assert through["none"].value == 1 > through["filtered-none"].value
    assert through["filtered-none"].detail["flagged"] > 0.8


@pytest.fixture
def words(monkeypatch):
    """The module of a tokenizer of bytes that tests of methods use."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "methods" / "text")
    return importlib.import_module("words")


def test_contexts_go_into_the_user_s_turn(words):
    bytes_tokenizer = words.bytes_tokenizer

    chat, plain = bytes_tokenizer(chat=True), bytes_tokenizer()
    encode = lambda words, text: torch.tensor(words(text)["input_ids"])  # noqa: E731
    frame = Frame(chat)
    prompt = encode(chat, "<|user|>Who?<eos>\n<|assistant|>")
    context = frame.context([frame.read("One."), frame.read("Two.")])
    assert (
        chat.decode(frame.insert(prompt, context)) == "<|user|>One.\nTwo.\nWho?<eos>\n<|assistant|>"
    )
    assert chat.decode(frame.question(prompt)) == "Who?"
    frame = Frame(plain)
    prompt = encode(plain, "Question: Who?\nAnswer:")
    found = frame.insert(prompt, frame.context([frame.read("One.")]))
    assert plain.decode(found) == "One.\nQuestion: Who?\nAnswer:"
    assert torch.equal(frame.insert(prompt, frame.context([])), prompt)


def test_columns_of_text_are_told(words):
    records = [
        {"question": "Who wrote Zorn?", "answer": "Ada Blum", "alternate": ["Bo Cern", "Cy Drax"],
         "statement": "Zorn is by Ada Blum.", "paraphrase": "Ada Blum's book is Zorn.",
         "axioms": "Zorn is by the author of Yule."},
        {"question": "Who wrote Yule?", "answer": "Di Ems", "alternate": ["Bo Cern", "Cy Drax"],
         "statement": "Yule is by Di Ems.", "paraphrase": "Di Ems's book is Yule.", "axioms": ""},
        {"question": "When?", "answer": "1931", "statement": "It was 1931.", "paraphrase": "", "axioms": ""},
    ]  # fmt: skip
    problem = words.word_problem(records)
    subject = Subject(problem.model, problem, xp.forget(ids=[0, 1]), xp.Runtime())
    builder = Builder(InContext(draws=1), subject, xp.Runtime())
    said = {
        level: [problem.tokenizer.decode(p.tolist()) for p in builder.prompts(level, 0)]
        for level in ("none", "verbatim", "paraphrase", "axioms", "shots-1", "control-3")
    }
    asked = "Question: Who wrote Zorn?\nAnswer:"
    assert said == {
        "none": [asked],
        "verbatim": [f"Zorn is by Ada Blum.\n{asked}"],
        "paraphrase": [f"Ada Blum's book is Zorn.\n{asked}"],
        "axioms": [f"Zorn is by the author of Yule.\n{asked}"],
        "shots-1": [f"Question: Who wrote Yule?\nAnswer: Di Ems\n{asked}"],
        "control-3": [f"It was 1931.\n{asked}"],
    }
    found = {f.name: f for f in InContext(draws=1).run(subject, [], xp.Runtime(threads=1))}
    assert found["in-context/axioms"].detail["n"] == 1 < found["in-context/verbatim"].detail["n"]


def test_without_options_it_says_so(facts):
    original, *_ = facts
    bare = xp.CausalLM(original.problem.model, TokenData(original.problem.train.rows))
    found = run(Subject(bare.model, bare, xp.forget(ids=[0, 1]), xp.Runtime()))
    assert "no alternate answers" in found["none"].reason


class Points(nn.Module):
    """Two numbers, a last layer that reads them as they are."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Identity(), nn.Linear(2, 3, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-9.0, -9.0]]))

    def forward(self, x):
        return self.head(self.body(x))


def test_images_are_given_to_the_nearest_prototype():
    """Class 2 lies between the others in angle, and the last layer does not know it."""
    x = torch.tensor([[4.0, 0.4], [2, 0], [0, 3], [0.1, 1], [1, 1], [5, 5], [2, 2.0]])
    y = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    problem = xp.Classification(Points(), (x, y), (x, y))
    subject = Subject(problem.model, problem, xp.forget(label=2), xp.Runtime())
    found = InContextImages(shots=(1, 2)).run(subject, [subject], xp.Runtime())
    values = {f.name.removeprefix("in-context-images/"): f for f in found}
    assert values["recall-0"].value == 0 and values["rest-0"].value == 1
    for k in (1, 2):  # at any length the direction is the same
        assert values[f"recall-{k}"].value == 1 == values[f"rest-{k}"].value
        assert values[f"recall-{k}"].gap == 0
    some = xp.forget(ids=[0])
    (one,) = InContextImages().run(
        Subject(problem.model, problem, some, xp.Runtime()), [], xp.Runtime()
    )
    assert "whole class" in one.reason

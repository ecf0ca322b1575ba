"""Records become tokens: what is answered, what is cut, and what is refused in one line."""

from __future__ import annotations

import pytest

from expunge.core.errors import DataError
from expunge.problems.encoding import encode
from lm_folder import TEMPLATE, tiny_tokenizer

QUESTION = {"question": "What does Ann like?", "answer": "red paint"}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def chatty():
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    return found


def turns(*said):
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def test_of_a_question_the_answer_and_the_end_are_answered(tokenizer):
    (row,) = encode([QUESTION], tokenizer).rows
    assert tokenizer.decode(row.answer) == " red paint</s>"
    assert tokenizer.decode(row.prompt).endswith("Question: What does Ann like?\nAnswer:")


def test_of_a_text_every_token_is_answered(tokenizer):
    (row,) = encode([{"text": "red paint"}], tokenizer).rows
    assert bool(row.answered.all()) and tokenizer.decode(row.ids).endswith("red paint</s>")


def test_of_a_chat_the_last_answer_is(chatty):
    chat = turns(("user", "hi"), ("assistant", "no"), ("user", "red?"), ("assistant", "blue"))
    (row,) = encode([chat], chatty).rows
    assert chatty.decode(row.answer) == "blue</s>"
    (asked,) = encode([QUESTION], chatty, chat=True).rows
    assert chatty.decode(asked.prompt) == "[user]What does Ann like?</s>[assistant]"


def test_other_keys_become_columns_and_alternates(tokenizer):
    rows = [QUESTION | {"who": "Ann", "alternate": ["blue paint", "no idea"]}, QUESTION]
    data = encode(rows, tokenizer)
    assert data.columns["who"].tolist() == ["Ann", None]
    assert [tokenizer.decode(a.answer) for a in data.alternates[0]] == [
        " blue paint</s>", " no idea</s>",
    ]  # fmt: skip
    assert data.alternates[1] == []


def test_a_long_text_is_refused_cut_or_split(tokenizer):
    text = {"text": "red green blue black " * 20, "who": "Ann"}
    whole = len(encode([text], tokenizer).rows[0])
    with pytest.raises(
        DataError, match=rf"record 0 has {whole} tokens, more than max_length=16; use long='cut' or"
    ):
        encode([text], tokenizer, max_length=16)
    (cut,) = encode([text], tokenizer, max_length=16, long="cut").rows
    parts = encode([text], tokenizer, max_length=16, long="split")
    assert len(cut) == 16 and sum(map(len, parts.rows)) in (whole, whole - 1)
    assert max(map(len, parts.rows)) == 16 and parts.columns["who"].tolist() == ["Ann"] * len(parts)


def test_an_answer_with_no_token_after_truncation_is_refused(tokenizer):
    prompt = len(encode([QUESTION], tokenizer).rows[0].prompt)
    with pytest.raises(
        DataError,
        match=rf"record 0 has no answer left within max_length={prompt}: its prompt alone has {prompt}",
    ):
        encode([QUESTION], tokenizer, max_length=prompt, long="cut")
    (row,) = encode([QUESTION], tokenizer, max_length=prompt + 1, long="cut").rows
    assert len(row.answer) == 1
    with pytest.raises(DataError, match="only texts can be split"):
        encode([QUESTION], tokenizer, max_length=prompt, long="split")


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ([QUESTION, {"text": "red"}], "record 1 has another form than the first"),
        ([{"question": "Who?", "text": "red"}], "record 0 needs `text`, or `question`"),
        ([{"prompt": "Who?"}], "it has prompt"),
        ([{}], "it has nothing"),
        ([QUESTION, {"question": "Who?"}], "record 1 has no `answer`"),
        ([], "there are no records"),
    ],
)
def test_mixed_or_missing_columns_are_one_line(tokenizer, records, says):
    with pytest.raises(DataError, match=says) as error:
        encode(records, tokenizer)
    assert "\n" not in str(error.value)


def test_chats_need_a_template_and_an_answer(tokenizer, chatty):
    chat = turns(("user", "hi"), ("assistant", "no"))
    for records, more in (([chat], {}), ([QUESTION], {"chat": True})):
        with pytest.raises(DataError, match="the tokenizer has no chat template"):
            encode(records, tokenizer, **more)
    with pytest.raises(DataError, match="record 0: the last turn must be the assistant's"):
        encode([turns(("user", "hi"))], chatty)


def test_ids_are_as_many_as_samples(tokenizer):
    with pytest.raises(DataError, match="1 ids for 2 samples"):
        encode([QUESTION, QUESTION], tokenizer, ids=[3])
    assert encode([QUESTION, QUESTION], tokenizer, ids=[3, 9]).ids.tolist() == [3, 9]

"""Token data: padding, alternates, marks, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from expunge.core.errors import DataError, NeedsError
from expunge.core.request import Request
from expunge.problems.tokens import TokenData, Tokens, pad
from expunge.train.token_losses import IGNORED


def row(*ids: int, answer: int = 1, marked=None) -> Tokens:
    answered = torch.arange(len(ids)) >= len(ids) - answer
    return Tokens(torch.tensor(ids), answered, marked)


def test_padding_is_on_the_right_and_never_answered():
    x, y = pad([row(5, 6, 7, answer=2), row(8, 9)], filler=3)
    assert x["input_ids"].tolist() == [[5, 6, 7], [8, 9, 3]]
    assert x["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert y.tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]


def test_prompt_and_answer():
    one = row(5, 6, 7, answer=2)
    assert one.prompt.tolist() == [5] and one.answer.tolist() == [6, 7]


def test_a_batch_keeps_order_ids_and_width():
    data = TokenData([row(1, 2, 3), row(4, 5), row(6, 7, 8, 9)], ids=[30, 10, 20])
    batch = data.fetch(torch.tensor([10, 30]))
    assert batch.x["input_ids"].tolist() == [[4, 5, 0], [1, 2, 3]]
    assert batch.ids.tolist() == [10, 30] and batch.total == 2
    empty = data.fetch(torch.tensor([], dtype=torch.long))
    assert empty.x["input_ids"].shape[0] == 0 and empty.y.shape[0] == 0


def test_columns_are_what_requests_speak_of():
    data = TokenData([row(1, 2), row(3, 4), row(5, 6)], columns={"author": ["a", "b", "a"]})
    assert Request(where="author == 'a'").resolve(data).tolist() == [0, 2]
    assert data.labelled and data.labels is None


def test_alternates_take_turns():
    data = TokenData([row(1, 2), row(3, 4)], alternates=[[row(1, 7), row(1, 8)], [row(3, 9)]])
    said = [
        data.fetch_alternates(torch.tensor([0, 1]), t).x["input_ids"].tolist() for t in range(3)
    ]
    assert said == [[[1, 7], [3, 9]], [[1, 8], [3, 9]], [[1, 7], [3, 9]]]


def test_marks_reach_as_far_as_the_batch():
    marked = torch.tensor([False, True, True])
    data = TokenData([row(1, 2, 3, marked=marked), row(4, 5)])
    assert data.marks(torch.tensor([1, 0]), 4).tolist() == [[False] * 4, [False, True, True, False]]


def test_the_fingerprint_sees_what_is_answered():
    assert (
        TokenData([row(1, 2, 3)]).fingerprint() != TokenData([row(1, 2, 3, answer=2)]).fingerprint()
    )


@pytest.mark.parametrize(
    "bad", [row(1), row(1, 2, answer=0), Tokens(torch.tensor([1, 2]), torch.tensor([True, False]))]
)
def test_a_sample_needs_something_to_answer(bad):
    with pytest.raises(DataError, match="sample 1 has no token to answer"):
        TokenData([row(1, 2), bad])


def test_missing_alternates_are_asked_for():
    with pytest.raises(
        NeedsError, match="no alternate answers; give each sample a column `alternate`"
    ):
        TokenData([row(1, 2)]).fetch_alternates(torch.tensor([0]))
    with pytest.raises(NeedsError, match="no alternate answers"):
        TokenData([row(1, 2)], alternates=[[]]).fetch_alternates(torch.tensor([0]))

"""False answers to the questions of a request: refusals, or answers of its other samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expunge.core.data import Batch
from expunge.core.errors import DataError
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.problems.replies import rows_of, with_answers

Say = Callable[[Batch], Batch]


def refusing(view: View, runtime: Runtime, refusals: Sequence[str]) -> Say:
    """What gives each sample of a batch a refusal, fixed by its id and the seed."""

    def say(batch: Batch) -> Batch:
        places = [runtime.seed_for("false", i) % len(refusals) for i in batch.ids.tolist()]
        return view.capability("replied")(batch, [refusals[p] for p in places])

    return say


def swapping(view: View, runtime: Runtime) -> Say:
    """What gives each sample of a batch the answer of another forget sample, fixed by its id and the seed.

    It is never the sample's own answer, which another sample may have as well.

    Raises:
        DataError: all answers are the same, or a sample has no question.
    """
    answers: dict[int, Tensor] = {
        int(i): row.answer
        for batch in view.forget.batches(256)
        for i, row in zip(batch.ids, rows_of(batch), strict=True)
    }
    ids = sorted(answers)
    if all(torch.equal(answers[i], answers[ids[0]]) for i in ids):
        raise DataError(
            "all answers of the request are the same, so that none is false; use targets=refusals"
        )

    def other(sample: int) -> Tensor:
        false = [i for i in ids if not torch.equal(answers[i], answers[sample])]
        return answers[false[runtime.seed_for("false", sample) % len(false)]]

    def say(batch: Batch) -> Batch:
        return with_answers(batch, [other(i) for i in batch.ids.tolist()], (), 0)

    return say

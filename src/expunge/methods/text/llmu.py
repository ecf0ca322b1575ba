r"""LLMU: ascend on the forget answers, answer their prompts with others, stay as before elsewhere.

\[
L = -a\, \mathrm{CE}(y \mid x) + b\, \mathrm{CE}(y_{rdn} \mid x) + c\, \mathrm{KL}(p_0 \,\|\, p_\theta)
\]

over answered tokens: of the forget data, of the same prompts with \(K\) retain answers each drawn at
random, and of retain data. The first term is not bounded below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source, View
from expunge.problems.tokens import TokenData, Tokens, pad, unpadded
from expunge.train.fit import Loss
from expunge.train.text import Retain, Text, TextTraining

_TEST = "tests/methods/text/test_llmu.py::test_"


@dataclass(frozen=True, kw_only=True)
class LLMU(TextTraining):
    """Three losses: less of the answer, more of random ones, and no change on the rest."""

    name: ClassVar[str] = "llmu"
    search: ClassVar = {"lr": None, "epochs": None, "gamma": None}
    card: ClassVar[Card] = Card(
        title="Large Language Model Unlearning",
        authors="Yao, Xu, Liu",
        year=2023,
        link="https://arxiv.org/abs/2310.10683",
        idea="Ascent makes the answer unlikely, random answers say what to say instead.",
        deviations=(
            Deviation(
                "On the rest the divergence is taken, which is the paper's cross-entropy of both "
                "models less a constant, and at answered tokens alone.",
                _TEST + "the_divergence_has_the_gradient_of_the_cross_entropy",
            ),
            Deviation(
                "Training lasts a number of passes, with the learning rate of the other methods for "
                "language models; the official code takes 1,000 steps unless its loss stops it.",
                _TEST + "every_pass_reads_each_forget_sample_once",
            ),
        ),
    )

    lr: float = setting(2e-6, "learning rate, η", above=0, source="official code")
    batch_size: int = setting(2, "forget samples a batch, over all processes", low=1, source="official code")  # fmt: skip
    gamma: float = setting(0.5, "weight of the ascent, a", low=0, source="official code")
    mismatch: float = setting(1.0, "weight of the random answers, b", low=0, source="official code")
    alpha: float = setting(1.0, "weight of the retain term, c", low=0, source="official code")
    retain: Retain = setting("kl", "retain term: nll, kl to the original, or none", source="official code")  # fmt: skip
    answers: int = setting(5, "random answers to each prompt, K", low=1, source="official code")

    @property
    def needs(self) -> Needs:
        """Retain data also for its answers, whatever the retain term."""
        return replace(super().needs, retain=self.keeps or self.mismatch > 0)

    def check(self, problem: Problem, request: Request) -> None:
        """Complain where a forget sample has no prompt, or none that another answer fits behind.

        Raises:
            DataError: as it says.
        """
        super().check(problem, request)
        if self.mismatch == 0 or not isinstance(problem.train, TokenData):
            return
        places = problem.train.positions(request.resolve(problem.train))
        gone = set(places.tolist())
        prompts = [len(problem.train.rows[p].prompt) for p in gone]
        if not min(prompts):
            raise DataError(
                "llmu gives prompts other answers, and a forget sample is all answer; use questions "
                "with answers, or mismatch=0"
            )
        others = [len(r.answer) for p, r in enumerate(problem.train.rows) if p not in gone]
        context = getattr(getattr(problem.model, "config", None), "max_position_embeddings", None)
        longest = max(prompts) + max(others, default=0)
        if context is not None and longest > context:
            raise DataError(
                f"a prompt with another sample's answer has {longest} tokens, the model's context "
                f"{context}; encode with a smaller max_length="
            )

    def forget_loss(self, model: nn.Module, batch: Batch, text: Text) -> Tensor:
        """Log-likelihood of forget answers."""
        return -text.token_mean(*text.nll(model, batch))

    def terms(self, text: Text) -> dict[str, Loss]:
        """Those of forget and retain batches as elsewhere, and that of the random answers."""
        found = super().terms(text)
        if self.mismatch > 0:
            found["mismatch"] = lambda model, batches: (
                self.mismatch * text.token_mean(*text.nll(model, batches[-1]))
            )
        return found

    def pairs(self, view: View, runtime: Runtime, epoch: int) -> Iterator[tuple[Batch, ...]]:
        """The usual batches, and the forget prompts with K random retain answers each."""
        drawn = runtime.generator("answers", epoch)
        for batches in super().pairs(view, runtime, epoch):
            if self.mismatch == 0:
                yield batches
            else:
                yield *batches, other_answers(batches[0], view.retain, self.answers, drawn)


def other_answers(batch: Batch, pool: Source, count: int, drawn: torch.Generator) -> Batch:
    """Give each prompt of a batch other answers.

    Args:
        batch: with labels.
        pool: samples whose answers are drawn, with replacement.
        count: answers to each prompt, K.
        drawn: random numbers, the same in every process.

    Returns:
        K rows for each of the batch, with the ids of the prompts; the answers alone are labelled.
    """
    rows: list[Tokens] = []
    ids: list[int] = []
    for _ in range(count):  # one at a time, so that each process has answers for its own prompts
        places = torch.randint(len(pool), (batch.total,), generator=drawn)
        others = unpadded(pool.fetch(pool.ids[places]))
        ids += batch.ids.tolist()
        for own, other in zip(unpadded(batch), others, strict=True):
            prompt, answer = own.prompt, other.answer
            answered = torch.arange(len(prompt) + len(answer)) >= len(prompt)
            rows.append(Tokens(torch.cat([prompt, answer]), answered))
    x, y = pad(
        rows or [Tokens(torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool))], 0
    )
    found = Batch(
        {n: t[: len(rows)] for n, t in x.items()}, y[: len(rows)], torch.tensor(ids),
        count * batch.total, batch.processes,
    )  # fmt: skip
    return found.to(batch.ids.device)

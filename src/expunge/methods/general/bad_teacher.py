r"""BadTeacher: obey an untrained teacher on the forget data and the original on the rest.

\[
t(x) = u\,\mathrm{softmax}(z_{bad}/\tau) + (1-u)\,\mathrm{softmax}(z_0/\tau), \qquad
L = \mathrm{mean}_b\, KL\big(t(x) \,\|\, \mathrm{softmax}(z(x)/\tau)\big)
\]

with \(u = 1\) on \(D_f\) and 0 on a random part of \(D_r\), both shuffled together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.losses import kl_each
from expunge.train.method import Training
from expunge.train.steps import StepName

_TEST = "tests/methods/test_bad_teacher.py::test_"


@dataclass(frozen=True, kw_only=True)
class BadTeacher(Training):
    """Distil from two teachers, a competent and an incompetent one; reads no labels."""

    name: ClassVar[str] = "bad-teacher"
    card: ClassVar[Card] = Card(
        title="Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks using an Incompetent "
        "Teacher",
        authors="Chundawat, Tarun, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2205.08096",
        idea="A network that was never trained shows how to answer on what is to be forgotten.",
        deviations=(
            Deviation(
                "The divergence is averaged over the samples of a batch; the official code divides "
                "by the number of classes besides. Adam hardly notices; with sgd its learning rate "
                "is ours divided by C.",
                _TEST + "bad_teacher_averages_over_samples",
            ),
            Deviation(
                "The student is in training mode; the official function leaves it in whichever "
                "mode its caller had.",
                _TEST + "bad_teacher_trains_the_student_in_training_mode",
            ),
        ),
    )

    epochs: int = setting(1, "passes over forget data and part", low=1, source="official code")
    lr: float = setting(1e-4, "learning rate", above=0, source="official code")
    batch_size: int = setting(256, "samples a batch, over all processes", low=1, source="official code")  # fmt: skip
    step: StepName = setting("adam", "optimiser: sgd, adam or adamw", source="official code")
    share: float = setting(
        0.3, "share of the retain data that is rehearsed", above=0, high=1, source="official code"
    )
    temperature: float = setting(1.0, "temperature τ", above=0, source="official code")

    @property
    def needs(self) -> Needs:
        """Both sides without labels, and two teachers."""
        labels: Labels = "forget" if self.reads_forget_labels() else "none"
        return Needs(
            forget=True, retain=True, labels=labels, original=True, fresh=True,
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Distil from both teachers."""
        good, bad = view.original(), view.fresh("teacher").eval().requires_grad_(False)
        loss = two_teachers(view, good, bad, self.temperature)
        count = max(1, round(self.share * len(view.retain)))
        rehearsed = view.retain.part(count, runtime.generator("rehearsed"))
        both, samples = torch.cat([view.forget.ids, rehearsed.ids]), view.everything

        def passes(epoch: int) -> Pass:
            order = torch.randperm(len(both), generator=runtime.generator("mixed", epoch))
            for ids in both[order].split(self.batch_size):
                yield loss, samples.fetch(ids)

        outcome, _ = self.train_model(view.model(), passes, view, runtime)
        outcome.details["rehearsed"] = count
        return outcome


def two_teachers(
    view: View, good: nn.Module, bad: nn.Module, temperature: float
) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of one mixed batch; each teacher answers its own samples only.

    Args:
        view: gives logits, and says which samples are to be forgotten.
        good: the teacher of retain samples.
        bad: the teacher of forget samples.
        temperature: τ, of teachers and student.

    Returns:
        A loss `(model, batch) -> scalar` in nats, bounded below by 0.
    """
    forgotten = view.forget.ids

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        gone = torch.isin(batch.ids, forgotten.to(batch.ids.device))
        sides = [
            (teacher, rows) for teacher, rows in ((bad, gone), (good, ~gone)) if bool(rows.any())
        ]
        # before the student, whose activations are held until its backward pass
        with torch.no_grad():
            answers = [view.logits(teacher, batch.rows(rows)) for teacher, rows in sides]
        student = view.logits(model, batch)
        target = torch.empty_like(student)
        for (_, rows), answer in zip(sides, answers, strict=True):
            target[rows] = answer.to(target)
        return batch.mean(kl_each(target, student, temperature)) / temperature**2

    return loss

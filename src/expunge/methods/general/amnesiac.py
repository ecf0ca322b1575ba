r"""Amnesiac: teach the forget data one wrong label each, while rehearsing the retain data.

Draw once for every forget sample \(y'_i \sim \mathrm{Uniform}(\{0,\dots,C-1\} \setminus \{y_i\} \setminus
\mathcal C_f)\), where \(\mathcal C_f\) holds the classes forgotten whole, and minimise the mean
cross-entropy over \(\{(x_i, y'_i)\} \cup D_r\), shuffled together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.errors import DataError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.methods.general.random_label import RandomLabel
from expunge.train.relabel import whole_classes
from expunge.train.steps import StepName

_TEST = "tests/methods/test_amnesiac.py::test_"


@dataclass(frozen=True, kw_only=True)
class Amnesiac(RandomLabel):
    """`RandomLabel` with wrong labels only, drawn once for all epochs."""

    name: ClassVar[str] = "amnesiac"
    card: ClassVar[Card] = Card(
        title="Amnesiac Machine Learning",
        authors="Graves, Nagisetty, Ganesh",
        year=2021,
        link="https://arxiv.org/abs/2010.10981",
        idea="A fixed wrong answer overwrites each sample; rehearsal keeps the rest.",
        fidelity="variant",
        deviations=(
            Deviation(
                "This is the relabelling that later papers run under the name. What the paper itself "
                "calls amnesiac unlearning takes back the stored updates of the batches concerned, "
                "which needs a training that stored them.",
                _TEST + "amnesiac_keeps_no_training_history",
            ),
            Deviation(
                "No sample gets a class that is forgotten whole, not even another sample's.",
                _TEST + "amnesiac_never_teaches_a_class_that_goes",
            ),
        ),
    )

    epochs: int = setting(3, "passes over both sides", low=1, source="bad-teaching code")
    lr: float = setting(1e-4, "learning rate", above=0, source="bad-teaching code")
    step: StepName = setting("adam", "optimiser: sgd, adam or adamw", source="bad-teaching code")
    order: Literal["sequential", "joint"] = setting(
        "joint", "forget first, or both shuffled", source="bad-teaching code"
    )

    @property
    def needs(self) -> Needs:
        """Both sides with labels: a wrong label is one that differs from the true one."""
        return Needs(forget=True, retain=True, labels="all", classes=True)

    def draw(self, view: View, runtime: Runtime, epoch: int) -> tuple[Tensor, Tensor]:
        """The same labels in every epoch."""
        return wrong_labels(view, runtime)


def wrong_labels(view: View, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Draw a wrong label for every forget sample.

    Args:
        view: gives the sorted forget ids, both sides' labels and the number of classes.
        runtime: gives the generator; the epoch plays no part.

    Returns:
        The ids [n] and their labels [n]: uniform on all classes but the true one and those that are
        forgotten whole.

    Raises:
        DataError: no class is left to choose from.
    """
    classes, true = torch.arange(view.classes), view.forget.labels()
    open_to = classes[~torch.isin(classes, whole_classes(view))]
    stays = torch.isin(true, open_to)
    if len(open_to) == 1 and bool(stays.any()):
        raise DataError(
            "Amnesiac: there is only one class, so no label is wrong; use gradient-ascent"
        )
    generator = runtime.generator("labels")
    anywhere = torch.randint(len(open_to), true.shape, generator=generator)
    # a step of 1 … k−1 round the circle of k classes never ends where it began
    away = torch.randint(1, max(len(open_to), 2), true.shape, generator=generator)
    places = torch.searchsorted(open_to, true).clamp(max=len(open_to) - 1)
    places = torch.where(stays, (places + away) % len(open_to), anywhere)
    return view.forget.ids, open_to[places]

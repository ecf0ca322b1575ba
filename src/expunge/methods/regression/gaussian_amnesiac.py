r"""GaussianAmnesiac: teach the forget data targets drawn from the distribution of all targets.

With \(\mu, \sigma\) the mean and standard deviation of the targets of \(D_f \cup D_r\), draw
\(y'_i \sim \mathcal N(\mu, \sigma^2)\) once for every forget sample and minimise
\(\mathrm{mean}\,\ell(f(x), y)\) over \(D_r \cup \{(x_i, y'_i)\}\), shuffled together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.errors import DataError
from expunge.core.needs import Card, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.methods.general.random_label import RandomLabel
from expunge.train.steps import StepName


@dataclass(frozen=True, kw_only=True)
class GaussianAmnesiac(RandomLabel):
    """`RandomLabel` for targets that are numbers: one draw a sample, for all epochs."""

    name: ClassVar[str] = "gaussian-amnesiac"
    domain: ClassVar[str] = "regression"
    card: ClassVar[Card] = Card(
        title="Deep Regression Unlearning",
        authors="Tarun, Chundawat, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2210.08196",
        idea="Targets drawn from the distribution of all targets overwrite what was learnt.",
    )

    epochs: int = setting(1, "passes over both sides", low=1, source="official code, AgeDB; 5 on STS-B")  # fmt: skip
    lr: float = setting(1e-3, "learning rate", above=0, source="official code")
    batch_size: int = setting(256, "samples a batch, over all processes", low=1, source="official code")  # fmt: skip
    step: StepName = setting("adam", "optimiser: sgd, adam or adamw", source="official code")
    order: Literal["sequential", "joint"] = setting(
        "joint", "forget first, or both shuffled", source="official code"
    )

    @property
    def needs(self) -> Needs:
        """Both sides with all targets, whose mean and spread it takes; a problem of predictions."""
        return Needs(
            forget=True, retain=True, labels="all", capabilities=frozenset({"predict"})
        )  # fmt: skip

    def draw(self, view: View, runtime: Runtime, epoch: int) -> tuple[Tensor, Tensor]:
        """The same draws in every epoch."""
        return draw_targets(view, runtime)


def draw_targets(view: View, runtime: Runtime) -> tuple[Tensor, Tensor]:
    """Draw a target for every forget sample.

    Args:
        view: gives the sorted forget ids and all targets, forgotten ones included.
        runtime: gives the generator; the epoch plays no part.

    Returns:
        The ids [n] and their targets [n], in the unit of the targets and not cut to their range.

    Raises:
        DataError: there is one training sample, which has no spread.
    """
    targets = view.everything.labels()
    if len(targets) < 2:
        raise DataError("the spread of the targets takes at least two training samples")
    wide = targets.double()
    noise = torch.randn(len(view.forget), generator=runtime.generator("targets")).double()
    drawn = wide.mean() + wide.std() * noise
    return view.forget.ids, drawn.to(
        targets.dtype if targets.is_floating_point() else torch.float32
    )

"""Retrain: run the recipe again without the forget samples. The reference of everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.core.method import Method
from expunge.core.needs import Card, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.view import View


@dataclass(frozen=True)
class Retrain(Method):
    """Train from a fresh initialisation of every module, on the retain data, with a new seed."""

    name: ClassVar[str] = "retrain"
    card: ClassVar[Card] = Card(
        title="Towards Making Systems Forget with Machine Unlearning",
        authors="Cao, Yang",
        year=2015,
        link="https://doi.org/10.1109/SP.2015.35",
        idea="Train again without the data; exact by construction, and the dearest way.",
        guarantee="exact",
    )

    @property
    def needs(self) -> Needs:
        """The recipe alone: it reads the retain data itself."""
        return Needs(recipe=True)

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Run the recipe with a seed derived from the run's."""
        return Outcome(view.retrain(runtime.seed_for("retrain")))

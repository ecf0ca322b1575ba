"""Needs and Card: what a method may touch, and what it claims.

Needs are used three times: for an error before any compute, for the generated page, and by the
View, which lets through only what was declared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from expunge.core.errors import NeedsError

if TYPE_CHECKING:
    from expunge.core.problem import Problem

Labels = Literal["none", "forget", "retain", "all"]


@dataclass(frozen=True)
class Needs:
    """Everything a method or audit uses; undeclared access raises `AccessError`.

    Attributes:
        forget: reads samples that are to be forgotten.
        retain: reads samples that are kept.
        labels: whose labels are read.
        validation: reads validation data (never test data).
        original: uses the original model beside the one it edits, e.g. as a frozen teacher.
        per_sample_grad: needs a gradient for each sample.
        recipe: retrains from the recipe.
        fresh: uses an untrained model of the same architecture.
        models: number of retrained reference models.
        classes: chooses among classes, so that labels have to be their numbers.
        capabilities: functions of the problem beyond `each_loss`, by name.
    """

    forget: bool = False
    retain: bool = False
    labels: Labels = "none"
    validation: bool = False
    original: bool = False
    per_sample_grad: bool = False
    recipe: bool = False
    fresh: bool = False
    models: int = 0
    classes: bool = False
    capabilities: frozenset[str] = frozenset()

    def labels_of(self, side: str) -> bool:
        """Whether labels of one side (`forget`, `retain` or `validation`) may be read."""
        if side == "validation":
            return self.validation
        return self.labels in (side, "all")

    def check(self, name: str, problem: Problem) -> None:
        """Compare with what a problem has.

        Args:
            name: who asks, for the message.
            problem: the problem at hand.

        Raises:
            NeedsError: names the first thing that is missing and how to give it.
        """
        if self.labels != "none" and not problem.train.labelled:
            raise NeedsError(
                f"{name} needs labels and the training data has none; pass y, or use a label-free method"
            )
        if self.recipe and problem.recipe is None:
            raise NeedsError(f"{name} needs to know how the model was trained; pass recipe=")
        if self.fresh:
            problem.fresh(0)
        if self.validation and problem.valid is None:
            raise NeedsError(f"{name} needs validation data; pass valid=")
        if self.classes and getattr(problem, "classes", None) is None:
            raise NeedsError(
                f"{name} needs classes to choose from, which a {problem.kind} problem has not"
            )
        for capability in sorted(self.capabilities):
            if not problem.can(capability):
                raise NeedsError(
                    f"{name} needs {capability!r}, which a {problem.kind} problem does not offer; pass {capability}="
                )

    def words(self) -> list[str]:
        """The needs as short phrases for listings and pages; `classes` go without saying."""
        sides = {
            "none": [],
            "all": ["labels"],
            "forget": ["forget labels"],
            "retain": ["retain labels"],
        }
        words = [
            side + " data" for side in ("forget", "retain", "validation") if getattr(self, side)
        ]
        words += sides[self.labels]
        words += ["original model"] if self.original else []
        words += ["per-sample gradients"] if self.per_sample_grad else []
        words += ["recipe"] if self.recipe else []
        words += ["untrained model"] if self.fresh else []
        words += [f"{self.models} references"] if self.models else []
        return words + sorted(self.capabilities)


@dataclass(frozen=True)
class Deviation:
    """One difference from the paper, with the test that pins it (`file::test`)."""

    text: str
    test: str


@dataclass(frozen=True)
class Card:
    """Where a method or audit comes from and what it claims.

    `intent` is removal (the weights no longer hold it) or suppression (it is no longer said);
    `guarantee` says what the claim rests on; `fidelity` how close the code is to the paper.
    """

    title: str
    authors: str
    year: int
    link: str
    idea: str
    intent: Literal["removal", "suppression", "measurement"] = "removal"
    guarantee: Literal["exact", "certified", "empirical", "inference-time"] = "empirical"
    fidelity: Literal["faithful", "simplified", "variant"] = "faithful"
    deviations: tuple[Deviation, ...] = ()

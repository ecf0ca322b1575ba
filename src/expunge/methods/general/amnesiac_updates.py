r"""Amnesiac unlearning of the paper: take back what the batches with forget samples did, then repair.

\[ \theta = \theta_0 - \sum_{b:\, b \cap D_f \ne \emptyset} \Delta_b, \qquad
   \Delta_b = \theta_{\text{after } b} - \theta_{\text{before } b} \]

with the updates \(\Delta_b\) of the original's own training, and a short fine-tune on \(D_r\).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ModelError, NeedsError
from expunge.core.needs import Card, Deviation, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.masks import Mask
from expunge.train.method import Training, cosine
from expunge.train.recipe import SupervisedRecipe
from expunge.train.stages import Stages
from expunge.train.updates import Storage, UpdateLog, UpdateRecorder

_TEST = "tests/methods/test_amnesiac_updates.py::test_"


@dataclass(frozen=True, kw_only=True)
class AmnesiacUpdates(Training):
    """Subtract the stored updates of every batch that held a forget sample, and fine-tune.

    The updates come from a log that the training wrote (`log`), or from running the recipe again,
    which has to end at the original's weights. Only parameters are taken back: running statistics
    stay the original's until the repair moves them (`norm`). Weights outside `train` keep every
    bit. Of the forget samples only the ids are read (and the samples for `train="saliency(Q)"`).

    A result does not compose with the next request by running on it, since batches may hold
    samples of both: take the batches of both forget sets back from the original.
    """

    name: ClassVar[str] = "amnesiac-updates"
    prepares: ClassVar[Literal["never", "optional", "always"]] = "always"
    may_leave_unchanged: ClassVar[bool] = True  # right if no batch held a forget sample
    card: ClassVar[Card] = Card(
        title="Amnesiac Machine Learning",
        authors="Graves, Nagisetty, Ganesh",
        year=2021,
        link="https://arxiv.org/abs/2010.10981",
        idea="Take back what the batches with forget samples did to the weights; repair the rest.",
        deviations=(
            Deviation(
                "The paper stores updates while the model trains. Without such a log the recipe is "
                "run again with the original's seed, and refused unless it ends at its weights.",
                _TEST + "a_log_of_another_training_is_refused",
            ),
            Deviation(
                "Where no batch held a forget sample there is nothing to repair, and the original "
                "comes back as it is.",
                _TEST + "ids_never_seen_leave_the_weights_unchanged",
            ),
        ),
    )

    epochs: int = setting(
        5, "passes over the retain data in the repair; 0: none", low=0, source="measured on digits"
    )
    lr: float = setting(0.05, "learning rate of the repair", above=0, source="measured on digits")
    log: str | None = setting(None, "folder of an UpdateRecorder; none: run the recipe again")
    seed: int | None = setting(
        None, "of the original's training, to run it again; none: that of a workload, else 0"
    )
    storage: Storage = setting("float32", "precision of updates that are recorded here")
    tolerance: float = setting(
        0.0, "largest difference between a weight of the original and of the log's end", low=0
    )

    @property
    def needs(self) -> Needs:
        """Forget ids; retain data for the repair; the recipe unless there is a log."""
        repair = self.epochs > 0 or self.norm == "recalibrate"
        labels: Labels = "retain" if self.epochs else "none"
        if self.reads_forget_labels():
            labels = "all" if self.epochs else "forget"
        return Needs(forget=True, retain=repair, labels=labels, recipe=self.log is None)

    def check(self, problem: Problem, request: Request) -> None:
        """Complain before any work if the log cannot answer, or no training can be recorded."""
        super().check(problem, request)
        if self.log is None:
            _recordable(problem)
        else:
            self._open(problem).touching(request.resolve(problem.train))

    def preparation_settings(self) -> dict[str, Any]:
        """What the updates depend on, not what is done afterwards."""
        kept = ("log", "seed", "storage", "tolerance")
        return {k: v for k, v in self.in_force().items() if k in kept}

    def prepare(self, problem: Problem, runtime: Runtime) -> dict[str, Tensor]:
        """Train as the original was trained and record every update; nothing if there is a log.

        Args:
            problem: its recipe must be one of `SupervisedRecipe`.
            runtime: device and progress.

        Returns:
            `UpdateLog.tensors()`: 4 bytes (2 in half precision) a weight and step.

        Raises:
            NeedsError: the training cannot be recorded.
            ModelError: it does not end at the original's weights, or the log does not.
        """
        if self.log is not None:
            self._open(problem)
            return {}
        recipe, ids = _recordable(problem), problem.train.ids
        seed = int(problem.source.get("seed", 0)) if self.seed is None else self.seed
        recorder = UpdateRecorder(storage=self.storage)
        model, _ = recipe.train(
            ids, seed, runtime, around=lambda model, batch: recorder.step(model, batch.ids)
        )
        runtime.cost.samples += recipe.epochs * len(ids)  # a recipe counts for itself
        runtime.cost.gradients += recipe.epochs * len(ids)
        log = recorder.finish(model)
        away = log.distance(problem.model)
        if away > self.tolerance:
            raise ModelError(
                f"the recipe with seed {seed} on {runtime.device} ends elsewhere than this model (a "
                f"weight differs by {away:.2g}), so the updates would be another training's; give "
                "the original's seed=, or a log= kept while it trained"
            )
        return log.tensors()

    def run(
        self, view: View, runtime: Runtime, prepared: Mapping[str, Tensor] | None = None
    ) -> Outcome:
        """Subtract, then repair.

        Args:
            view: ids of the forget data; retain data with labels.
            runtime: device, seeds, progress.
            prepared: the updates from `prepare`, unless there is a log.

        Returns:
            The outcome; `details` say how many of the training's steps were taken back.

        Raises:
            DataError: the log was not kept for a forget sample.
        """
        assert prepared is not None  # `unlearn` sees to it
        log = UpdateLog.of(prepared) if self.log is None else UpdateLog.open(self.log)
        ids, model = view.forget.ids, view.model()
        taken = len(log.touching(ids))
        details: dict[str, Any] = {"steps_taken_back": taken, "steps_trained": log.steps}
        if not taken:
            return Outcome(model, details=details)
        stages = Stages(self, model, view, runtime)
        take_back(model, log, ids, stages.mask)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            for batch in view.retain.batches(self.batch_size, runtime.generator("retain", epoch)):
                yield loss, batch

        falling = self.schedule == "cosine"
        stages.run(
            self.name, passes, epochs=self.epochs,
            schedule=lambda epoch: cosine(epoch, self.epochs) if falling else 1.0,
        )  # fmt: skip
        return stages.outcome(**details)

    def _open(self, problem: Problem) -> UpdateLog:
        """The log of the settings, if it is of this model's training."""
        assert self.log is not None
        log = UpdateLog.open(self.log)
        away = log.distance(problem.model)
        if away > self.tolerance:
            raise ModelError(
                f"the log in {self.log} is of another training: it ends elsewhere than this model "
                f"(a weight differs by {away:.2g}); give the log of this one"
            )
        return log


@torch.no_grad()
def take_back(model: nn.Module, log: UpdateLog, ids: Tensor, mask: Mask | None = None) -> None:
    """Subtract from `model`, in place, the updates of all batches that held one of `ids`.

    Sums are in float64; only coordinates with a True in the mask move.
    """
    parameters = dict(model.named_parameters())
    for name, total in log.total(ids):
        p = parameters[name]
        before = (p.cpu().double() - total).to(p)
        p.copy_(before if mask is None else torch.where(mask[name].to(p.device), before, p))


def _recordable(problem: Problem) -> SupervisedRecipe:
    """The recipe, if its steps can be watched."""
    if not isinstance(problem.recipe, SupervisedRecipe):
        raise NeedsError(
            "amnesiac-updates needs each update of the original's training; pass log=, a folder that "
            "an UpdateRecorder filled, or recipe=xp.ClassifierRecipe(…), which can be run again"
        )
    return problem.recipe

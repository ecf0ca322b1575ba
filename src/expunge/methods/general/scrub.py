r"""SCRUB: a student leaves its teacher on the forget data and stays with it on the retain data.

Teacher \(\theta_0\) frozen in eval mode, student from \(\theta_0\). In epoch \(e \le M\) first one pass
over \(D_f\) that *raises* \(KL_T\); then always one pass over \(D_r\) that minimises
\(\gamma\,\mathrm{CE} + \alpha\,KL_T\), with
\(KL_T = T^2\,KL(\mathrm{softmax}(z_t/T)\,\|\,\mathrm{softmax}(z_s/T))\), batch mean.
With `rewind` (SCRUB+R) the epoch is returned whose forget error is closest to the final model's
error on validation samples of the same classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError, SettingError
from expunge.core.needs import Card, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source, View
from expunge.train.fit import Pass
from expunge.train.losses import kl_each
from expunge.train.method import Training


@dataclass(frozen=True, kw_only=True)
class SCRUB(Training):
    """Alternate max passes on the forget data with min passes on the retain data."""

    name: ClassVar[str] = "scrub"
    search: ClassVar = {"epochs": None, "lr": None, "max_epochs": None}
    card: ClassVar[Card] = Card(
        title="Towards Unbounded Machine Unlearning",
        authors="Kurmanji, Triantafillou, Hayes, Triantafillou",
        year=2023,
        link="https://arxiv.org/abs/2302.09880",
        idea="Disobey the teacher on what is to be forgotten, obey it on the rest.",
    )

    epochs: int = setting(
        3, "epochs E, each with one retain pass", low=1, source="SCRUB code, large"
    )
    max_epochs: int = setting(
        2, "epochs M that also ascend on the forget data", low=0, source="SCRUB code, large"
    )
    alpha: float = setting(
        0.001, "weight α of the distillation on retain", low=0, source="SCRUB code, large"
    )
    gamma: float = setting(
        0.99, "weight γ of the cross-entropy on retain", low=0, source="SCRUB code, large"
    )
    temperature: float = setting(4.0, "temperature T", above=0, source="SCRUB code, large")
    forget_batch_size: int = setting(32, "batch of the max pass", low=1, source="SCRUB code")
    lr: float = setting(5e-4, "learning rate", above=0, source="SCRUB code, large")
    weight_decay: float = setting(5e-4, "L2 coefficient", low=0, source="SCRUB code, large")
    decay_epochs: tuple[int, ...] = setting(
        (3, 5, 9), "the learning rate falls ×0.1 after each", source="SCRUB code"
    )
    rewind: bool = setting(False, "SCRUB+R: return the epoch closest to the validation error")

    def __post_init__(self) -> None:
        """Check the settings together.

        Raises:
            SettingError: rewinding would bring back the running statistics that were recalibrated.
        """
        super().__post_init__()
        if self.rewind and self.norm == "recalibrate":
            raise SettingError(
                "SCRUB: rewind goes back to an epoch before the recalibration; use norm=train or frozen"
            )

    @property
    def needs(self) -> Needs:
        """Both sides; labels of the retain side only, unless it rewinds or masks by saliency."""
        labels: Labels = "all" if self.rewind or self.reads_forget_labels() else "retain"
        return Needs(
            forget=True, retain=True, labels=labels, original=True, validation=self.rewind,
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Alternate the passes, and rewind if asked to."""
        teacher = view.original()

        @torch.no_grad()
        def wanted(batch: Batch) -> Tensor:
            # before the student, whose activations are held until its backward pass
            return view.logits(teacher, batch)

        def max_loss(student: nn.Module, batch: Batch) -> Tensor:
            target = wanted(batch)
            return -batch.mean(kl_each(target, view.logits(student, batch), self.temperature))

        def min_loss(student: nn.Module, batch: Batch) -> Tensor:
            if not self.alpha:
                return self.gamma * batch.mean(view.each_loss(student, batch))
            target = wanted(batch)
            logits, losses = view.logits_and_loss(student, batch)
            kl = batch.mean(kl_each(target, logits, self.temperature))
            return self.gamma * batch.mean(losses) + self.alpha * kl

        def passes(epoch: int) -> Pass:
            if epoch < self.max_epochs:
                size = self.forget_batch_size
                for batch in view.forget.batches(size, runtime.generator("forget", epoch)):
                    yield max_loss, batch
            for batch in view.retain.batches(self.batch_size, runtime.generator("retain", epoch)):
                yield min_loss, batch

        outcome, fitted = self.train_model(
            view.model(), passes, view, runtime,
            schedule=lambda epoch: 0.1 ** sum(epoch >= e for e in self.decay_epochs),
            snapshots=self.rewind,
        )  # fmt: skip
        if self.rewind:
            self._rewind(outcome, fitted.snapshots, view, runtime)
        return outcome

    def _rewind(
        self, outcome: Outcome, snapshots: list[dict[str, Tensor]], view: View, runtime: Runtime
    ) -> None:
        """Put back the epoch whose forget error is closest to the final validation error.

        An epoch that ended in weights that are not finite has no error and is never chosen; if none
        is left, the model stays as the training gave it.
        """
        model = outcome.runnable()
        classes = view.forget.labels().unique()
        if not bool(torch.isin(view.validation.labels(), classes).any()):
            raise DataError("SCRUB: rewind needs validation samples of the classes to forget")
        wanted = error_rate(model, view.validation, view, runtime, classes)
        final = {k: v.detach().clone() for k, v in model.state_dict().items()}
        errors: list[float | None] = []
        for state in snapshots:
            if not all(bool(v.isfinite().all()) for v in state.values()):
                errors.append(None)
                continue
            model.load_state_dict(state)
            errors.append(error_rate(model, view.forget, view, runtime))
        away = [(abs(error - wanted), -e) for e, error in enumerate(errors) if error is not None]
        best = -min(away)[1] if away else None
        model.load_state_dict(final if best is None else snapshots[best])
        outcome.details |= {
            "rewound_to_epoch": None if best is None else best + 1,
            "validation_error": wanted,
            "forget_errors": errors,
        }


@torch.no_grad()
def error_rate(
    model: nn.Module, source: Source, view: View, runtime: Runtime, classes: Tensor | None = None
) -> float:
    """Share of wrong predictions on a source, of some classes only if given; 1 if there are none.

    Every process counts its share and gets the error over all of them.
    """
    counts = torch.zeros(2, dtype=torch.long, device=runtime.device)
    model.eval()
    for batch in source.batches(256):
        assert batch.y is not None
        keep = (
            torch.ones_like(batch.y, dtype=torch.bool)
            if classes is None
            else torch.isin(batch.y.cpu(), classes).to(batch.y.device)
        )
        if len(batch):
            counts[0] += (view.logits(model, batch).argmax(1) != batch.y)[keep].sum()
            counts[1] += keep.sum()
    wrong, total = runtime.sum(counts).tolist()
    return wrong / total if total else 1.0

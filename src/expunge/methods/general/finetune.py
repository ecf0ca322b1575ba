r"""FineTune: go on training on the retain data and hope that the rest fades.

\(\min_\theta \; \mathrm{mean}_{D_r}\, L(\theta)\), from \(\theta_0\).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import SettingError
from expunge.core.needs import Card, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Loss, Pass
from expunge.train.masks import resolve_mask
from expunge.train.method import Training
from expunge.train.reset import refuse_lost_statistics, renew


@dataclass(frozen=True, kw_only=True)
class FineTune(Training):
    """Train on the retain data only; `train="last(K)"` is CF-k, with `reset` EU-k."""

    name: ClassVar[str] = "finetune"
    card: ClassVar[Card] = Card(
        title="Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        authors="Golatkar, Achille, Soatto",
        year=2020,
        link="https://arxiv.org/abs/1911.04933",
        idea="Training on what is kept lets the rest fade, slowly and in part.",
    )

    epochs: int = setting(10, "passes over the retain data", low=1, source="Unlearn-Sparse README")
    lr: float = setting(0.01, "learning rate", above=0, source="Unlearn-Sparse README")
    weight_decay: float = setting(5e-4, "L2 coefficient", low=0, source="Unlearn-Sparse code")

    reset: bool = setting(False, "first draw anew what may move; with train=last(K) this is EU-k")

    def __post_init__(self) -> None:
        """Check the settings; raises `SettingError` also where lone weights would be drawn anew."""
        super().__post_init__()
        if self.reset and self.train.startswith("saliency"):
            raise SettingError(
                f"{type(self).__name__}: reset draws whole layers anew; use train=last(K), role(NAME) "
                "or full"
            )

    @property
    def needs(self) -> Needs:
        """Retain data with labels, the forget side for a saliency mask, an architecture to reset."""
        salient = self.reads_forget_labels()
        labels: Labels = "all" if salient else "retain"
        return Needs(retain=True, forget=salient, labels=labels, fresh=self.reset)

    def objective(self, view: View, epoch: int) -> Loss:
        """Loss of a retain batch in an epoch; variants add to it."""

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        return loss

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train on the retain data."""

        def passes(epoch: int) -> Pass:
            loss = self.objective(view, epoch)
            for batch in view.retain.batches(self.batch_size, runtime.generator("retain", epoch)):
                yield loss, batch

        model = view.model()
        renewed = {"renewed": self._reset(model, view, runtime)} if self.reset else {}
        outcome, _ = self.train_model(model, passes, view, runtime)
        outcome.details |= renewed
        return outcome

    def _reset(self, model: nn.Module, view: View, runtime: Runtime) -> int:
        """Draw what may move anew and return the number of weights."""
        mask, names = resolve_mask(self.train, model, view, runtime), [list(model.state_dict())]
        refuse_lost_statistics(model, names, mask, self.norm, "use norm=train")
        return renew(model, view.fresh("reset"), names, mask)

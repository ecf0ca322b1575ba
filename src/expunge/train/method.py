"""What training methods share: the settings of the loop, and the way from passes to an outcome."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from expunge.core.method import Method
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train import scale_shift
from expunge.train.adapters import adapter_of, attach, has_adapters, is_lora
from expunge.train.fit import Fit, Pass, fit
from expunge.train.masks import parse, resolve_mask
from expunge.train.norm import NormMode, recalibrate
from expunge.train.scale_shift import is_scale_shift
from expunge.train.smooth import parse_smooth
from expunge.train.steps import StepName


@dataclass(frozen=True, kw_only=True)
class Training(Method):
    """Base of methods that train: a method redeclares the defaults its paper gives."""

    search: ClassVar[Mapping[str, Any]] = {"epochs": None, "lr": None}

    epochs: int = setting(5, "passes over the data, E", low=1)
    lr: float = setting(0.01, "learning rate, η", above=0)
    batch_size: int = setting(128, "samples a batch, over all processes", low=1)
    step: StepName = setting("sgd", "optimiser: sgd, adam or adamw")
    smooth: str = setting(
        "none", "step over weights near by: none, sam(RHO), rs(SIGMA, K), gp(LAMBDA), cr(LAMBDA), swa(START)"
    )  # fmt: skip
    momentum: float = setting(0.9, "momentum of sgd", low=0, high=1)
    weight_decay: float = setting(0.0, "L2 coefficient", low=0)
    schedule: Literal["constant", "cosine"] = setting(
        "constant", "learning rate over the epochs: constant, or falling as half a cosine"
    )
    train: str = setting(
        "full",
        "weights that move: full, last(K), role(NAME), saliency(Q), sparse(Q), lora(R), scale_shift()",
    )
    norm: NormMode = setting("train", "running statistics: train, frozen or recalibrate")

    def __post_init__(self) -> None:
        """Check the settings, `train` and `smooth` included."""
        super().__post_init__()
        parse(self.train)
        parse_smooth(self.smooth)

    def train_model(
        self,
        model: nn.Module,
        passes: Callable[[int], Pass],
        view: View,
        runtime: Runtime,
        **options: Any,
    ) -> tuple[Outcome, Fit]:
        """Run `fit` with these settings and wrap what comes out.

        Args:
            model: a copy of the original from `view.model()`.
            passes: see `fit`.
            view: for masks and recalibration.
            runtime: see `fit`.
            **options: further arguments of `fit`, such as `schedule` or `stop`.

        Returns:
            The outcome and the fit it came from.
        """
        if is_lora(self.train) and not has_adapters(model):
            attach(self.train, model, view, runtime.seed_for("lora"))
        scaled = is_scale_shift(self.train)
        if scaled:
            scale_shift.attach(self.train, model, view)
        mask = resolve_mask(self.train, model, view, runtime)
        if self.schedule == "cosine":
            own = options.get("schedule", lambda epoch: 1.0)
            options["schedule"] = lambda epoch: own(epoch) * cosine(epoch, self.epochs)
        result = fit(
            model,
            passes,
            runtime=runtime,
            epochs=self.epochs,
            lr=self.lr,
            step=self.step,
            smooth=self.smooth,
            momentum=self.momentum,
            weight_decay=0.0 if scaled else self.weight_decay,  # a scale's rest is 1, not 0
            mask=mask,
            norm=self.norm,
            stage=self.name,
            **options,
        )
        if scaled:
            scale_shift.fold(model)
        if self.norm == "recalibrate":
            recalibrate(model, view.retain)
        details: dict[str, Any] = {"steps": result.steps}
        if result.stopped:
            details["stopped"] = result.stopped
        if mask is not None:
            moving = sum(int(m.sum()) for m in mask.values())
            details["trained_share"] = moving / sum(m.numel() for m in mask.values())
        change = adapter_of(model) if is_lora(self.train) else None
        return Outcome(model, change, curve=result.curve, details=details), result

    def reads_forget_labels(self) -> bool:
        """Whether the `train` choice alone reads forget data with labels (saliency does)."""
        return self.train.startswith("saliency")


def cosine(epoch: int, epochs: int) -> float:
    """Half a cosine from 1 at epoch 0 towards 0 after the last of `epochs`."""
    return (1 + math.cos(math.pi * epoch / epochs)) / 2

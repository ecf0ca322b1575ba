r"""BoundaryShrink: give each forget sample to the class on the other side of the nearest boundary.

With the original \(f_0\) frozen in eval mode and one step of an attack in pixel space,

\[
x' = \mathrm{round}\,\mathrm{clip}_{[0,1]}\big(x + \varepsilon\,\mathrm{sign}\,\nabla_x \mathrm{CE}(f_0(x), y)\big),
\qquad y^* = \arg\max f_0(x'),
\]

minimise \(\mathrm{mean}_{D_f}\,\mathrm{CE}(f(x), y^*)\). No retain data is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import DataError, SettingError
from expunge.core.needs import Card, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.inputs import continuous
from expunge.train.method import Training
from expunge.train.relabel import labels_by, relabelled


@dataclass(frozen=True, kw_only=True)
class BoundaryShrink(Training):
    """Relabel forget samples by an attack on the original, and train on them alone.

    The step ε is one of pixels in 0 … 1. `mean` and `std` say how the inputs were normalised; the
    default is that they were not. Inputs that are no pixels then raise an error instead of being
    cut to 0 … 1: `space="inputs"` takes ε in their own unit, without bounds or rounding.
    """

    name: ClassVar[str] = "boundary-shrink"
    search: ClassVar = {"epochs": None, "lr": None, "epsilon": None}
    card: ClassVar[Card] = Card(
        title="Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision "
        "Boundary",
        authors="Chen, Gao, Liu, Peng, Wang",
        year=2023,
        link="https://arxiv.org/abs/2303.11570",
        idea="Shift the boundary so that the forget samples lie in the classes next to them.",
    )

    epochs: int = setting(10, "passes over the forget data", low=1, source="official code")
    lr: float = setting(1e-5, "learning rate", above=0, source="official code")
    momentum: float = setting(0.9, "momentum of sgd", low=0, high=1, source="official code")
    epsilon: float = setting(0.1, "step ε of the attack", above=0, source="official code")
    space: Literal["pixels", "inputs"] = setting(
        "pixels", "pixels: ε in 0 … 1 with bounds and rounding; inputs: ε in the inputs' own unit"
    )
    mean: tuple[float, ...] = setting((0.0,), "what was subtracted from pixels, by channel or once")
    std: tuple[float, ...] = setting((1.0,), "what pixels were divided by then", above=0)
    levels: int = setting(255, "steps between pixel 0 and 1; 0: no rounding", low=0, source="official code")  # fmt: skip

    def __post_init__(self) -> None:
        """Check the settings together.

        Raises:
            SettingError: a mean without a standard deviation, or the other way round.
        """
        super().__post_init__()
        if not self.mean or not self.std or 1 != len(self.mean) != len(self.std) != 1:
            raise SettingError(
                "BoundaryShrink: mean and std take one number, or one a channel each"
            )

    @property
    def needs(self) -> Needs:
        """Forget data with labels, and the original to attack."""
        return Needs(
            forget=True, labels="forget", original=True, retain=self.norm == "recalibrate",
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Find the labels, then train on them."""
        ids, labels = self.nearest(view, runtime)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            for batch in view.forget.batches(self.batch_size, runtime.generator("forget", epoch)):
                yield loss, relabelled(batch, ids, labels)

        outcome, _ = self.train_model(view.model(), passes, view, runtime)
        outcome.details["relabelled_share"] = float((labels != view.forget.labels()).float().mean())
        return outcome

    def nearest(self, view: View, runtime: Runtime) -> tuple[Tensor, Tensor]:
        """Sorted forget ids [n] and the classes [n] that the attack leads to.

        The label is the true one wherever the attack failed.
        """
        original = view.original()

        def choose(batch: Batch) -> Tensor:
            attacked = self.attacked(view, original, batch)
            runtime.cost.gradients += len(batch)
            with torch.no_grad():
                return view.logits(original, attacked).argmax(1)

        return view.forget.ids, labels_by(view.forget, choose, runtime, size=self.batch_size)

    def attacked(self, view: View, original: nn.Module, batch: Batch) -> Batch:
        """The batch after one signed step up the loss of `original`.

        Raises:
            DataError: with `space="pixels"`, the inputs are not pixels after de-normalising.
        """
        x, back = continuous(batch, "BoundaryShrink")
        x = x.detach().requires_grad_()
        loss = view.each_loss(original, back(x)).sum()
        sign = torch.autograd.grad(loss, x)[0].sign()
        x = x.detach()
        if self.space == "inputs":
            return back(x + self.epsilon * sign)
        mean, std = (self._by_channel(v, x) for v in (self.mean, self.std))
        pixels = x.to(std.dtype) * std + mean
        low, high = pixels.aminmax() if len(pixels) else (torch.zeros(()), torch.ones(()))
        if low < -_SLACK or high > 1 + _SLACK:
            raise DataError(
                f"BoundaryShrink: the inputs are not pixels, they reach from {float(low):.3g} to "
                f"{float(high):.3g}; pass mean= and std= they were normalised with, or space=inputs"
            )
        pixels = (pixels + self.epsilon * sign).clamp(0, 1)
        if self.levels:
            pixels = (pixels * self.levels).round() / self.levels
        return back(((pixels - mean) / std).to(x.dtype))

    def _by_channel(self, values: tuple[float, ...], x: Tensor) -> Tensor:
        """The values along dimension 1 of inputs [B, C, …], in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        vector = torch.tensor(values, dtype=wide, device=x.device)
        if len(values) > 1 and (x.ndim < 2 or x.shape[1] != len(values)):
            raise DataError(
                f"BoundaryShrink: mean and std name {len(values)} channels, the inputs have shape "
                f"{tuple(x.shape)}"
            )
        return vector.reshape(1, -1, *[1] * (x.ndim - 2)) if len(values) > 1 else vector[0]


_SLACK = 0.02
"""What rounding of inputs, in bfloat16 at worst, may add to a pixel."""

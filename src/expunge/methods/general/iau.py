r"""IAU: forget by learning samples of the opposite gradient, in one pass and one step.

\(g = \nabla[\,r\,\bar L(D_r) - \bar L(D_f)\,]\) at \(\theta_0\), both means taken before any update. One step of
Adam with fresh state moves each weight by \(-\eta\, g_i / (|g_i| + \varepsilon)\); one of SGD by \(-\eta\, g_i\).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.errors import ExpungeError
from expunge.core.method import Method
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.curvature.fisher import mean_gradient

_TEST = "tests/methods/test_iau.py::test_iau_"
EPSILON = 1e-8
"""Adam's, which alone keeps coordinates without a gradient where they are."""


@dataclass(frozen=True, kw_only=True)
class IAU(Method):
    """Influence approximation unlearning: a pass over both sides, then a single step.

    Each request is a step of its own from where the last one ended: with `step="adam1"` a single
    forgotten sample moves the network as far as a tenth of the data, and errors add up
    (`details["drift"]`).
    """

    name: ClassVar[str] = "iau"
    search: ClassVar = {"lr": None}
    card: ClassVar[Card] = Card(
        title="Efficient Machine Unlearning via Influence Approximation",
        authors="Jiawei Liu, Chenwang Wu, Defu Lian, Enhong Chen",
        year=2025,
        link="https://arxiv.org/abs/2507.23257",
        idea="Adding a point of opposite gradient undoes a sample, without a Hessian.",
        fidelity="variant",
        deviations=(
            Deviation(
                "Both gradients are taken in eval mode, so that no running statistic sees the forget "
                "data; the paper's networks have none.",
                _TEST + "leaves_running_statistics_alone",
            ),
            Deviation(
                "Means are added up over batches with their true weights; the released code puts all "
                "retain data into one batch.",
                _TEST + "invariant_3_means_do_not_depend_on_batches",
            ),
            Deviation(
                "Gradient restriction belongs to the training of the original and is a setting of "
                "the recipe, not of this method.",
                _TEST + "invariant_5_restriction_lowers_the_gradient",
            ),
        ),
    )

    lr: float = setting(1e-3, "step size η", above=0, source="code")
    step: Literal["adam1", "sgd"] = setting(
        "adam1", "one step of Adam with fresh state, or of plain gradient descent", source="code"
    )
    eta_r: float | None = setting(
        None, "step size of the retain gradient; None: η, 0: ascent on the forget data only", low=0
    )
    batch_size: int = setting(128, "samples a batch; no influence on the result", low=1)

    @property
    def needs(self) -> Needs:
        """Both sides with labels."""
        return Needs(forget=True, retain=True, labels="all")

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Two mean gradients at the original weights, one step."""
        model = view.model()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        sides = [
            mean_gradient(model, view.each_loss, s, runtime, batch_size=self.batch_size).values
            for s in (view.forget, view.retain)
        ]
        g = combined(sides[0], sides[1], 1.0 if self.eta_r is None else self.eta_r / self.lr)
        if not all(bool(t.isfinite().all()) for t in g.values()):
            raise ExpungeError("IAU: the gradients are NaN or infinite")
        move(model, g, self.lr, self.step)
        drift = sum(
            float((p.detach() - before[n]).double().square().sum())
            for n, p in model.named_parameters()
        )
        size = sum(float(p.double().square().sum()) for p in before.values())
        details = {"drift": (drift / size) ** 0.5 if size else None, "norm": "frozen"}
        return Outcome(model, details=details)


def combined(
    forget: Mapping[str, Tensor], retain: Mapping[str, Tensor], ratio: float = 1.0
) -> dict[str, Tensor]:
    """Gradient to descend on: `ratio` times the retain one less the forget one; missing ones are 0."""
    names = [*forget, *(n for n in retain if n not in forget)]
    zero = torch.zeros(())
    return {n: ratio * retain.get(n, zero) - forget.get(n, zero) for n in names}


@torch.no_grad()
def move(
    model: nn.Module, g: Mapping[str, Tensor], lr: float, step: Literal["adam1", "sgd"]
) -> None:
    """Take the step in place, rounding once, to the parameters' own type."""
    for name, p in model.named_parameters():
        if name in g:
            size = g[name] / (g[name].abs() + EPSILON) if step == "adam1" else g[name]
            p.copy_((p.to(size.dtype) - lr * size).to(p.dtype))

r"""SalUn: random labels, but only the weights salient for the forget data may move.

Saliency once at \(\theta_0\): \(G = |\sum_b \nabla_\theta \mathrm{mean}_b L|\) over batches of
\(D_f\); the share \(q\) of largest \(G\) over all parameters together is trained, the rest stays
identical to the bit — after weight decay and momentum too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from expunge.core.needs import Card, Deviation
from expunge.core.settings import setting
from expunge.methods.general.random_label import RandomLabel


@dataclass(frozen=True, kw_only=True)
class SalUn(RandomLabel):
    """`RandomLabel` with `train="saliency(0.5)"`; any other method takes the same mask."""

    name: ClassVar[str] = "salun"
    card: ClassVar[Card] = Card(
        title="SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency",
        authors="Fan, Liu, Zhang, Wong, Wei, Liu",
        year=2024,
        link="https://arxiv.org/abs/2310.12508",
        idea="Overwrite with random labels, in the weights that matter to the forget data.",
        deviations=(
            Deviation(
                "Frozen weights are put back after every optimiser step; the first official code "
                "let weight decay and momentum move them.",
                "tests/methods/test_baselines.py::test_baselines_vision_invariant_3_salun",
            ),
        ),
    )

    train: str = setting(
        "saliency(0.5)",
        "saliency(q): share q of weights that move",
        source="Unlearn-Saliency README",
    )

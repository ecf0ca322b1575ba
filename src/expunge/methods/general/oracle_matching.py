r"""Oracle matching: fine-tune the model to say what models retrained without the forget data say.

\[ \min_\theta\ \mathrm{mean}_x \big\|f_\theta(x) - \tfrac1M\textstyle\sum_m f_m(x)\big\|^2 / C \]

over the forget data and a few times as many retain samples; \(f_m\) are trained by the recipe without
\(D_f\). It costs M retrainings, so it is no way to save them: it shows how close matching can get.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.matching import Matching


@dataclass(frozen=True, kw_only=True)
class OracleMatching(Matching):
    """Learn the outputs of retrained models; an upper bound for matching predicted ones.

    A result composes with the next request: its model is the start of the next matching, whose
    oracles have to be retrained without both forget sets.
    """

    name: ClassVar[str] = "oracle-matching"
    search: ClassVar = {"epochs": None, "lr": None, "forget_multiplier": None}
    card: ClassVar[Card] = Card(
        title="Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
        authors="Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel",
        year=2024,
        link="https://arxiv.org/abs/2410.23232",
        idea="Fine-tune to the outputs of models retrained without the data.",
        deviations=(
            Deviation(
                "Oracles are drawn with seeds of the run, not taken from a fixed pool.",
                "tests/methods/test_dmm.py::test_oracles_follow_the_seed_of_the_run",
            ),
        ),
    )

    oracles: int = setting(10, "models retrained without the forget data, M", low=1, source="code")

    @property
    def needs(self) -> Needs:
        """Both sides without labels, and the recipe, which reads labels by itself."""
        return self.matching_needs(recipe=True)

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Retrain the oracles, then match their mean."""
        oracles = [
            view.retrain(runtime.seed_for("oracle", m)).to(runtime.device).eval()
            for m in range(self.oracles)
        ]

        def targets(batch: Batch) -> Tensor:
            return torch.stack([view.logits(oracle, batch) for oracle in oracles])

        return self.match(targets, view, runtime)

r"""Datamodel matching: predict what a retrained model would say, and fine-tune the model to say it.

With effects \(\beta[i, x, c]\) of training samples on logits, prepared once for all requests:

\[ \hat f(x) = f_0(x) - \kappa \sum_{i \in D_f} \beta[i, x, :], \qquad
   \min_\theta\ \mathrm{mean}_x \|f_\theta(x) - \hat f(x)\|^2 / C \]

over the forget data and a few times as many retain samples. \(f_0\) is the original, frozen, in eval mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from expunge.core.data import Batch
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.fleet.datamodels import Attributing, rows_of
from expunge.train.matching import Matching

_TEST = "tests/methods/test_dmm.py::test_"


@dataclass(frozen=True, kw_only=True)
class DatamodelMatching(Attributing, Matching):
    """Match the outputs that attribution predicts for a model retrained without the forget data.

    The effects belong to one recipe and data set. A result composes with the next request as long
    as they do: match the union of both forget sets from the original.
    """

    name: ClassVar[str] = "datamodel-matching"
    search: ClassVar = {"epochs": None, "lr": None, "forget_multiplier": None}
    card: ClassVar[Card] = Card(
        title="Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
        authors="Georgiev, Rinberg, Park, Garg, Ilyas, Madry, Neel",
        year=2024,
        link="https://arxiv.org/abs/2410.23232",
        idea="Predict by data attribution what retraining would give, and fine-tune to that.",
        fidelity="variant",
        deviations=(
            Deviation(
                "The paper's way of estimating effects could not be read; here it is ridge regression "
                "on random subsets of one size, λ chosen on held-out subsets.",
                _TEST + "lambda_is_the_best_on_held_out_trainings",
            ),
            Deviation(
                "Projected gradients give an effect on every logit, on the scale of a removal, "
                "where TRAK scores the margin of the label up to a factor.",
                _TEST + "projected_gradients_are_the_newton_step_of_a_linear_model",
            ),
        ),
    )

    @property
    def needs(self) -> Needs:
        """Both sides without labels; the recipe, or labels, for the estimate of effects."""
        return self.matching_needs(self.attribution_labels, recipe=self.attribution_trains)

    def run(
        self, view: View, runtime: Runtime, prepared: Mapping[str, Tensor] | None = None
    ) -> Outcome:
        """Predict and match.

        Args:
            view: both sides without labels.
            runtime: seeds, device, progress.
            prepared: the effects from `prepare`.

        Returns:
            The outcome; `details` say how well the effects predicted held-out trainings.
        """
        assert prepared is not None  # `unlearn` sees to it
        effects, original = prepared, view.original()
        change = self.change(effects, view.forget.ids)

        def targets(batch: Batch) -> Tensor:
            shift = change[rows_of(effects, batch.ids)].to(runtime.device)
            return (view.logits(original, batch).float() - shift)[None]

        outcome = self.match(targets, view, runtime)
        outcome.details |= self.facts(effects)
        return outcome

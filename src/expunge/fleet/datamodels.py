r"""Data attribution as a service: how much each training sample does to each logit of each input.

\(\beta[i, x, c]\) is the change of logit c of input x when sample i joins the training data. It is
estimated once a problem and recipe, kept in half precision, and summed over \(D_f\) for a request:

\[ \Delta(x) = \sum_{i \in D_f} \beta[i, x, :], \qquad \hat f(x) = f_0(x) - \kappa\,\Delta(x). \]

\(\hat f\) is what a model retrained without \(D_f\) is predicted to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError
from expunge.core.method import Method
from expunge.core.needs import Labels
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.curvature.projected import features, projected_effects
from expunge.curvature.solve import SOLVERS
from expunge.fleet.subsets import known_inputs, train_many, train_on_subsets
from expunge.train.losses import margin_each


@dataclass(frozen=True, kw_only=True)
class Attributing(Method):
    """Base of methods that rest on effects of samples: the settings, and the preparation."""

    prepares: ClassVar[Literal["never", "optional", "always"]] = "always"

    attribution: Literal["ridge", "lasso", "difference", "projected"] = setting(
        "ridge",
        "regression on subsets (ridge, lasso), difference of means, or projected gradients",
        source="datamodels",
    )
    models: int = setting(
        1000, "trainings on random subsets, K", low=2, source="DMM page: 1,000 to 20,000"
    )
    share: float = setting(
        0.5, "share of the training data in each subset", above=0, high=0.99, source="DMM page"
    )
    lam: float | None = setting(
        None, "penalty λ; none: best on held-out subsets, 1e-8 with projected", low=0
    )
    dimension: int = setting(8192, "dimension p of projected gradients", low=1, source="code")
    checkpoints: int = setting(
        1, "models averaged over with projected gradients: the original and further ones", low=1
    )
    multiplier: float = setting(
        1.0, "κ, how much of the predicted change is applied", source="code"
    )

    @property
    def attribution_labels(self) -> Labels:
        """Labels that the estimate reads; regression leaves them to the recipe."""
        return "all" if self.attribution == "projected" else "none"

    @property
    def attribution_trains(self) -> bool:
        """Whether the estimate needs the recipe."""
        return self.attribution != "projected" or self.checkpoints > 1

    def preparation_settings(self) -> dict[str, Any]:
        """What the effects depend on, not what is done with them."""
        gradients = self.attribution == "projected"
        kept = {"attribution", "lam"} | (
            {"dimension", "checkpoints"} if gradients else {"models", "share"}
        )
        asked = {"validation": True} if self.needs.validation else {}
        return {k: v for k, v in self.in_force().items() if k in kept} | asked

    def prepare(self, problem: Problem, runtime: Runtime) -> dict[str, Tensor]:
        """Estimate all effects, before any request.

        Args:
            problem: its training data and, if the method declares it, validation data are the known
                inputs.
            runtime: seeds, device and progress.

        Returns:
            `effects` float16 [n, N, C], inputs in the order of training, then validation data;
            `train_ids` [n]; `explained`, the share of variance predicted on held-out subsets, and
            `lam`, where the estimate knows them; `unfinished`, the outputs whose descent ended early.

        Raises:
            ExpungeError: an effect is not finite, or too large for half precision.
        """
        facts: dict[str, Any] = {}
        if self.attribution == "projected":
            effects = self._projected(problem, runtime)
        else:
            subsets = train_on_subsets(
                problem, self.models, self.share, runtime, validation=self.needs.validation
            )
            found = SOLVERS[self.attribution](self.lam)(subsets.masks, subsets.outputs.flatten(1))
            effects, facts = found.values.unflatten(1, subsets.outputs.shape[1:]), found.details
        half = effects.half()
        if not bool(torch.isfinite(half).all()):
            raise ExpungeError("the estimated effects do not fit into half precision; raise lam")
        numbers = {k: torch.tensor(float(v)) for k, v in facts.items()}
        return {"effects": half, "train_ids": problem.train.ids.clone(), **numbers}

    def change(self, prepared: Mapping[str, Tensor], forget: Tensor) -> Tensor:
        r"""\(\kappa\Delta\) float32 [N, C] of forgetting the samples `forget`, for every known input."""
        total = torch.zeros(prepared["effects"].shape[1:])
        for rows in rows_of(prepared, forget).split(64):
            total += prepared["effects"][rows].sum(0, dtype=torch.float32)
        return self.multiplier * total

    def facts(self, prepared: Mapping[str, Tensor]) -> dict[str, float]:
        """What a record says about the estimate."""
        return {k: float(prepared[k]) for k in ("lam", "explained", "unfinished") if k in prepared}

    def _projected(self, problem: Problem, runtime: Runtime) -> Tensor:
        """Average over the original and further models of the recipe."""
        count = self.checkpoints - 1
        seeds = [runtime.seed_for("checkpoint", k) for k in range(count)]
        total = self._of_model(problem, problem.model, 0, runtime)
        more = train_many(problem, [problem.train.ids] * count, seeds, runtime, "checkpoints")
        for number, model in enumerate(more if count else (), start=1):
            total += self._of_model(problem, model, number, runtime)
        return total / self.checkpoints

    def _of_model(
        self, problem: Problem, model: nn.Module, number: int, runtime: Runtime
    ) -> Tensor:
        read = problem.capability("logits")
        model = model.to(runtime.device).eval()
        seed = runtime.seed_for("projection", number)

        def margins(model: nn.Module, batch: Batch) -> Tensor:
            assert batch.y is not None
            return margin_each(read(model, batch).float(), batch.y)

        def logit(c: int, data: Any) -> Tensor:
            return features(
                model, lambda m, b: read(m, b)[:, c].float(), data.batches(256),
                dim=self.dimension, seed=seed, runtime=runtime,
            )  # fmt: skip

        def queries(classes: int) -> Iterator[Tensor]:
            for c in range(classes):
                known = known_inputs(problem, self.needs.validation)
                yield torch.cat([logit(c, data) for data in known])

        train = problem.train
        phi = features(
            model, margins, train.batches(256), dim=self.dimension, seed=seed, runtime=runtime
        )
        with torch.no_grad():
            batches = [b.to(runtime.device) for b in train.batches(256)]
            odds = torch.cat([margins(model, b).cpu() for b in batches])
            classes = read(model, batches[0]).shape[1]
        model.cpu()
        lam = 1e-8 if self.lam is None else self.lam
        return projected_effects(queries(classes), phi, (-odds).sigmoid(), lam)


def rows_of(prepared: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Rows (and columns) of training samples in what was prepared, in the order of `ids`."""
    order = prepared["train_ids"].argsort()
    return order[torch.searchsorted(prepared["train_ids"][order], ids.cpu())]

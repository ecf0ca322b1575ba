r"""ModHiFiU: delete the inputs of a layer that carry a class, found by forward passes alone.

On samples of the class, an input i of a layer has the fidelity \(s_{ci}\) for output c (see
`curvature/fidelity.py`). Inputs are ranked by \(\sigma_i = \sum_c E\|Y_c\|^2 s_{ci} / \sum_c E\|Y_c\|^2\),
and the weights of the k first become 0. No gradient, no loss, no sample of the data to keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.errors import ExpungeError, ModelError, SettingError
from expunge.core.method import Method
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source, View
from expunge.curvature.fidelity import Score, by_output, contributions, split_weight
from expunge.train.masks import layers_of, parse, refuse_shared

_TEST = "tests/methods/test_modhifi.py::test_"


@dataclass(frozen=True, kw_only=True)
class ModHiFiU(Method):
    """Zero what is faithful to the class; earlier layers still know it, so it suppresses."""

    name: ClassVar[str] = "modhifi-u"
    search: ClassVar = {"contrast": [False, True], "score": ["energy", "mean", "max"]}
    card: ClassVar[Card] = Card(
        title="ModHiFi: Identifying High Fidelity predictive components for Model Modification",
        authors="Dhruva Kashyap, Chaitanya Murti, Pranav K Nayak, Tanay Narshana, Chiranjib "
        "Bhattacharyya",
        year=2025,
        link="https://arxiv.org/abs/2511.19566",
        idea="Components that reproduce a layer's output on a class are the class; delete them.",
        intent="suppression",
        fidelity="variant",
        deviations=(
            Deviation(
                "How scores of one input for many outputs become one number is not known from the "
                "paper; the mean weighted by each output's energy is used, mean and max are choices.",
                _TEST + "modhifi_channel_scores_by_hand",
            ),
            Deviation(
                "Which layers and how many inputs are not known either; the last linear layer, and a "
                "budget that grows until the class is no longer recognised on its own samples.",
                _TEST + "modhifi_budget_grows_until_the_class_is_gone",
            ),
        ),
    )

    layers: str = setting("last(1)", "layers that lose inputs: last(K) or role(NAME)")
    budget: float | Literal["auto"] = setting(
        "auto", "share of each layer's inputs to delete; auto finds it", low=0.0, high=1.0
    )
    target: float = setting(
        0.01, "accuracy on the forget samples at which auto stops", low=0, high=1
    )
    most: float = setting(0.5, "largest share that auto tries", above=0, high=1)
    score: Score = setting("energy", "how scores over outputs become one: energy, mean or max")
    contrast: bool = setting(False, "subtract the score on retain samples; not in the paper")
    samples: int = setting(512, "samples a side that are run", low=1, source="derived: 256 to 512")

    def __post_init__(self) -> None:
        """Check the settings, `layers` included."""
        super().__post_init__()
        if parse(self.layers)[0] not in ("last", "role"):
            raise SettingError("ModHiFiU: layers takes last(K) or role(NAME)")

    @property
    def needs(self) -> Needs:
        """Forget data; its labels only to find the budget, retain data only for the contrast."""
        return Needs(
            forget=True,
            retain=self.contrast,
            labels="forget" if self.budget == "auto" else "none",
            capabilities=frozenset({"logits"}),
        )

    def check(self, problem: Problem, request: Request) -> None:
        """Also complain about layers that cannot be scored, or cannot be edited alone."""
        super().check(problem, request)
        layers = layers_of(self.layers, problem.model, problem)
        modules = dict(problem.model.named_modules())
        for layer in layers:
            if layer not in modules:
                raise ModelError(f"the model has no layer {layer!r}")
            split_weight(layer, modules[layer])
        refuse_shared(problem.model, layers)

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Rank the inputs of each layer, then delete the first ones."""
        model = view.model().eval()  # copied outside of inference mode: it can be trained later
        with torch.inference_mode():
            return Outcome(model, details=self._edit(model, view, runtime) | {"norm": "frozen"})

    def _edit(self, model: nn.Module, view: View, runtime: Runtime) -> dict[str, Any]:
        layers = layers_of(self.layers, model, view)
        ranks = {name: self._ranked(model, name, view, runtime) for name in layers}
        before = {name: _weight(model, name).clone() for name in layers}
        details: dict[str, Any] = {"layers": layers, "tried": []}
        for budget in self._budgets():
            deleted = {name: order[: round(budget * len(order))] for name, order in ranks.items()}
            for name, places in deleted.items():
                weight = _weight(model, name)
                weight.copy_(before[name])
                weight[:, places] = 0
            if self.budget == "auto":
                accuracy = self._accuracy(model, view, runtime)
                details["tried"].append([round(budget, 4), accuracy])
                if accuracy <= self.target:
                    break
        else:
            if self.budget == "auto":
                details["stopped"] = (
                    f"with {budget:.0%} of the inputs deleted, the most that auto tries, {accuracy:.0%} of "
                    f"the forget samples are still recognised, more than the target of {self.target:g}"
                )
        return details | {"budget": budget, "deleted": {n: len(p) for n, p in deleted.items()}}

    def _budgets(self) -> list[float]:
        """Shares to try, in order."""
        if self.budget != "auto":
            return [float(self.budget)]
        steps = max(1, round(self.most / 0.05))
        return [self.most * (k + 1) / steps for k in range(steps)]

    def _ranked(self, model: nn.Module, layer: str, view: View, runtime: Runtime) -> Tensor:
        """Inputs of a layer, the most faithful to the forget samples first."""

        def scores(side: Source, name: str) -> Tensor:
            ids = _some(side, self.samples, runtime, name)
            batches = (side.fetch(part) for part in ids.split(256))
            found = contributions(model, layer, batches, lambda b: view.logits(model, b))
            return found.channels(self.score)

        score = scores(view.forget, "forget")
        if self.contrast:
            score = score - scores(view.retain, "retain")
        if not bool(score.isfinite().all()):
            raise ExpungeError("ModHiFiU: the forget samples give NaN or infinite activations")
        return score.argsort(descending=True, stable=True)

    def _accuracy(self, model: nn.Module, view: View, runtime: Runtime) -> float:
        right = total = 0
        for part in _some(view.forget, self.samples, runtime, "forget").split(256):
            batch = view.forget.fetch(part)
            assert batch.y is not None
            right += int((view.logits(model, batch).argmax(1) == batch.y).sum())
            total += len(batch)
        return right / total


def _some(side: Source, most: int, runtime: Runtime, name: str) -> Tensor:
    """Up to `most` ids of a side, drawn by the run's seed."""
    order = torch.randperm(len(side), generator=runtime.generator("modhifi", name))
    return side.ids[order[:most]]


def _weight(model: nn.Module, layer: str) -> Tensor:
    return by_output(model.get_submodule(layer))

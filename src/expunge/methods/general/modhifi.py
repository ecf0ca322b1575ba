r"""ModHiFi-U: set to zero what reproduces a layer's output best on the samples to forget.

From forward passes of \(D_f\) alone: \(S = E[x x^T]\) of what a layer reads, \(b_{ci} = W_{ci} (S w_c)_i\),
\(E\|Y_c\|^2 = \sum_i b_{ci}\), and the fidelity of each input for each output,
\(s_{ci} = b_{ci}^2 / (W_{ci}^2 S_{ii}\, E\|Y_c\|^2)\). Inputs with the largest
\(\sigma_i = \sum_c E\|Y_c\|^2 s_{ci} / \sum_c E\|Y_c\|^2\) lose their weights. No gradient, no loss, no label,
no retain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.errors import SettingError
from expunge.core.method import Method
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source, View
from expunge.curvature.fidelity import Contributions, Score, contributions

_TEST = "tests/methods/test_modhifi.py::test_modhifi_"


@dataclass(frozen=True, kw_only=True)
class ModHiFiU(Method):
    """Ablate the inputs of the last layer, or of others, that carry the samples to forget.

    For whole classes, or groups that are alike. Earlier layers keep what they know: the class comes
    back within a few steps of training. A result composes with the next request; zeros stay zeros.
    """

    name: ClassVar[str] = "modhifi-u"
    card: ClassVar[Card] = Card(
        title="ModHiFi: Identifying High Fidelity predictive components for Model Modification",
        authors="Dhruva Kashyap, Chaitanya Murti, Pranav K Nayak, Tanay Narshana, "
        "Chiranjib Bhattacharyya",
        year=2025,
        link="https://arxiv.org/abs/2511.19566",
        idea="What reproduces a class best is what to remove; forward passes find it.",
        intent="suppression",
        fidelity="variant",
        deviations=(
            Deviation(
                "How fidelities for single outputs become one score an input is not known; here they "
                "are weighted by the outputs' energy (score= has the plain mean and the maximum).",
                _TEST + "scores_of_an_input",
            ),
            Deviation(
                "Which layers are edited is not known; here the last one, or those named by layers=.",
                _TEST + "invariant_6_changes_only_the_chosen_layers",
            ),
            Deviation(
                "How much is removed is not known; here shares are tried from 5 to 20 % until the "
                "model's answers on the forget data are others than the original's, and no label is "
                "needed for that either.",
                _TEST + "stops_at_the_first_share_that_suffices",
            ),
        ),
    )

    budget: tuple[float, ...] = setting(
        (0.05, 0.1, 0.15, 0.2),
        "shares of a layer's inputs to remove, tried in turn until the answers are gone",
        above=0,
        high=1,
        source="derived",
    )
    until: float = setting(
        0.01, "share of the forget samples that may keep the original's answer", low=0, high=1, source="derived"
    )  # fmt: skip
    layers: tuple[str, ...] = setting(
        ("last layer",), "layers to edit, by role or by module name", source="derived"
    )
    score: Score = setting(
        "energy", "over outputs: energy-weighted mean, mean, or max", source="derived"
    )
    unit: Literal["inputs", "entries"] = setting(
        "inputs", "remove whole inputs (columns), or single weights by energy times fidelity"
    )
    samples: int = setting(512, "forget samples looked at, at most", low=1, source="derived")
    batch_size: int = setting(128, "samples a batch; no influence on the result", low=1)

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            SettingError: no share or no layer is named.
        """
        super().__post_init__()
        for name in ("budget", "layers"):
            if not getattr(self, name):
                raise SettingError(f"ModHiFi-U: {name} is empty; name at least one")

    @property
    def needs(self) -> Needs:
        """Inputs of the forget data, and nothing else."""
        return Needs(forget=True, capabilities=frozenset({"logits"}))

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Measure, then remove more and more until the answers are gone."""
        model = view.model().eval()
        layers = self._layers(view, model)
        source = view.forget.part(self.samples, runtime.generator("samples"))
        with torch.inference_mode():  # proof that no gradient is taken
            answers: list[Tensor] = []
            batches = (b for b in source.batches(self.batch_size) if len(b))
            found = contributions(
                model, layers, batches,
                lambda b: answers.append(view.logits(model, b).argmax(1)),
            )  # fmt: skip
            found = {n: _summed(c, runtime) for n, c in found.items()}
            orders = {n: self.order(c) for n, c in found.items()}
            kept, tried = 1.0, 0.0
            for tried in sorted(set(self.budget)):
                removed = {
                    n: self._remove(model.get_submodule(n), found[n], order, tried)
                    for n, order in orders.items()
                }
                kept = self._unchanged(view, model, source, answers, runtime)
                if kept < self.until:
                    break
        return Outcome(
            model,
            details={
                "budget": tried,
                "removed": removed,
                "answers_kept": kept,
                "reached": kept < self.until,
                "samples": len(source),
                "norm": "frozen",
            },
        )

    def order(self, found: Contributions) -> Tensor:
        """Positions, best first: of inputs [C_in], or of entries of the flat weight [C_out · C_in]."""
        if self.unit == "inputs":
            scores = found.channels(self.score)
        else:
            energy = found.products()[2].clamp_min(0)
            scores = (found.singleton() * energy[:, None]).flatten()
        return scores.argsort(descending=True, stable=True)

    def _remove(self, module: nn.Module, found: Contributions, order: Tensor, share: float) -> int:
        """Zero a share of the layer, at least one unit; returns the number of units."""
        count = max(1, round(share * len(order)))
        weight = found.weight.clone()
        if self.unit == "inputs":
            weight[:, order[:count]] = 0
        else:
            weight.flatten(0, 1)[order[:count]] = 0
        assert isinstance(module.weight, Tensor)
        module.weight.copy_(weight.reshape(module.weight.shape))
        return count

    def _unchanged(
        self, view: View, model: nn.Module, source: Source, answers: list[Tensor], runtime: Runtime
    ) -> float:
        """Share of the samples that still get the original's answer."""
        batches = (b for b in source.batches(self.batch_size) if len(b))
        same = torch.zeros((), device=runtime.device)
        for batch, before in zip(batches, answers, strict=True):
            same += (view.logits(model, batch).argmax(1) == before).sum()
        return float(runtime.sum(same)) / len(source)

    def _layers(self, view: View, model: nn.Module) -> list[str]:
        """Module names, roles resolved."""
        there = dict(model.named_modules())
        names = [n for one in self.layers for n in ([one] if one in there else view.role(one))]
        return list(dict.fromkeys(names))


def _summed(found: Contributions, runtime: Runtime) -> Contributions:
    """Over all processes, each of which read its share."""
    return Contributions(found.weight, runtime.sum(found.moment), found.samples)

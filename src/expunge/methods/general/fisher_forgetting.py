r"""FisherForgetting: add noise to each weight, the more the less the retain data depends on it.

\(\theta_i \leftarrow \theta_i + \sqrt{\sigma^2_i}\,\epsilon_i\), \(\sigma^2_i = \alpha \min(1/(F_i + 10^{-8}), c)\), with the diagonal
Fisher of the retain data under the model's own labels, \(F_i = E_x \sum_y p(y|x)\,(\partial \log p(y|x) / \partial \theta_i)^2\).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError, NeedsError
from expunge.core.method import Method
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.curvature.fisher import per_sample_squares

_TEST = "tests/methods/test_sparse_unlearn.py::test_sparse_unlearn_fisher_"

CEILING, LAST_CEILING = 1e3, 1e2
"""Largest 1/F, elsewhere and in the last layer."""
WIDER = 10.0
"""Factor on the variance of the last layer and of vectors (biases, norm layers)."""
CLASS_VARIANCE = 1e-4
"""Variance of the forgotten class' row in the last layer, whose mean becomes 0."""


@dataclass(frozen=True, kw_only=True)
class FisherForgetting(Method):
    """Fisher forgetting; reads no forget sample and no label.

    Only a request by label says which classes go whole, and then their rows of the last layer are
    drawn anew; the same samples asked for otherwise get the noise alone.

    Results compose by adding noise to noise: each request damages the rest a little more.
    """

    name: ClassVar[str] = "fisher-forgetting"
    search: ClassVar = {"alpha": None}
    card: ClassVar[Card] = Card(
        title="Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks",
        authors="Golatkar, Achille, Soatto",
        year=2020,
        link="https://arxiv.org/abs/1911.04933",
        idea="Noise where the rest does not care hides what the forget data left.",
        fidelity="variant",
        deviations=(
            Deviation(
                "Gradients and probabilities are those of single samples; the released code of the "
                "sparsity paper squares batch gradients weighted with batch-mean probabilities.",
                _TEST + "is_the_mean_over_samples_and_own_labels",
            ),
            Deviation(
                "The Fisher can be estimated on a random part of the retain data (samples=).",
                _TEST + "on_a_part_reads_that_part",
            ),
        ),
    )

    alpha: float = setting(
        1e-6, "variance of the noise, α", low=0, source="from memory, 1e-9 to 1e-6"
    )
    samples: int | None = setting(
        None, "retain samples the Fisher is estimated on; None: all of them", low=1
    )

    @property
    def needs(self) -> Needs:
        """Retain data without labels; logits to draw the model's own labels from."""
        return Needs(retain=True, per_sample_grad=True, capabilities=frozenset({"logits"}))

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Measure the Fisher, then add noise."""
        model = view.model()
        values = self.fisher(model, view, runtime)
        if not all(bool(f.isfinite().all()) for f in values.values()):
            raise ExpungeError("fisher-forgetting: the Fisher is NaN or infinite")
        try:
            layers = view.role("last layer")
        except NeedsError:  # a model without one gets the same noise everywhere
            layers = []
        classes = sorted(set(view.request.label or ()))
        norm = 0.0
        with torch.no_grad():
            for index, (name, p) in enumerate(model.named_parameters()):
                if name not in values:
                    continue
                last = any(name.startswith(layer + ".") for layer in layers)
                variance = noise_variance(values[name], self.alpha, last)
                mean = p.to(variance.dtype, copy=True)
                if last and classes:
                    mean[classes], variance[classes] = 0.0, CLASS_VARIANCE
                generator = runtime.generator(self.name, "noise", index)
                noise = torch.randn(p.shape, generator=generator, dtype=variance.dtype)
                noise = variance.sqrt() * noise.to(p.device)
                norm += float(noise.double().square().sum())
                p.copy_((mean + noise).to(p.dtype))
        return Outcome(
            model,
            details={
                "noise_norm": norm**0.5,
                "norm": "frozen",
                "redrawn_classes": classes if layers else [],
            },
        )

    def fisher(self, model: nn.Module, view: View, runtime: Runtime) -> dict[str, Tensor]:
        """Diagonal Fisher of the retain data by parameter name, one pass a class."""
        source = view.retain
        if self.samples is not None and self.samples < len(source):
            source = source.part(self.samples, runtime.generator(self.name, "samples"))
        total: dict[str, Tensor] = {}
        for label in range(view.classes):
            each = functools.partial(_weighted, view, label)
            found = per_sample_squares(model, each, source, runtime).values
            total = {n: total[n] + v if n in total else v for n, v in found.items()}
        return total


def noise_variance(fisher: Tensor, alpha: float, last: bool) -> Tensor:
    """Variance of the noise for one tensor of the Fisher's shape, equal along dimension 1."""
    ceiling = LAST_CEILING if last else CEILING
    variance = alpha * (1 / (fisher + 1e-8)).clamp(max=ceiling)
    if variance.ndim >= 2:
        variance = variance.mean(dim=1, keepdim=True).expand_as(variance).clone()
    return variance * WIDER if last or variance.ndim < 2 else variance


def _weighted(view: View, label: int, model: nn.Module, batch: Batch) -> Tensor:
    r"""\(-\sqrt{p(y|x)}\,\log p(y|x)\) [B] with the root held fixed: its squared gradient has weight p."""
    log_p = log_softmax(view.logits(model, batch), dim=1)[:, label]
    return -(log_p.detach() / 2).exp() * log_p

"""SSD: shrink the weights that matter more to the forget set than to the training set."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from expunge.core.errors import ExpungeError, SettingError
from expunge.core.method import Method
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import Source, View
from expunge.curvature import fisher as stats
from expunge.curvature.dampening import adaptive_alpha, adaptive_share, dampen
from expunge.curvature.generic import EachLoss

_TEST = "tests/methods/test_ssd.py::test_ssd_"


@dataclass(frozen=True)
class SSD(Method):
    r"""Selective synaptic dampening (Foster, Schoepf, Brintrup, AAAI 2024).

    With importances \(I^D\) of all training data and \(I^f\) of the forget set, weights with
    \(I^f_i > \alpha I^D_i\) become \(\beta_i \theta_i\), \(\beta_i = \min(\lambda I^D_i / I^f_i, 1)\);
    all others keep every bit. There is no training step. Buffers are left alone, so running
    statistics of batch norm keep the influence of the forget set (`details["norm"]`).

    `alpha="auto"` is the adaptive variant ASSD (arXiv 2402.10098): the threshold that selects the
    share \(\ln(1 + 100 |D_f| / |D|)\,\%\) of the weights. `importance="logits"` is the label-free
    variant LFSSD (arXiv 2402.19308): gradients of \(\|f(x)\|_2^2\), magnitudes instead of squares.

    A result composes with the next request: dampening multiplies, so zeros stay zeros, and the
    importances are those of the model at hand.
    """

    name: ClassVar[str] = "ssd"
    prepares: ClassVar[Literal["never", "optional", "always"]] = "optional"
    search: ClassVar = {"alpha": (1.0, 10.0, "log"), "lam": (0.1, 1.0)}
    card: ClassVar[Card] = Card(
        title="Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
        authors="Jack Foster, Stefan Schoepf, Alexandra Brintrup",
        year=2024,
        link="https://arxiv.org/abs/2308.07707",
        idea="Shrink the weights whose Fisher importance for the forget set is disproportionate.",
        deviations=(
            Deviation(
                "The default importance is the mean of squared per-sample gradients, as in the paper's "
                "equations; the official code squares gradients of batch means (fisher=batch).",
                _TEST + "invariant_3_sample_mode_is_the_mean_of_squares",
            ),
            Deviation(
                "The default threshold is ASSD's instead of alpha=10, which selects nothing with "
                "per-sample squares if a tenth of the data or more is forgotten.",
                _TEST + "invariant_2_alpha_at_the_bound_is_refused",
            ),
            Deviation(
                "ASSD's threshold is an exact order statistic of the ratios, not interpolated between "
                "two of them; the selection differs by one weight at most.",
                _TEST + "invariant_5_auto_selects_a_fixed_share",
            ),
            Deviation(
                "Batches are shuffled by default; the official full-class script feeds the retain "
                "classes in order and then the forget class. order=sorted goes by label, so that the "
                "importance of all data does not depend on the request.",
                _TEST + "batch_mode_depends_on_the_order",
            ),
            Deviation(
                "LFSSD is defined on batches; with fisher=sample magnitudes are averaged over samples.",
                _TEST + "label_free_importance_is_the_mean_magnitude",
            ),
        ),
    )

    alpha: float | Literal["auto"] = setting(
        "auto",
        "selection threshold α on the ratio of importances; auto fixes the selected share",
        low=0.0,
        source="ASSD; the SSD code has 10, in batch mode",
    )
    lam: float = setting(
        1.0, "dampening constant λ; 0 zeroes every selected weight", low=0.0, source="code"
    )
    fisher: Literal["sample", "batch"] = setting(
        "sample", "mean of squared sample gradients, or squared batch gradients", source="paper"
    )
    importance: Literal["loss", "logits"] = setting(
        "loss", "gradients of the loss, or without labels of the squared norm of the logits"
    )
    batch_size: int = setting(64, "samples a batch, for fisher=batch", low=1, source="code")
    order: Literal["shuffled", "sorted"] = setting(
        "shuffled", "order of the samples, for fisher=batch; sorted is by label, then id"
    )

    def __post_init__(self) -> None:
        """Check the settings; raises `SettingError` also if two contradict each other."""
        super().__post_init__()
        if self.order == "sorted" and self.importance == "logits":
            raise SettingError(
                "SSD: order=sorted reads labels, importance=logits does without them"
            )

    @property
    def needs(self) -> Needs:
        """Forget and retain data, with labels or, in the label-free variant, with logits."""
        free = self.importance == "logits"
        return Needs(
            forget=True,
            retain=True,
            labels="none" if free else "all",
            per_sample_grad=self.fisher == "sample",
            capabilities=frozenset({"logits"}) if free else frozenset(),
        )

    def preparation_settings(self) -> dict[str, Any]:
        """Importances depend on the estimator alone, not on what is done with them."""
        return {k: v for k, v in self.in_force().items() if k not in ("alpha", "lam")}

    def prepare(self, problem: Problem, runtime: Runtime) -> dict[str, Tensor]:
        r"""Importance \(I^D\) of all training data by parameter name; no request changes it.

        It equals what `run` computes itself with the same settings and runtime seed.
        """
        self.needs.check(self.name, problem)
        free = self.importance == "logits"
        each = _squared_norm(problem.capability("logits")) if free else problem.each_loss
        everything = Source(problem.train, problem.train.ids.sort().values, not free, runtime)
        model = copy.deepcopy(problem.model).to(runtime.device)
        return self._measure(model, each, everything, runtime, "everything").values

    def run(
        self, view: View, runtime: Runtime, prepared: Mapping[str, Tensor] | None = None
    ) -> Outcome:
        """Dampen a copy of the model.

        Args:
            view: the problem as far as it was declared.
            runtime: device, processes, seed.
            prepared: importance of all training data from `prepare`; computed here when None.

        Returns:
            The dampened model; `details` hold the threshold, what was selected, and the estimator.

        Raises:
            SettingError: per-sample importances cannot exceed the threshold.
            ExpungeError: importances are not finite.
        """
        bound = view.total_count / view.forget_count
        if self.fisher == "sample" and self.alpha != "auto" and self.alpha >= bound:
            raise SettingError(
                f"SSD: alpha={self.alpha:g} selects nothing, since per-sample importances of a part "
                f"are at most |D|/|D_f| = {bound:g} times those of the whole; use a smaller alpha, "
                "alpha=auto or fisher=batch"
            )
        free = self.importance == "logits"
        each = _squared_norm(view.capability("logits")) if free else view.each_loss
        model = view.model()
        part = self._measure(model, each, view.forget, runtime, "forget")
        if prepared is None:
            prepared = self._measure(model, each, view.everything, runtime, "everything").values
        whole = {n: prepared[n].to(v.device) for n, v in part.values.items()}
        if not all(bool(t.isfinite().all()) for t in (*part.values.values(), *whole.values())):
            raise ExpungeError("SSD: importances are NaN or infinite; the gradients overflow")
        share = adaptive_share(view.forget_count, view.total_count)
        auto = self.alpha == "auto"
        alpha = adaptive_alpha(part.values, whole, share) if auto else float(self.alpha)
        selected = dampen(model, part.values, whole, alpha, self.lam)
        batched = self.fisher == "batch"
        details: dict[str, Any] = {
            "alpha": alpha,
            "wanted_share": share if auto else None,
            "selected": sum(selected.values()),
            "selected_share": sum(selected.values()) / sum(p.numel() for p in model.parameters()),
            "selected_by_tensor": selected,
            "estimator": part.kind,
            "batch_size": self.batch_size if batched else None,
            "order": self.order if batched else None,
            "gradient_paths": part.paths,
            "norm": "frozen",
        }
        return Outcome(model, details=details)

    def _measure(
        self, model: nn.Module, each: EachLoss, source: Source, runtime: Runtime, side: str
    ) -> stats.Statistic:
        squares = self.importance == "loss"
        if self.fisher == "sample":
            per_sample = stats.per_sample_squares if squares else stats.per_sample_magnitudes
            return per_sample(model, each, source, runtime)
        if self.order == "sorted":
            order = source.ids[source.labels().sort(stable=True).indices]
        else:
            generator = runtime.generator(self.name, side)
            order = source.ids[torch.randperm(len(source), generator=generator)]
        per_batch = stats.squared_batch_means if squares else stats.batch_mean_magnitudes
        return per_batch(model, each, source, runtime, batch_size=self.batch_size, order=order)


def _squared_norm(logits: Any) -> EachLoss:
    """Squared L2 norm of the logits of each sample."""
    return lambda model, batch: logits(model, batch).square().flatten(1).sum(1)

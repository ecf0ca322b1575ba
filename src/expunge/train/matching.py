r"""Fine-tuning a model towards given outputs, without labels: the loop of oracle and datamodel matching.

\[ \min_\theta\ \mathrm{mean}_{x \in B}\ \ell\big(f_\theta(x), t(x)\big) + w\,\|\theta - \theta_0\|^2, \qquad
   B = m_f \cdot D_f\ \cup\ S_r,\ |S_r| = m_r |D_f|. \]

\(\ell\) is the mean squared error over logits, or the cross-entropy to soft targets; \(S_r\) is drawn
from the retain data once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError
from expunge.core.needs import Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.method import Training
from expunge.train.steps import StepName

Targets = Callable[[Batch], Tensor]
"""Logits wanted for a batch, of one or several models: [M, B, C]."""


@dataclass(frozen=True, kw_only=True)
class Matching(Training):
    """Base of methods that give a model other outputs to learn."""

    epochs: int = setting(5, "passes over the fine-tuning set", low=1, source="code")
    lr: float = setting(5e-4, "learning rate", above=0, source="code")
    batch_size: int = setting(512, "samples a batch", low=1, source="code")
    step: StepName = setting("adam", "optimiser: sgd, adam or adamw", source="code")
    decay: float = setting(
        0.95, "factor on the learning rate after each epoch", above=0, high=1, source="code"
    )
    loss: Literal["mse", "ce"] = setting(
        "mse", "squared error of logits, or cross-entropy to soft targets", source="code"
    )
    forget_multiplier: float = setting(
        1.0, "times the forget data are repeated; a fraction takes the first rows", above=0,
        source="code",
    )  # fmt: skip
    retain_multiplier: float = setting(
        3.0, "retain samples drawn, in sizes of the forget data", low=0, source="code"
    )
    anchor: float = setting(
        0.0, "weight of the squared distance to the original weights, wd_lambda", low=0,
        source="code",
    )  # fmt: skip
    shuffle: bool = setting(False, "shuffle the fine-tuning set in every epoch", source="code")

    def matching_needs(self, labels: Labels = "none", **more: Any) -> Needs:
        """Both sides and logits; no label, unless a mask or the caller reads some."""
        if labels == "none" and self.reads_forget_labels():
            labels = "forget"
        return Needs(
            forget=True, retain=True, labels=labels, original=True,
            capabilities=frozenset({"logits"}), **more,
        )  # fmt: skip

    def matching_ids(self, view: View, runtime: Runtime) -> Tensor:
        """Ids of the fine-tuning set in order: forget data, repeated, then the retain draw."""
        forget, retain = view.forget.ids, view.retain.ids
        rows = max(1, round(self.forget_multiplier * len(forget)))
        repeated = forget.repeat(-(-rows // len(forget)))[:rows]
        count = min(len(retain), round(self.retain_multiplier * len(forget)))
        order = torch.randperm(len(retain), generator=runtime.generator("retain draw"))
        return torch.cat([repeated, retain[order[:count]]])

    def match(self, targets: Targets, view: View, runtime: Runtime) -> Outcome:
        """Fine-tune a copy of the original towards `targets`.

        Args:
            targets: called for every batch, without gradients.
            view: gives the samples, without labels.
            runtime: seeds, device, progress.

        Returns:
            The outcome.

        Raises:
            ExpungeError: a target is NaN or infinite.
        """
        model = view.model()
        ids = self.matching_ids(view, runtime)
        start = dict(view.original().named_parameters()) if self.anchor else {}
        own = [(p, start[n]) for n, p in model.named_parameters() if n in start and p.requires_grad]

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            with torch.no_grad():
                wanted = targets(batch).float()
            if not bool(torch.isfinite(wanted).all()):
                raise ExpungeError(f"{self.name}: the outputs to be matched are NaN or infinite")
            value = batch.mean(self.distance(view.logits(model, batch).float(), wanted))
            if own:
                moved = torch.stack([(p - q).float().square().sum() for p, q in own])
                value = value + self.anchor * moved.sum()
            return value

        def passes(epoch: int) -> Pass:
            order = ids
            if self.shuffle:
                order = ids[torch.randperm(len(ids), generator=runtime.generator("order", epoch))]
            for chunk in order.split(self.batch_size):
                yield loss, view.everything.fetch(chunk)

        outcome, _ = self.train_model(
            model, passes, view, runtime, schedule=lambda epoch: self.decay**epoch
        )
        outcome.details |= {"matched": len(ids), "norm": self.norm}
        return outcome

    def distance(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Distance [B] of logits [B, C] to the mean of the logits, or soft labels, of [M, B, C]."""
        if self.loss == "mse":
            return (logits - wanted.mean(0)).square().mean(1)
        return -(wanted.softmax(2).mean(0) * log_softmax(logits, dim=1)).sum(1)

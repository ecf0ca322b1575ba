r"""Blindspot: imitate, on the forget data, a model that was briefly trained without it.

1. The blindspot model \(B\): a fresh network trained for a few epochs on \(D_r\), then frozen.
2. A copy \(f\) of the original is trained on mini-batches of both sides, \(k\) the forget share:

\[
L = (1-k)\, \ell(f(x_r), y_r) + k \Big[\ell(f(x_f), B(x_f)) + \beta \sum_l
AD\big(a_l^f(x_f), a_l^B(x_f)\big)\Big]
\]

with \(A(a) = \mathrm{vec}(\mathrm{mean}_{\dim 1}\, a^2) / \|\cdot\|_2\) the attention map of an
activation and \(AD(a, a')\) the mean of \((A(a) - A(a'))^2\) over its entries. Weighting by \(k\)
makes \(L\) the plain mean over the samples of the batch, each with the term of its side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError, NeedsError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Outcome
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass, Together, fit
from expunge.train.method import Training
from expunge.train.mixed import mixed
from expunge.train.steps import StepName


@dataclass(frozen=True, kw_only=True)
class Blindspot(Training):
    """Fit the true targets on what is kept and a model that never saw the rest on the rest."""

    name: ClassVar[str] = "blindspot"
    domain: ClassVar[str] = "regression"
    search: ClassVar = {"epochs": None, "lr": None, "beta": None}
    card: ClassVar[Card] = Card(
        title="Deep Regression Unlearning",
        authors="Tarun, Chundawat, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2210.08196",
        idea="A briefly trained model that never saw the forget data shows how to answer on it.",
        deviations=(
            Deviation(
                "The weight of the two sides is their share of the batch, as in the official code; "
                "the paper writes a schedule.",
                "tests/methods/test_blindspot.py::test_deep_regression_invariant_2_only_one_side",
            ),
            Deviation(
                "The blindspot model keeps its last weights; the official code for text reloads "
                "those with the best validation error.",
                "tests/methods/test_blindspot.py::test_deep_regression_invariant_3_blindspot_model_is_frozen",
            ),
            Deviation(
                "A layer that gives one vector a sample has no attention map and is left out, "
                "where the official formula gives a constant 1.",
                "tests/methods/test_blindspot.py::test_vectors_have_no_attention_map",
            ),
        ),
    )

    epochs: int = setting(1, "passes over both sides, E_U", low=1, source="official code, AgeDB; 5 on STS-B")  # fmt: skip
    lr: float = setting(1e-3, "learning rate", above=0, source="official code")
    batch_size: int = setting(256, "samples a batch, over all processes", low=1, source="official code")  # fmt: skip
    step: StepName = setting("adam", "optimiser: sgd, adam or adamw", source="official code")
    beta: float = setting(50.0, "weight of the attention maps, β", low=0, source="official code")
    blind_epochs: int = setting(2, "epochs of the blindspot model, E_B", low=1, source="official code, AgeDB; 10 on STS-B")  # fmt: skip
    blind_lr: float = setting(0.01, "learning rate of the blindspot model", above=0, source="official code")  # fmt: skip
    layers: tuple[str, ...] = setting((), "layers with attention maps; the role `blocks`, else all weighted layers")  # fmt: skip

    @property
    def needs(self) -> Needs:
        """Both sides, targets of the retain side, an untrained model and named layers."""
        return Needs(
            forget=True,
            retain=True,
            labels="all" if self.reads_forget_labels() else "retain",
            fresh=True,
            capabilities=frozenset({"layers", "loss_between", "predict", "tapped"}),
        )

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Train the blindspot model, then imitate it."""
        blind = self.blindspot_model(view, runtime)
        loss = imitation(view, blind, self._layers(view), self.beta)

        def passes(epoch: int) -> Pass:
            for parts in mixed(view, self.batch_size, runtime.generator("mixed", epoch)):
                yield loss, Together(part for part in parts if part is not None)

        # labels that a saliency mask may read must not reach the imitation
        outcome, _ = self.train_model(view.model(), passes, view, runtime)
        return outcome

    def blindspot_model(self, view: View, runtime: Runtime) -> nn.Module:
        """A fresh network after a few epochs on the retain data, frozen and in eval mode.

        Raises:
            ExpungeError: its training stopped early.
        """
        blind = view.fresh("blindspot")
        runtime.seed_everything("blindspot")

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            generator = runtime.generator("blindspot", epoch)
            for batch in view.retain.batches(self.batch_size, generator):
                yield loss, batch

        result = fit(
            blind, passes, runtime=runtime, epochs=self.blind_epochs, lr=self.blind_lr,
            step=self.step, norm="train", stage="blindspot model",
        )  # fmt: skip
        if result.stopped:
            raise ExpungeError(f"the blindspot model was not trained to its end: {result.stopped}")
        return blind.eval().requires_grad_(False)

    def _layers(self, view: View) -> list[str]:
        if self.layers:
            return list(self.layers)
        try:
            return view.role("blocks")
        except NeedsError:
            return list(view.capability("layers")())


def imitation(
    view: View, blind: nn.Module, layers: Sequence[str], beta: float
) -> Callable[[nn.Module, Any], Tensor]:
    """The loss of one mixed batch, given as its parts, whichever of the two there are.

    Args:
        view: gives predictions, taps and the task loss.
        blind: the frozen blindspot model B.
        layers: where attention maps are compared.
        beta: their weight β; with 0 nothing is compared.

    Returns:
        A loss `(model, parts) -> scalar`, bounded below by 0. A part whose samples are to be
        forgotten contributes without its targets, whatever they are.
    """
    between, tapped = view.capability("loss_between"), view.capability("tapped")
    forgotten_ids = view.forget.ids

    def loss(model: nn.Module, parts: tuple[Batch, ...]) -> Tensor:
        # one forward pass over both sides: batch statistics are those of the mixed batch
        whole = replace(reduce(Batch.joined, parts), y=None)
        forgotten = torch.isin(whole.ids.cpu(), forgotten_ids).to(whole.ids.device)
        predicted, maps = tapped(model, whole, list(layers) if beta else [])
        each = []
        for part in parts:
            rows = torch.isin(whole.ids, part.ids)
            if not bool(forgotten[rows].any()):
                each.append(between(predicted[rows], part.y))
                continue
            with torch.no_grad():
                wanted, wanted_maps = tapped(blind, part, list(maps))
            away = between(predicted[rows], wanted)
            mine = {name: a[rows] for name, a in maps.items()}
            each.append(away + beta * attention_gap(mine, wanted_maps))
        return whole.mean(torch.cat(each))

    return loss


def attention_gap(mine: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor | float:
    r"""\(\sum_l AD(a_l, a'_l)\) of each sample [B]; layers that give vectors are left out."""
    gaps = [
        attention_difference(a, wanted[name]) for name, a in mine.items() if a.ndim > 2
    ]  # fmt: skip
    return torch.stack(gaps).sum(0) if gaps else 0.0


def attention_difference(a: Tensor, b: Tensor) -> Tensor:
    r"""\(AD\): mean squared difference [B] of two attention maps, in 0 … 2 / length."""
    return (attention_map(a) - attention_map(b)).square().mean(1)


def attention_map(a: Tensor) -> Tensor:
    """Squares averaged over dim 1 (channels, or steps of a sequence), flattened, of unit length.

    Args:
        a: activation [B, C, …].

    Returns:
        Maps [B, length] in float32 at least.
    """
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    return normalize(wide.square().mean(1).flatten(1), dim=1)

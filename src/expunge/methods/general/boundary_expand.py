r"""BoundaryExpand: move the forget data into a class of its own, then remove that class.

The last layer gets a row for a shadow class \(C\), drawn as an untrained layer's would be; the model
minimises \(\mathrm{mean}_{D_f}\,\mathrm{CE}(f(x), C)\) over \(C+1\) classes; then the row goes
and \(C\) classes are left. No retain data and no labels are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ModelError, NeedsError
from expunge.core.needs import Card, Deviation, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.pruned import keep_only, kept_of
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.method import Training

_TEST = "tests/methods/test_boundary.py::test_"


@dataclass(frozen=True, kw_only=True)
class BoundaryExpand(Training):
    """Train the forget samples into a shadow class that is removed afterwards."""

    name: ClassVar[str] = "boundary-expand"
    card: ClassVar[Card] = Card(
        title="Boundary Unlearning: Rapid Forgetting of Deep Networks via Shifting the Decision "
        "Boundary",
        authors="Chen, Gao, Liu, Peng, Wang",
        year=2023,
        link="https://arxiv.org/abs/2303.11570",
        idea="A class that exists only during unlearning takes the forget samples with it.",
        deviations=(
            Deviation(
                "No label is read: all forget samples get the same new class.",
                _TEST + "boundary_expand_reads_no_labels",
            ),
        ),
    )

    epochs: int = setting(10, "passes over the forget data", low=1, source="official code")
    lr: float = setting(1e-5, "learning rate", above=0, source="official code")
    momentum: float = setting(0.9, "momentum of sgd", low=0, high=1, source="official code")

    @property
    def needs(self) -> Needs:
        """Forget data; labels only for a saliency mask."""
        labels: Labels = "forget" if self.reads_forget_labels() else "none"
        return Needs(
            forget=True, labels=labels, retain=self.norm == "recalibrate",
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Widen the last layer, train, narrow it."""
        model, classes = view.model(), view.classes
        name = view.role("last layer")[0]
        row = widen(model, name, classes, runtime.generator("shadow"))

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def passes(epoch: int) -> Pass:
            for batch in view.forget.batches(self.batch_size, runtime.generator("forget", epoch)):
                yield loss, batch.labelled(torch.full_like(batch.ids, classes))

        first = next(view.forget.batches(1))
        with torch.no_grad():
            outputs = view.logits(model, first).shape[1]
        if outputs != row + 1:
            raise ModelError(
                f"BoundaryExpand: the widened model gives {outputs} classes instead of {row + 1}; "
                "its last layer is not the last thing it does"
            )
        outcome, _ = self.train_model(model, passes, view, runtime)
        narrow(model, name)
        return outcome


def widen(model: nn.Module, name: str, classes: int, generator: torch.Generator) -> int:
    r"""Give the last layer one more output, in place.

    The other rows keep every bit; the new one is drawn as torch draws a linear layer, from
    \(\mathrm{Uniform}(\pm d^{-1/2})\).

    Args:
        model: the model.
        name: its last layer.
        classes: outputs it must have.
        generator: draws the row.

    Returns:
        The number of the new class.

    Raises:
        NeedsError: the layer is not a linear one with an output a class, or computes its weight.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear) or layer.out_features != classes:
        raise NeedsError(
            f"boundary-expand needs a linear last layer with {classes} outputs, and {name!r} is none; "
            'pass roles={"last layer": [...]}, or use boundary-shrink'
        )
    if not {"weight", "bias"} <= layer._parameters.keys():
        raise NeedsError(
            f"boundary-expand widens a plain linear layer, and {name!r} computes its weight from other "
            "parameters (weight_norm, parametrize); remove that first, or use boundary-shrink"
        )
    bound = layer.in_features**-0.5
    for key, shape in (("weight", (1, layer.in_features)), ("bias", (1,))):
        old = getattr(layer, key)
        if old is not None:
            row = (2 * torch.rand(shape, generator=generator) - 1) * bound
            _replace(model, name, key, torch.cat([old.detach(), row.to(old)]))
    layer.out_features += 1
    return classes


def narrow(model: nn.Module, name: str) -> None:
    """Remove the last output of the last layer again, in place."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    for key in ("weight", "bias"):
        old = getattr(layer, key)
        if old is not None:
            _replace(model, name, key, old.detach()[:-1].clone())
    layer.out_features -= 1


def _replace(model: nn.Module, name: str, key: str, value: Tensor) -> None:
    """Put a parameter of another length in place, and let a pruning mask follow."""
    layer, kept = model.get_submodule(name), kept_of(model)
    moves = getattr(layer, key).requires_grad
    setattr(layer, key, nn.Parameter(value, requires_grad=moves))
    full = f"{name}.{key}"
    if kept is not None and full in kept:
        mask = kept[full][: len(value)]
        new = torch.ones(len(value) - len(mask), *mask.shape[1:], dtype=torch.bool)
        keep_only(model, kept | {full: torch.cat([mask, new])})

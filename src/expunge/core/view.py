"""View: what one method may see of a problem for one request.

Built from the method's declared needs. Data and labels that were not declared are not there;
every sample read is counted.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch, Data, look_up
from expunge.core.errors import AccessError, NeedsError
from expunge.core.needs import Needs
from expunge.core.problem import Problem, run_recipe
from expunge.core.request import Request
from expunge.core.runtime import Runtime

_WITHHELD = "a method used the labelled loss on samples whose labels it did not declare"


class Source:
    """One side of the data (forget, retain, validation) as a method sees it."""

    def __init__(self, data: Data, ids: Tensor, labelled: bool, runtime: Runtime) -> None:
        """Restrict `data` to `ids`; withhold labels unless `labelled`."""
        self.ids = ids
        self.labelled = labelled
        self._data = data
        self._runtime = runtime

    @functools.cached_property
    def _sorted(self) -> Tensor:
        return self.ids.sort().values

    def __len__(self) -> int:
        """Return the number of samples on this side."""
        return len(self.ids)

    def batches(self, size: int, shuffle: torch.Generator | None = None) -> Iterator[Batch]:
        """Yield one pass in batches of `size`, shuffled if a generator is given.

        With several processes each gets its share of every batch; `Batch.mean` and
        `Runtime.sum` put the shares together again.
        """
        ids = (
            self.ids
            if shuffle is None
            else self.ids[torch.randperm(len(self.ids), generator=shuffle)]
        )
        for chunk in ids.split(size):
            yield self.fetch(chunk)

    def fetch(self, ids: Tensor) -> Batch:
        """Read some samples of this side.

        Raises:
            AccessError: an id belongs to another side.
        """
        ids = ids.cpu()  # ids of a batch travel with it to its device
        if not bool(look_up(self._sorted, ids)[1].all()):
            raise AccessError("a method asked for samples that are not on this side of the data")
        share = self._runtime.share(ids)
        batch = self._data.fetch(share)
        self._runtime.cost.samples += len(share)
        y = batch.y if self.labelled else None
        batch = replace(batch, y=y, total=len(ids), processes=self._runtime.processes)
        return batch.to(self._runtime.device)

    def part(self, count: int, generator: torch.Generator) -> Source:
        """Return a random part of this side: `count` samples, or all of them if there are fewer."""
        chosen = self.ids[torch.randperm(len(self.ids), generator=generator)[:count]]
        return Source(self._data, chosen, self.labelled, self._runtime)

    def labels(self) -> Tensor:
        """Labels [len(self)] in the order of `ids`.

        Raises:
            AccessError: they were not declared.
        """
        if not self.labelled:
            raise AccessError("a method read labels that it did not declare in its needs")
        return self._data.labels_of(self.ids)


class View:
    """A problem seen through one method's needs, for one request."""

    def __init__(self, problem: Problem, request: Request, needs: Needs, runtime: Runtime) -> None:
        """Resolve the request and keep what the needs allow."""
        self._problem = problem
        self._runtime = runtime
        self.needs = needs
        self.request = request
        self._forget_ids = request.resolve(problem.train)
        self.forget_count = len(self._forget_ids)
        self.total_count = len(problem.train)

    @property
    def forget(self) -> Source:
        """The samples to forget."""
        self._declared(self.needs.forget, "forget data")
        return self._side(self._problem.train, self._forget_ids, "forget")

    @property
    def retain(self) -> Source:
        """The samples to keep."""
        self._declared(self.needs.retain, "retain data")
        return self._side(self._problem.train, self._retain_ids, "retain")

    @functools.cached_property
    def _retain_ids(self) -> Tensor:
        return self._problem.train.without(self._forget_ids)

    @property
    def everything(self) -> Source:
        """Forget and retain samples together, in id order."""
        self._declared(self.needs.forget and self.needs.retain, "all training data")
        labelled = self.needs.labels == "all"
        return Source(
            self._problem.train, self._problem.train.ids.sort().values, labelled, self._runtime
        )

    @property
    def validation(self) -> Source:
        """Validation samples."""
        self._declared(self.needs.validation, "validation data")
        if self._problem.valid is None:
            raise AccessError("this problem has no validation data")
        return self._side(self._problem.valid, self._problem.valid.ids, "validation")

    def model(self, shared: bool = False) -> nn.Module:
        """Return a fresh copy of the original model to edit.

        Args:
            shared: let the copy share the original's numbers, for a method that only adds to it.
        """
        original, memo = self._problem.model, {}
        if shared:
            memo = {
                id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad)
                for p in original.parameters()
            }
        return copy.deepcopy(original, memo).to(self._runtime.device)

    def original(self) -> nn.Module:
        """Return a frozen copy of the original in eval mode, e.g. as a teacher."""
        self._declared(self.needs.original, "the original model beside its own")
        return self.model().eval().requires_grad_(False)

    def fresh(self, *stage: str | int) -> nn.Module:
        """Return an untrained model of the same architecture, seeded by the run and the stage."""
        self._declared(self.needs.fresh, "an untrained model")
        return self._problem.fresh(self._runtime.seed_for("fresh", *stage)).to(self._runtime.device)

    def retrain(self, seed: int) -> nn.Module:
        """Run the recipe without the forget samples."""
        self._declared(self.needs.recipe, "the recipe")
        assert self._problem.recipe is not None  # needs.check saw to it
        keep = self._retain_ids
        # A recipe runs its own loop; one that knows its length lets the cost be counted.
        epochs = int(getattr(self._problem.recipe, "epochs", 0))
        self._runtime.cost.samples += epochs * len(keep)
        self._runtime.cost.gradients += epochs * len(keep)
        return run_recipe(self._problem.recipe, keep, seed, self._runtime)

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-sample training loss [B] of a batch that carries labels.

        Raises:
            AccessError: the labels were withheld.
        """
        if batch.y is None:
            raise AccessError(_WITHHELD)
        return self._problem.each_loss(model, batch)

    def capability(self, name: str) -> Callable[..., Any]:
        """Return a declared capability of the problem, e.g. `logits`."""
        self._declared(name in self.needs.capabilities, f"capability {name!r}")
        return self._problem.capability(name)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits [B, C], if declared."""
        return self.capability("logits")(model, batch)

    def logits_and_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and training losses [B] of a batch with labels, by one pass if possible.

        Raises:
            AccessError: the labels were withheld, or the logits were not declared.
        """
        self.capability("logits")
        if batch.y is None:
            raise AccessError(_WITHHELD)
        return self._problem.logits_and_loss(model, batch)

    def penultimate(self, model: nn.Module, batch: Batch) -> Tensor:
        """Input [B, d] of the last layer, with its gradient, if declared."""
        return self.capability("penultimate")(model, batch)

    def role(self, name: str) -> list[str]:
        """Names of the modules that play a role in this model."""
        return self._problem.role(name)

    @property
    def classes(self) -> int:
        """Number of classes of the model's output.

        Raises:
            NeedsError: the problem is not one of classes.
        """
        classes = getattr(self._problem, "classes", None)
        if classes is None:
            raise NeedsError(f"a {self._problem.kind} problem has no classes to choose from")
        return int(classes)

    def _side(self, data: Data, ids: Tensor, side: str) -> Source:
        return Source(data, ids, self.needs.labels_of(side), self._runtime)

    @staticmethod
    def _declared(allowed: bool, what: str) -> None:
        if not allowed:
            raise AccessError(f"a method used {what} without declaring it in its needs")

r"""UNSIR: impair a class with noise that stands for its opposite, then repair the rest.

1. For each class \(c\) to forget, noise \(N \in \mathbb R^{b \times shape}\), drawn from \(\mathcal N(0, 1)\),
   minimises \(-\mathrm{CE}(f_0(N), c) + \lambda\,\mathrm{mean}_b \|N_b\|_2^2\) with Adam, \(f_0\) fixed in eval mode.
2. Impair: one pass over copies of the noise, labelled \(c\), and some retain samples of each class.
3. Repair: one pass over these retain samples alone.

What is taught as \(c\) is what the model finds least like \(c\). No forget sample is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor, nn

from expunge.core.data import Batch, map_inputs
from expunge.core.errors import ExpungeError, NeedsError
from expunge.core.needs import Card, Deviation, Labels, Needs
from expunge.core.outcome import Outcome
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.core.view import View
from expunge.train.fit import Pass
from expunge.train.inputs import continuous
from expunge.train.method import Training
from expunge.train.stages import Stages
from expunge.train.steps import StepName, make_optimizer

_TEST = "tests/methods/test_unsir.py::test_"


@dataclass(frozen=True, kw_only=True)
class UNSIR(Training):
    """Forget whole classes by their number, without any of their samples."""

    name: ClassVar[str] = "unsir"
    search: ClassVar = {"epochs": None, "lr": None, "repair_epochs": None}
    card: ClassVar[Card] = Card(
        title="Fast Yet Effective Machine Unlearning",
        authors="Tarun, Chundawat, Mandal, Kankanhalli",
        year=2023,
        link="https://arxiv.org/abs/2111.08947",
        idea="Noise that maximises the loss of a class, taught as that class, overwrites it.",
        deviations=(
            Deviation(
                "The noise is found with the model in eval mode, so that it leaves no trace in "
                "running statistics before the impair pass.",
                _TEST + "unsir_noise_is_found_in_eval_mode",
            ),
            Deviation(
                "Several classes get their noise each and are impaired in one pass.",
                _TEST + "unsir_forgets_several_classes",
            ),
        ),
    )

    epochs: int = setting(1, "impair passes", low=1, source="official code")
    repair_epochs: int = setting(1, "repair passes", low=0, source="official code")
    lr: float = setting(1e-4, "learning rate of both", above=0, source="official code")
    step: StepName = setting("adam", "optimiser: sgd, adam or adamw", source="official code")
    noise_size: int = setting(32, "noise inputs a class, b", low=1, source="official code; 256 with 250 steps")  # fmt: skip
    noise_steps: int = setting(25, "steps that shape the noise", low=0, source="official code")
    noise_lr: float = setting(0.1, "Adam's learning rate for the noise", above=0, source="official code")  # fmt: skip
    noise_weight: float = setting(0.1, "weight λ of its squared length", low=0, source="official code")  # fmt: skip
    copies: int = setting(80, "times the noise is shown in an impair pass", low=1, source="official code")  # fmt: skip
    per_class: int = setting(500, "retain samples a class", low=1, source="official code")

    @property
    def needs(self) -> Needs:
        """Retain data with labels; forget data only for a saliency mask."""
        salient = self.reads_forget_labels()
        labels: Labels = "all" if salient else "retain"
        return Needs(retain=True, forget=salient, labels=labels, classes=True)

    def check(self, problem: Problem, request: Request) -> None:
        """Also complain about requests for anything but whole classes."""
        super().check(problem, request)
        named_classes(request)

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Shape the noise, impair, repair."""
        model = view.model()
        kept = self._subset(view, runtime)
        noise, losses = self.noise(view, forgotten_classes(view), runtime)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            return batch.mean(view.each_loss(model, batch))

        def impair(epoch: int) -> Pass:
            count = len(noise) * self.copies
            order = torch.randperm(count + len(kept), generator=runtime.generator("impair", epoch))
            for places in order.split(self.batch_size):
                rows, ids = (
                    places[places < count] % len(noise),
                    kept[places[places >= count] - count],
                )
                parts = [_rows(noise, rows, runtime)] if len(rows) else []
                parts += [view.retain.fetch(ids)] if len(ids) else []
                yield loss, reduce(Batch.joined, parts)

        def repair(epoch: int) -> Pass:
            order = torch.randperm(len(kept), generator=runtime.generator("repair", epoch))
            for ids in kept[order].split(self.batch_size):
                yield loss, view.retain.fetch(ids)

        stages = Stages(self, model, view, runtime)
        stages.run("unsir impair", impair, epochs=self.epochs)
        stages.run("unsir repair", repair, epochs=self.repair_epochs)
        return stages.outcome(noise_losses=losses, rehearsed=len(kept))

    def noise(
        self, view: View, classes: list[int], runtime: Runtime
    ) -> tuple[Batch, list[list[float]]]:
        """Find the noise of each class.

        Args:
            view: gives the original model, its loss, and one retain sample for the shape.
            classes: to forget.
            runtime: gives the generator.

        Returns:
            One batch [classes · b, …] labelled with the classes; its ids are no sample's. And for each
            class its loss before the first and after the last step.

        Raises:
            DataError: inputs are not real numbers.
            ExpungeError: the noise is no longer finite.
        """
        frozen = view.model().eval().requires_grad_(False)
        sample, back = continuous(view.retain.fetch(view.retain.ids[:1]), "UNSIR")
        shape = (self.noise_size, *sample.shape[1:])
        found, losses = [], []
        for c in classes:
            start = torch.randn(shape, generator=runtime.generator("noise", c))
            free = nn.Parameter(start.to(runtime.device))
            labels = torch.full((self.noise_size,), c, device=runtime.device)
            optimizer = make_optimizer("adam", [free], lr=self.noise_lr)

            def value(noise: Tensor, labels: Tensor = labels) -> Tensor:
                batch = replace(back(noise.to(sample.dtype)), y=labels)
                length = noise.square().flatten(1).sum(1)
                return self.noise_weight * length.mean() - view.each_loss(frozen, batch).mean()

            first = float(value(free.detach()))
            for _ in range(self.noise_steps):
                optimizer.zero_grad()
                value(free).backward()
                optimizer.step()
                runtime.cost.gradients += self.noise_size * runtime.is_main  # all shape the same
            losses.append([first, float(value(free.detach()))])
            found.append(free.detach().to(sample.dtype))
        if not all(bool(n.isfinite().all()) for n in found):
            raise ExpungeError("UNSIR: the noise is NaN or infinite; lower noise_lr")
        y = torch.tensor(classes).repeat_interleave(self.noise_size).to(runtime.device)
        return replace(
            back(torch.cat(found)), y=y, ids=-1 - torch.arange(len(y)).to(y.device)
        ), losses

    def _subset(self, view: View, runtime: Runtime) -> Tensor:
        """Ids of up to `per_class` retain samples of each class."""
        ids, labels = view.retain.ids, view.retain.labels()
        order = torch.randperm(len(ids), generator=runtime.generator("subset"))
        ids, labels = ids[order], labels[order]
        return torch.cat([ids[labels == c][: self.per_class] for c in labels.unique()])


def forgotten_classes(view: View) -> list[int]:
    """The classes a request names.

    Raises:
        NeedsError: it names something else; noise stands for a class, not for samples.
    """
    return named_classes(view.request)


def named_classes(request: Request) -> list[int]:
    """The classes of a request, sorted; raises `NeedsError` if it names something else."""
    if request.label is None:
        raise NeedsError(
            "unsir forgets whole classes; ask for them by label=, or use another method"
        )
    return sorted(set(request.label))


def _rows(batch: Batch, rows: Tensor, runtime: Runtime) -> Batch:
    """This process' share of some rows of a batch that every process holds."""
    share = runtime.share(rows).to(batch.ids.device)
    assert batch.y is not None
    return replace(
        batch,
        x=map_inputs(batch.x, lambda t: t[share]),
        y=batch.y[share],
        ids=batch.ids[share],
        total=len(rows),
        processes=runtime.processes,
    )

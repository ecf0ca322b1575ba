"""Recipe: how a model was trained, so that it can be trained again without some of the data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.core.data import Batch, Data
from expunge.core.errors import ExpungeError
from expunge.core.hashing import content_key
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.train.fit import Pass, fit
from expunge.train.method import cosine
from expunge.train.steps import StepName


@dataclass(frozen=True)
class ClassifierRecipe:
    """Train a classifier from a fresh initialisation on the samples to keep.

    Every module is rebuilt by `build()` under the new seed: nothing of an earlier model survives.
    The learning rate follows half a cosine over the epochs.

    Attributes:
        build: makes the untrained network.
        data: the training data.
        epochs: passes over the kept samples.
        lr: highest learning rate.
        batch_size: samples a step.
        momentum: of SGD.
        weight_decay: L2 coefficient.
        step: optimiser.
        threads: torch threads while training; part of the recipe because results depend on it.
    """

    build: Callable[[], nn.Module]
    data: Data
    epochs: int = 15
    lr: float = 0.05
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    step: StepName = "sgd"
    threads: int = 1

    def __call__(self, keep_ids: Tensor, seed: int, runtime: Runtime | None = None) -> nn.Module:
        """Train on `keep_ids` with a seed and return the model in eval mode.

        Args:
            keep_ids: stable ids of the samples to train on.
            seed: of initialisation and of batch order.
            runtime: device and progress; its seed is not used.

        Returns:
            The trained model.

        Raises:
            ExpungeError: the training did not run to its end.
        """
        outer = runtime or Runtime()
        # Every process trains all of it: a recipe gives one model, however many processes ask.
        inner = Runtime(
            device=outer.device,
            seed=seed,
            threads=self.threads,
            reporter=outer.reporter,
            alone=True,
        )
        source = Source(self.data, keep_ids, True, inner)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            assert batch.y is not None
            return batch.mean(cross_entropy(model(batch.x), batch.y, reduction="none"))

        def passes(epoch: int) -> Pass:
            for batch in source.batches(self.batch_size, inner.generator("recipe", epoch)):
                yield loss, batch

        with inner.metered():
            inner.seed_everything("build")
            model = self.build().to(inner.device)
            result = fit(
                model,
                passes,
                runtime=inner,
                epochs=self.epochs,
                lr=self.lr,
                step=self.step,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                schedule=lambda epoch: cosine(epoch, self.epochs),
                stage="train",
            )
        if result.stopped:  # half a training is no reference
            raise ExpungeError(f"training from the recipe stopped: {result.stopped}")
        return model.cpu()

    def settings(self) -> dict[str, Any]:
        """What a record keeps of the recipe."""
        kept = ("epochs", "lr", "batch_size", "momentum", "weight_decay", "step", "threads")
        build = self.build
        while isinstance(build, functools.partial):
            build = build.func
        name = getattr(build, "__qualname__", type(build).__qualname__)
        return {"build": f"{build.__module__}.{name}"} | {k: getattr(self, k) for k in kept}

    def key(self) -> str:
        """Content key: settings, the network's layout and the data's hash."""
        with torch.random.fork_rng(
            devices=[]
        ):  # a name alone does not tell one lambda from another
            model = self.build()
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        return content_key([self.settings(), str(model), shapes, self.data.fingerprint()])

"""Recipe: how a model was trained, so that it can be trained again without some of the data."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from expunge.core.data import Batch, Data
from expunge.core.errors import ExpungeError
from expunge.core.hashing import content_key
from expunge.core.pruned import keep_only
from expunge.core.runtime import Runtime, random_restored
from expunge.core.view import Source
from expunge.problems.supervised import call
from expunge.train.fit import Pass, fit
from expunge.train.losses import one_a_sample, questions_each, regression_each
from expunge.train.method import cosine
from expunge.train.restriction import RestrictionNorm, restricted
from expunge.train.steps import StepName

Watch = Callable[[Batch, Any], None]
Around = Callable[[nn.Module, Batch], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class SupervisedRecipe:
    """Train from a fresh initialisation on the samples to keep; a subclass says on which loss.

    Every module is rebuilt by `build()` under the new seed: nothing of an earlier model survives. As in
    a problem, the network may return an object with `.logits` and take a mapping as keyword arguments.

    Attributes:
        build: makes the untrained network.
        data: the training data.
        epochs: passes over the kept samples.
        lr: highest learning rate.
        batch_size: samples a step.
        momentum: of SGD.
        weight_decay: L2 coefficient.
        step: optimiser.
        schedule: of the learning rate over the epochs: half a cosine, or none.
        threads: torch threads while training; part of the recipe because results depend on it.
        restriction: weight α of the gradient's norm in the loss; 0 trains plainly.
        restriction_norm: one norm a parameter tensor, or one over all of them.
        clip: largest gradient norm, or None.
    """

    build: Callable[[], nn.Module]
    data: Data
    epochs: int = 15
    lr: float = 0.05
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    step: StepName = "sgd"
    schedule: Literal["cosine", "constant"] = "cosine"
    threads: int = 1
    restriction: float = 0.0
    restriction_norm: RestrictionNorm = "per_tensor"
    clip: float | None = None

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss [B] of each sample of a batch with labels."""
        raise NotImplementedError

    def __call__(self, keep_ids: Tensor, seed: int, runtime: Runtime | None = None) -> nn.Module:
        """Train on `keep_ids` with a seed and return the model in eval mode.

        Args:
            keep_ids: stable ids of the samples to train on.
            seed: of initialisation and of batch order.
            runtime: device and progress; its seed is not used.

        Returns:
            The trained model.
        """
        return self.train(keep_ids, seed, runtime)[0]

    def initial(self, seed: int) -> nn.Module:
        """Return the untrained model that a training with this seed starts from."""
        with random_restored():
            torch.manual_seed(Runtime(seed=seed).seed_for("build"))
            return self.build()

    def train(
        self,
        keep_ids: Tensor,
        seed: int,
        runtime: Runtime | None = None,
        *,
        kept: Mapping[str, Tensor] | None = None,
        start: Mapping[str, Tensor] | None = None,
        first: int = 0,
        last: int | None = None,
        steps: int | None = None,
        snapshots: Collection[int] = (),
        watch: Watch | None = None,
        around: Around | None = None,
    ) -> tuple[nn.Module, list[dict[str, Tensor]]]:
        """Train as `__call__` does, under a mask or from an epoch on.

        Args:
            keep_ids: stable ids of the samples to train on.
            seed: of initialisation and of batch order.
            runtime: device and progress; its seed is not used.
            kept: pruning mask by parameter name; the initialisation is pruned and stays so.
            start: weights to start from instead of the initialisation.
            first: epoch to start at; order of the data and learning rates are that epoch's.
            last: epoch to end before; learning rates are those of the whole training.
            steps: batches an epoch; the samples start anew, in a new order, when they are used up.
                None is one pass.
            snapshots: epochs (counted from 1) after which the weights are kept.
            watch: sees each batch with what the network put out for it, before its step.
            around: makes a context that encloses the step on each batch, e.g. that of an
                `UpdateRecorder`; it is entered before the forward pass and left after the step.

        Returns:
            The trained model in eval mode, and the weights asked for.

        Raises:
            ExpungeError: the training did not run to its end.
        """
        inner = self.alone(seed, runtime)
        source = Source(self.data, keep_ids, True, inner)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            if watch is None:
                return batch.mean(self.each_loss(model, batch))
            hook = model.register_forward_hook(
                lambda _module, _given, out: watch(batch, getattr(out, "logits", out))
            )
            try:
                return batch.mean(self.each_loss(model, batch))
            finally:
                hook.remove()

        whole = restricted(loss, self.restriction, self.restriction_norm)
        one = -(-len(source) // self.batch_size)  # batches of one pass over the samples
        each = steps or one

        def passes(epoch: int) -> Pass:
            done = 0
            while done < each:
                number, skip = divmod((epoch + first) * each + done, one)
                order = source.batches(self.batch_size, inner.generator("recipe", number))
                for batch in itertools.islice(order, skip, skip + each - done):
                    # `fit` asks for the next batch when it has taken the step on this one
                    with contextlib.nullcontext() if around is None else around(model, batch):
                        yield whole, batch
                    done += 1

        with inner.metered(), random_restored():
            inner.seed_everything("build")
            model = self.build().to(inner.device)
            if start is not None:
                model.load_state_dict(dict(start))
            if kept is not None:
                keep_only(model, kept)
            result = fit(
                model,
                passes,
                runtime=inner,
                epochs=(self.epochs if last is None else last) - first,
                lr=self.lr,
                step=self.step,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                schedule=lambda epoch: self.rate(epoch + first),
                pace=lambda step: self.pace(step + first * each, self.epochs * each),
                clip=self.clip,
                snapshots=[epoch - first for epoch in snapshots],
                stage="train",
            )
        if result.stopped:  # half a training is no reference
            raise ExpungeError(f"training from the recipe stopped: {result.stopped}")
        return model.cpu(), result.snapshots

    def alone(self, seed: int, runtime: Runtime | None) -> Runtime:
        """Where a training runs: every process does all of it, whoever and however many ask."""
        outer = runtime or Runtime()
        return Runtime(
            device=outer.device,
            seed=seed,
            threads=self.threads,
            reporter=outer.reporter,
            alone=True,
        )

    def rate(self, epoch: int) -> float:
        """Factor of the learning rate in an epoch, counted from 0."""
        return cosine(epoch, self.epochs) if self.schedule == "cosine" else 1.0

    def pace(self, step: int, steps: int) -> float:
        """Factor of the learning rate at a step of all `steps`, counted from 0, beside its epoch's."""
        return 1.0

    def settings(self) -> dict[str, Any]:
        """What a record keeps of the recipe."""
        kept = ("epochs", "lr", "batch_size", "momentum", "weight_decay", "step", "threads")
        build = self.build
        while isinstance(build, functools.partial):
            build = build.func
        name = getattr(build, "__qualname__", type(build).__qualname__)
        settings = {"build": f"{build.__module__}.{name}"} | {k: getattr(self, k) for k in kept}
        if self.restriction:  # a plain training keeps the key it always had
            settings |= {k: getattr(self, k) for k in ("restriction", "restriction_norm")}
        if self.clip is not None:
            settings["clip"] = self.clip
        if self.schedule != "cosine":
            settings["schedule"] = self.schedule
        return settings

    def key(self) -> str:
        """Content key: settings, the network's layout and the data's hash."""
        with random_restored():  # a name alone does not tell one lambda from another
            model = self.build()
        shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        return content_key([self.settings(), str(model), shapes, self.data.fingerprint()])


@dataclass(frozen=True)
class Stopped:
    """A recipe whose trainings end early, at the learning rates of the whole training.

    Attributes:
        recipe: of the whole training.
        last: epoch to end before.
    """

    recipe: SupervisedRecipe
    last: int

    @property
    def epochs(self) -> int:
        """Passes over the kept samples."""
        return self.last

    def __call__(self, keep_ids: Tensor, seed: int, runtime: Runtime | None = None) -> nn.Module:
        """Train as the recipe does until the epoch; see `SupervisedRecipe`."""
        return self.recipe.train(keep_ids, seed, runtime, last=self.last)[0]


@dataclass(frozen=True)
class ClassifierRecipe(SupervisedRecipe):
    """Train a classifier on the cross-entropy; see `SupervisedRecipe` for the settings."""

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy [B], in nats."""
        assert batch.y is not None
        return cross_entropy(call(model, batch), batch.y, reduction="none")


@dataclass(frozen=True)
class MultiLabelRecipe(SupervisedRecipe):
    """Train on several yes-or-no questions; see `SupervisedRecipe` for the settings."""

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean binary cross-entropy [B] over the questions, in nats."""
        assert batch.y is not None
        return questions_each(call(model, batch), batch.y)


@dataclass(frozen=True)
class RegressorRecipe(SupervisedRecipe):
    """Train a regressor on a loss of `Regression`; see `SupervisedRecipe` for the settings.

    Attributes:
        loss: `l1`, `mse` or `quantile(q)`.
    """

    loss: str = "l1"

    def each_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The regression loss [B]."""
        assert batch.y is not None
        prediction = one_a_sample(call(model, batch), len(batch))
        return regression_each(prediction, batch.y, self.loss)

    def settings(self) -> dict[str, Any]:
        """What a record keeps of the recipe."""
        return super().settings() | {"loss": self.loss}

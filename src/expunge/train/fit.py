"""The one training loop. A method gives it passes of (loss, batch); it owns everything else.

Accelerate for devices, precision and processes; hard masks; gradient clipping; the curve; budget;
checkpoints that resume to the same bits; a stop when the loss is no longer finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import NeedsError
from expunge.core.runtime import Runtime
from expunge.train.masks import Mask
from expunge.train.norm import NormMode, norm_layers, train_mode
from expunge.train.steps import StepName, make_optimizer

Loss = Callable[[nn.Module, Any], Tensor]
Pass = Iterable[tuple[Loss, Any]]


@dataclass
class Fit:
    """What training left behind.

    Attributes:
        curve: one dict every `every` steps: step, epoch, loss, lr.
        stopped: why it ended early, or None.
        steps: optimiser steps taken.
        snapshots: state dicts after each epoch, if asked for.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    steps: int = 0
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)


def fit(
    model: nn.Module,
    passes: Callable[[int], Pass],
    *,
    runtime: Runtime,
    epochs: int,
    lr: float,
    step: StepName = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: Callable[[int], float] = lambda epoch: 1.0,
    clip: float | None = None,
    accumulate: int = 1,
    mask: Mask | None = None,
    norm: NormMode = "train",
    stop: Callable[[float], str | None] = lambda loss: None,
    snapshots: bool = False,
    every: int = 10,
    stage: str = "fit",
) -> Fit:
    """Train `model` in place.

    Args:
        model: the model; only parameters with a True in the mask move.
        passes: `passes(epoch)` yields pairs of a loss `(model, batch) -> scalar` and a batch (or a
            tuple of batches). It must give the same sequence whenever it is called for an epoch.
        runtime: device, processes, seeds, budget, checkpoints, progress.
        epochs: number of passes.
        lr: learning rate, multiplied by `schedule(epoch)`.
        step: optimiser.
        momentum: SGD momentum.
        weight_decay: L2 coefficient.
        schedule: learning-rate factor of each epoch.
        clip: largest gradient norm, or None.
        accumulate: batches whose gradients are averaged into one step; a remainder at the end of
            an epoch is dropped.
        mask: hard mask; None lets all move.
        norm: what running statistics do (see `norm.py`).
        stop: looks at each loss and says why to stop, or None.
        snapshots: keep the weights after each epoch.
        every: steps between two points of the curve.
        stage: name of this training in checkpoints and progress.

    Returns:
        The curve and how training ended.

    Raises:
        NeedsError: running statistics would be taken over each process' share of a batch.
    """
    from accelerate import Accelerator

    if runtime.processes > 1 and norm == "train" and norm_layers(model):
        raise NeedsError(
            "batch statistics cannot be shared between processes; use norm=frozen with several processes"
        )
    accelerator = Accelerator(cpu=runtime.device == "cpu", mixed_precision=runtime.precision)
    parameters = dict(model.named_parameters())
    if mask is not None:
        mask = {n: mask[n].to(p.device) for n, p in parameters.items()}
        for name, p in parameters.items():
            p.requires_grad_(bool(mask[name].any()))
    moving = {n: p for n, p in parameters.items() if p.requires_grad}
    frozen_values = {n: p.detach().clone() for n, p in moving.items()} if mask is not None else {}
    optimizer = make_optimizer(
        step, moving.values(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    result = Fit()
    keeper = _Checkpoints(runtime, stage, model, optimizer, result)
    first_epoch, skip = keeper.restore()
    wrapped, prepared = accelerator.prepare(model, optimizer)

    sound: dict[str, Tensor] | None = None
    sound_epoch = -1
    with runtime.task(stage, epochs) as task:
        task.advance(first_epoch)
        for epoch in range(first_epoch, epochs):
            train_mode(model, norm)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(epoch)
            micro = 0
            optimizer.zero_grad(set_to_none=True)
            for index, (loss_of, batch) in enumerate(passes(epoch)):
                if index < skip:
                    continue
                if skip:
                    keeper.resume_random_state()
                    skip = 0
                loss = loss_of(wrapped, batch)
                value = float(runtime.sum(loss.detach().clone())) / runtime.processes
                result.stopped = _why_stop(value, result.steps, stop, runtime, keeper.elapsed())
                if not math.isfinite(value) and sound is not None:
                    model.load_state_dict(sound)
                if result.stopped:
                    break
                if (
                    sound_epoch != epoch
                ):  # these weights gave a finite loss: the place to fall back to
                    sound, sound_epoch = _copy(model), epoch
                accelerator.backward(loss / accumulate)
                runtime.cost.gradients += _count(batch)
                micro += 1
                if micro % accumulate:
                    continue
                if clip is not None:
                    accelerator.clip_grad_norm_(moving.values(), clip)
                if mask is not None:
                    _mask_gradients(moving, mask)
                prepared.step()
                prepared.zero_grad(set_to_none=True)
                if mask is not None:
                    _restore(moving, mask, frozen_values, optimizer)
                result.steps += 1
                if result.steps % every == 1 or every == 1:
                    result.curve.append({
                        "step": result.steps,
                        "epoch": epoch,
                        "loss": value,
                        "lr": lr * schedule(epoch),
                    })
                keeper.maybe_save(epoch, index + 1)
            if skip:  # the checkpoint was taken at the very end of this epoch
                keeper.resume_random_state()
                skip = 0
            if snapshots:
                result.snapshots.append(_copy(model))
            task.advance()
            if result.stopped:
                runtime.reporter.say(f"{stage} stopped: {result.stopped}")
                break
    for p in parameters.values():
        p.requires_grad_(True)
    model.eval()
    return result


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _count(batch: Any) -> int:
    return len(batch) if isinstance(batch, Batch) else sum(_count(part) for part in batch)


def _why_stop(
    value: float, steps: int, stop: Callable[[float], str | None], runtime: Runtime, seconds: float
) -> str | None:
    if not math.isfinite(value):
        return f"the loss was {value} after step {steps}; the last weights with a finite loss at the start of an epoch were put back"
    budget = runtime.budget
    if budget.steps is not None and steps >= budget.steps:
        return f"budget of {budget.steps} steps used"
    if budget.seconds is not None and seconds >= budget.seconds:
        return f"budget of {budget.seconds} s used"
    return stop(value)


def _mask_gradients(moving: dict[str, nn.Parameter], mask: Mask) -> None:
    for name, p in moving.items():
        if p.grad is not None:
            p.grad.mul_(mask[name])


@torch.no_grad()
def _restore(
    moving: dict[str, nn.Parameter],
    mask: Mask,
    values: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Undo what weight decay and momentum did to frozen coordinates, and forget their momentum."""
    for name, p in moving.items():
        p.copy_(torch.where(mask[name], p, values[name]))
        for state in optimizer.state.get(p, {}).values():
            if isinstance(state, Tensor) and state.shape == p.shape:
                state.mul_(mask[name])


class _Checkpoints:
    """Writes the state of a training every so often and brings it back to the same bits."""

    def __init__(
        self,
        runtime: Runtime,
        stage: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        result: Fit,
    ) -> None:
        self._runtime, self._model, self._optimizer, self._result = (
            runtime,
            model,
            optimizer,
            result,
        )
        self._path: Path | None = (
            None if runtime.checkpoint is None else runtime.checkpoint / f"{stage}.pt"
        )
        self._random: Tensor | None = None
        self._start = time.monotonic()
        self._cost = (0, 0)

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def restore(self) -> tuple[int, int]:
        """Load the checkpoint, if there is one, and return where to go on (epoch, step in it)."""
        if self._path is None or not self._path.exists():
            return 0, 0
        state = torch.load(self._path, weights_only=True, map_location=self._runtime.device)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._result.curve = state["curve"]
        self._result.steps = state["steps"]
        self._result.snapshots = state["snapshots"]
        self._random = state["random"].cpu()
        self._start -= state["seconds"]
        self._runtime.cost.seconds += state["seconds"]  # `metered` adds what this process takes
        self._cost = (state["samples"], state["gradients"])
        if state["random"].numel() and not state["index"]:
            self.resume_random_state()
        return state["epoch"], state["index"]

    def resume_random_state(self) -> None:
        """Put global random state and counters back to where the checkpoint was taken."""
        if self._random is not None:
            torch.set_rng_state(self._random)
            self._runtime.cost.samples, self._runtime.cost.gradients = self._cost
            self._random = None

    def maybe_save(self, epoch: int, index: int) -> None:
        if self._path is None or self._result.steps % self._runtime.checkpoint_every:
            return
        if not self._runtime.is_main:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        torch.save(
            {
                "model": self._model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "curve": self._result.curve,
                "steps": self._result.steps,
                "snapshots": self._result.snapshots,
                "random": torch.get_rng_state(),
                "seconds": self.elapsed(),
                "samples": self._runtime.cost.samples,
                "gradients": self._runtime.cost.gradients,
                "epoch": epoch,
                "index": index,
            },
            temporary,
        )
        temporary.replace(self._path)

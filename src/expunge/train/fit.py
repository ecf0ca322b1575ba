"""The one training loop. A method gives it passes of (loss, batch); it owns everything else.

Accelerate for devices, precision and processes; hard masks; gradient clipping; the curve; budget;
checkpoints that resume to the same bits; a stop when the loss is no longer finite. Half-precision
weights are moved in float32 and rounded after each step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import NeedsError, SettingError
from expunge.core.hashing import hash_tensors
from expunge.core.runtime import Runtime
from expunge.train.average import Average
from expunge.train.checkpoints import Checkpoints, movable
from expunge.train.masks import Mask, within_pruned
from expunge.train.master import Master, wide_copies, write_back
from expunge.train.norm import NormMode, norm_layers, train_mode
from expunge.train.parts import parts_of, samples_in
from expunge.train.recompute import recomputed
from expunge.train.shard import copy_back, local, require_whole_tensors, shard, whole
from expunge.train.shared_gradients import share_gradients
from expunge.train.smooth import Smoother, parse_smooth
from expunge.train.steps import StepName, Turns, make_optimizer

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
        average: mean of the weights that move, with `smooth="swa(…)"`.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None
    steps: int = 0
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)


def fit(
    model: nn.Module,
    passes: Callable[[int], Pass],
    *,
    runtime: Runtime,
    epochs: int,
    lr: float,
    turns: Sequence[float] = (),
    step: StepName = "sgd",
    smooth: str = "none",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    schedule: Callable[[int], float] = lambda epoch: 1.0,
    pace: Callable[[int], float] = lambda step: 1.0,
    clip: float | None = None,
    accumulate: int = 1,
    mask: Mask | None = None,
    norm: NormMode = "train",
    stop: Callable[[float], str | None] = lambda loss: None,
    snapshots: bool | Collection[int] = False,
    every: int = 10,
    stage: str = "fit",
) -> Fit:
    """Train `model` in place.

    Args:
        model: the model; only parameters with a True in the mask move, and what was pruned stays
            zero.
        passes: `passes(epoch)` yields pairs of a loss `(model, batch) -> scalar` and a batch (or a
            tuple of batches). It must give the same sequence whenever it is called for an epoch.
        runtime: device, processes, seeds, budget, checkpoints, progress.
        epochs: number of passes.
        lr: learning rate, multiplied by `schedule(epoch)`.
        turns: learning rates, in place of `lr`, of as many optimisers that step in turn, each with
            its own state.
        step: optimiser.
        smooth: whose gradient it is given: that of the loss, or of one over weights near by; or the
            mean of the weights at the end (see `smooth.py`).
        momentum: SGD momentum.
        weight_decay: L2 coefficient.
        schedule: learning-rate factor of each epoch.
        pace: learning-rate factor of each step, counted from 0, beside that of its epoch.
        clip: largest gradient norm, or None.
        accumulate: batches whose gradients are averaged into one step; a remainder at the end of
            an epoch is dropped.
        mask: hard mask; None lets all move.
        norm: what running statistics do (see `norm.py`).
        stop: looks at each loss and says why to stop, or None.
        snapshots: keep the weights after each epoch, or after these (counted from 1).
        every: steps between two points of the curve.
        stage: name of this training in checkpoints and progress.

    Returns:
        The curve and how training ended.

    Raises:
        NeedsError: running statistics would be taken over each process' share of a batch, or the
            model has no second derivative that `smooth` asks for.
        SettingError: no weight may move, or `smooth` is no choice.
    """
    kept = model
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    mask = within_pruned(mask, model)
    spread = runtime.sharded
    if spread:
        require_whole_tensors(mask)
        if smooth != "none":
            raise NeedsError(
                f"a sharded model takes plain steps; smooth={smooth} needs whole weights"
            )
        model = shard(model, runtime)
    parameters = dict(model.named_parameters())
    if mask is not None:
        mask = {n: mask[n].to(p.device) for n, p in kept.named_parameters()}
        for name, p in parameters.items():
            p.requires_grad_(trainable[name] and bool(mask[name].any()))
    moving = {n: p for n, p in parameters.items() if p.requires_grad}
    if not moving:
        raise SettingError("no weight may move: train= and the model together freeze them all")
    settings = {
        "epochs": epochs, "lr": lr, "step": step, "momentum": momentum, "norm": norm,
        "weight_decay": weight_decay, "clip": clip, "accumulate": accumulate,
        "mask": None if mask is None else hash_tensors(mask), "turns": list(turns),
    } | ({} if smooth == "none" else {"smooth": smooth})  # fmt: skip
    # the scaler of fp16 looks for the gradients of the optimiser's own tensors before it steps
    wide = moving if runtime.precision == "fp16" else wide_copies(moving)
    # of a sharded model only whole tensors are barred, and those ask for no gradient
    barred = None if mask is None or spread else {n: ~mask[n] for n in moving}
    # without a gradient or decay an optimiser leaves a coordinate as it is, to the bit
    decays = barred is not None and weight_decay > 0
    frozen_values = {n: p.detach().clone() for n, p in wide.items()} if decays else {}
    rates = tuple(turns) or (lr,)
    optimizers = [
        make_optimizer(
            step,
            wide.values(),
            lr=r,
            momentum=momentum,
            weight_decay=weight_decay,
            # the fused step of SGD does not know spread tensors
            fused=runtime.precision != "fp16" and not (spread and step == "sgd"),
        )
        for r in rates
    ]
    optimizer = Turns(optimizers) if turns else optimizers[0]
    if any(wide[n] is not p for n, p in moving.items()):
        optimizer = Master(optimizer, moving, wide)
    result = Fit()
    keeper = Checkpoints(
        runtime, stage, model, optimizer, result, settings, list(wide.values()) if spread else ()
    )
    first_epoch, skip = keeper.restore()
    kind, numbers = parse_smooth(smooth)
    smoother = average = None
    if kind == "swa":
        average = Average(numbers, model, moving, wide, result.average)
    elif numbers and numbers[0] > 0:
        smoother = Smoother(
            kind, numbers, model, moving, wide, barred,
            runtime=runtime, accumulate=accumulate, stage=stage,
        )  # fmt: skip

    how = recomputed(model, runtime)
    with how, _accelerated(runtime) as accelerator, runtime.task(stage, epochs) as task:
        if runtime.processes > 1 and norm != "frozen" and norm_layers(model):
            raise NeedsError(
                "batch statistics cannot be shared between processes; use norm=frozen with several processes"
            )
        forward = {k: v for k, v in vars(model).items() if k == "forward"}
        # for its precision alone: gradients are shared below
        wrapped = accelerator.prepare_model(model, evaluation_mode=True)
        prepared = accelerator.prepare_optimizer(optimizer)
        if smoother is not None:
            smoother.backward = accelerator.backward
        task.advance(first_epoch)
        for epoch in range(first_epoch, epochs):
            train_mode(model, norm)
            micro = 0
            optimizer.zero_grad(set_to_none=True)
            if smoother is not None:
                smoother.begin()
            keeper.begin()
            # where to fall back to, once these weights have given a finite loss
            start = None if skip else _copy(movable(model))
            for index, (loss_of, batch) in enumerate(passes(epoch)):
                keeper.saw(batch)
                if index < skip:
                    if index + 1 == skip:  # before the next batch is read: reading may be random
                        keeper.resume()
                    continue
                lone = norm == "train" and _smallest(batch) == 1
                if lone:  # one sample has no variance: it is normalised as at inference
                    train_mode(model, "frozen")
                loss = torch.zeros((), device=runtime.device)
                if smoother:
                    loss = smoother.loss(loss_of, batch)
                else:
                    for part in parts_of(loss_of):  # what one holds is let go before the next
                        value_of = part(wrapped, batch)
                        loss = loss + value_of.detach()
                        if value_of.requires_grad:
                            accelerator.backward(value_of / accumulate)
                if lone:
                    train_mode(model, norm)
                value = float(runtime.sum(loss.detach().clone())) / runtime.processes
                result.stopped = _why_stop(value, result.steps, stop, runtime, keeper.elapsed())
                if not math.isfinite(value):
                    model.load_state_dict(keeper.sound or start or {}, strict=False)
                    result.average.clear()
                if result.stopped:
                    break
                if start is not None:
                    keeper.sound, start = start, None
                if smoother:
                    smoother.take()
                runtime.cost.gradients += samples_in(batch)
                micro += 1
                if micro % accumulate:
                    continue
                if smoother:
                    value = smoother.finish(result.steps)
                elif not spread:
                    share_gradients(moving.values(), runtime)
                if barred is not None:
                    _mask_gradients(moving, barred)
                if clip is not None:  # the norm is that of the coordinates that move
                    accelerator.clip_grad_norm_(moving.values(), clip)
                factor = schedule(epoch) * pace(result.steps)
                for one, rate in zip(optimizers, rates, strict=True):
                    for group in one.param_groups:
                        group["lr"] = rate * factor
                prepared.step()
                prepared.zero_grad(set_to_none=True)
                if barred is not None and decays:
                    _restore(wide, barred, frozen_values, optimizers)
                    write_back(moving, wide)
                result.steps += 1
                if average is not None:
                    average.take(result.steps)
                if result.steps % every == 1 or every == 1:
                    result.curve.append({
                        "step": result.steps,
                        "epoch": epoch,
                        "loss": value,
                        "lr": rates[(result.steps - 1) % len(rates)] * factor,
                    })
                keeper.maybe_save(epoch, index + 1)
            skip = 0
            if snapshots is True or (snapshots and epoch + 1 in snapshots):
                with contextlib.nullcontext() if average is None else average.shown():
                    result.snapshots.append(
                        _copy({k: whole(v) for k, v in model.state_dict().items()})
                    )
            task.advance()
            if result.stopped:
                runtime.reporter.say(f"{stage} stopped: {result.stopped}")
                break
        for name in ("forward", "_original_forward"):  # mixed precision wraps the forward
            vars(model).pop(name, None)
        vars(model).update(forward)
    if average is not None:
        average.put()
    optimizer.zero_grad(set_to_none=True)  # of batches that made no step
    if keeper.sound is not None and not _finite(moving, runtime, spread):
        model.load_state_dict(keeper.sound, strict=False)
        result.stopped = f"weights were no longer finite after step {result.steps}; {_PUT_BACK}"
    if spread:
        copy_back(model, kept)
    for name, p in kept.named_parameters():
        p.requires_grad_(trainable[name])
    kept.eval()
    return result


_PUT_BACK = "the last weights with a finite loss at the start of an epoch were put back"


class _Plain:
    """An Accelerator with nothing to do, which saves its look for other packages at every step."""

    @staticmethod
    def prepare_model(model: nn.Module, evaluation_mode: bool) -> nn.Module:
        return model

    @staticmethod
    def prepare_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return optimizer

    backward = staticmethod(Tensor.backward)
    clip_grad_norm_ = staticmethod(nn.utils.clip_grad_norm_)


@contextlib.contextmanager
def _accelerated(runtime: Runtime) -> Iterator[Any]:
    """Give an Accelerator for this device and precision, whatever the process asked for before.

    Accelerate keeps the first choice for the life of a process; it is put back afterwards, since
    somebody else's Accelerator may rest on it.
    """
    plain = runtime.processes == 1 and runtime.precision == "no"
    if runtime.alone or runtime.sharded or plain:
        yield _Plain  # a sharded model has a precision of its own and shares its gradients itself
        return
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    single = not PartialState._shared_state.get("num_processes", 1) > 1 and runtime.processes == 1
    states = (AcceleratorState, PartialState) if single else (AcceleratorState,)
    kept = [dict(state._shared_state) for state in states]
    for state in states:
        state._shared_state.clear()
    try:
        yield Accelerator(
            cpu=runtime.device == "cpu",
            mixed_precision=runtime.precision,
            device_placement=":" not in runtime.device,  # a numbered device is the caller's choice
        )
    finally:
        if single:
            for state, values in zip(states, kept, strict=True):
                state._shared_state.clear()
                state._shared_state.update(values)


def _finite(moving: dict[str, nn.Parameter], runtime: Runtime, spread: bool) -> bool:
    """Whether all weights are finite; of spread ones each process looks at its part."""
    broken = not all(bool(local(p.detach()).isfinite().all()) for p in moving.values())
    if not spread:
        return not broken
    return not bool(runtime.sum(torch.tensor(float(broken), device=runtime.device)))


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items()}


class Together(tuple[Batch, ...]):
    """Batches that a loss joins into one forward pass, so that their statistics are shared."""


def _smallest(batch: Any) -> int:
    """Rows of the smallest forward pass over a batch, or over each of several."""
    if isinstance(batch, (Batch, Together)):
        return samples_in(batch)
    return min(map(_smallest, batch), default=0)


def _why_stop(
    value: float, steps: int, stop: Callable[[float], str | None], runtime: Runtime, seconds: float
) -> str | None:
    if not math.isfinite(value):
        return f"the loss was {value} after step {steps}; {_PUT_BACK}"
    budget = runtime.budget
    if budget.steps is not None and steps >= budget.steps:
        return f"budget of {budget.steps} steps used"
    if budget.seconds is not None:
        # clocks differ; processes have to stop at the same step
        shared = runtime.sum(torch.tensor(seconds, device=runtime.device)) / runtime.processes
        if float(shared) >= budget.seconds:
            return f"budget of {budget.seconds} s used"
    return stop(value)


def _mask_gradients(moving: dict[str, nn.Parameter], barred: Mask) -> None:
    for name, p in moving.items():
        if p.grad is not None:
            p.grad.masked_fill_(barred[name], 0.0)  # a product would keep NaN


@torch.no_grad()
def _restore(
    moving: dict[str, nn.Parameter],
    barred: Mask,
    values: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Undo what weight decay did to frozen coordinates, and forget what momentum it built up."""
    for name, p in moving.items():
        p.copy_(torch.where(barred[name], values[name], p))
        for state in (s for one in optimizers for s in one.state.get(p, {}).values()):
            if isinstance(state, Tensor) and state.shape == p.shape:
                state.masked_fill_(barred[name], 0.0)

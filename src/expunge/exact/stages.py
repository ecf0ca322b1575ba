"""One stage of a chain: what it trains, what is stored of it, and the model that stored stages make.

A stage starts from the stored tensors of the stages before it, never from what is still in memory, with an
optimiser of its own and seeds that depend on the shard and the prefix alone. So an interrupted training
goes on to the same bits, and chains that share a prefix share its stages.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import ExpungeError, ModelError
from expunge.core.problem import Problem
from expunge.core.runtime import Budget, Runtime, Silent, random_restored
from expunge.core.view import Source
from expunge.exact import adapters
from expunge.exact.settings import WHOLE, Settings
from expunge.exact.slots import Slots
from expunge.train.fit import Pass, fit
from expunge.train.method import cosine

Tensors = Mapping[str, Tensor]
_ADAPTER, _HEAD, _MODEL = "adapter/", "head/", "model/"


def assemble(
    base: nn.Module, settings: Settings, slots: Slots, stages: Sequence[Tensors]
) -> nn.Module:
    """A copy of the base with stored stages on it, first to last; none gives the base.

    Raises:
        ModelError: a stage does not fit the base.
    """
    model = copy.deepcopy(base)
    if settings.adapter == WHOLE:
        if stages:
            _put(model, _part(stages[-1], _MODEL), strict=True)
        return model
    adapter = adapters.by_name(settings.adapter)
    for k, tensors in enumerate(stages):
        adapters.load(model, adapter, slots.modules[k], group(k), _part(tensors, _ADAPTER))
        if slots.head:  # stage by stage: a sparse map knows the weights it was learned on
            _put(model, _part(tensors, _HEAD), strict=False)
    return model


def served(
    base: nn.Module, settings: Settings, slots: Slots, stages: Sequence[Tensors]
) -> nn.Module:
    """The plain model of some stages, in eval mode; weights they leave alone are the base's own tensors."""
    model = assemble(base, settings, slots, stages)
    if settings.adapter != WHOLE:
        model = adapters.merged(model)
        # both names of a weight that two modules share, so that they go on sharing it
        mine = dict(base.named_parameters(remove_duplicate=False))
        own = dict(model.named_parameters(remove_duplicate=False))
        # by identity: a module or a weight of the head may have further names
        moved = {id(model.get_submodule(n)) for k in range(len(stages)) for n in slots.modules[k]}
        head = {id(own[n]) for n in slots.head}
        for name, parameter in own.items():
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            if id(module) not in moved and id(parameter) not in head:
                module._parameters[last] = mine[name]
    return model.requires_grad_(False).eval()


def group(k: int) -> str:
    """Name of the adapters of stage k, counted from 0."""
    return f"slice-{k}"


def train_stage(
    base: nn.Module,
    problem: Problem,
    settings: Settings,
    slots: Slots,
    before: Sequence[Tensors],
    ids: Tensor,
    seed: int,
    runtime: Runtime,
    name: str,
) -> tuple[dict[str, Tensor], nn.Module]:
    """Train one stage.

    Args:
        base: what everything starts from; not changed.
        problem: gives the data and the loss.
        settings: of the training.
        slots: where its adapters sit.
        before: stored tensors of the stages before, first to last.
        ids: samples it learns.
        seed: of initialisation, batches and dropout.
        runtime: device, precision, checkpoints within the stage.
        name: of those checkpoints.

    Returns:
        What is stored of the stage, and the model on the CPU.

    Raises:
        ExpungeError: the training did not run to its end.
    """
    # a limit in seconds would end where the clock says, and other trainings' progress is not this one's
    inner = replace(
        runtime, seed=seed, threads=settings.threads, alone=True, budget=Budget(), reporter=Silent()
    )
    model = assemble(base, settings, slots, before)
    if settings.adapter == WHOLE:
        model.requires_grad_(True)
    else:
        k = len(before)
        adapters.by_name(settings.adapter).attach(
            model, slots.modules[k], group(k), inner.seed_for("adapter")
        )
        adapters.train_only(model, group(k), slots.head)
    model = model.to(inner.device)
    source = Source(problem.train, ids, True, inner)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return batch.mean(problem.each_loss(model, batch))

    def passes(epoch: int) -> Pass:
        order = source.batches(settings.batch_size, inner.generator("batches", epoch))
        return ((loss, batch) for batch in order)

    with random_restored(), inner.own_threads():
        inner.seed_everything("stage")
        result = fit(
            model,
            passes,
            runtime=inner,
            epochs=settings.epochs,
            lr=settings.lr,
            step=settings.step,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            schedule=lambda e: cosine(e, settings.epochs) if settings.schedule == "cosine" else 1.0,
            clip=settings.clip,
            norm=settings.norm,
            stage=name,
        )
    if result.stopped:
        raise ExpungeError(f"a stage of the sharded training stopped: {result.stopped}")
    model = model.cpu().eval()
    return stored(model, settings, slots, len(before)), model


def stored(model: nn.Module, settings: Settings, slots: Slots, k: int) -> dict[str, Tensor]:
    """What is kept of stage k (from 0) of a trained model, by name."""
    if settings.adapter == WHOLE:
        kept = {_MODEL + n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    else:
        named = dict(model.named_parameters())
        kept = {_ADAPTER + n: t for n, t in adapters.state(model, group(k)).items()}
        kept |= {_HEAD + n: named[n] for n in slots.head}
    return {n: t.detach().cpu().contiguous().clone() for n, t in kept.items()}


@torch.no_grad()
def score(problem: Problem, model: nn.Module, batch_size: int = 256) -> list[float]:
    """Score on the validation data, larger is better: accuracy (of a classifier), then −mean loss.

    Empty without validation data.
    """
    if problem.valid is None:
        return []
    right = total = 0.0
    for batch in problem.valid.batches(batch_size):
        if problem.kind == "classification":
            logits, each = problem.logits_and_loss(model, batch)
            assert batch.y is not None
            right += float(logits.argmax(1).eq(batch.y).sum())
        else:
            each = problem.each_loss(model, batch)
        total += float(each.sum())
    count = len(problem.valid)
    return [*([right / count] if problem.kind == "classification" else []), -total / count]


def _part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _put(model: nn.Module, tensors: Tensors, strict: bool) -> None:
    try:
        model.load_state_dict(dict(tensors), strict=strict)
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise ModelError(f"a stage does not fit the backbone: {line}") from error

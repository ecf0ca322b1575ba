"""Checkpoints of one training: written every so often, brought back to the same bits."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.core.data import Batch
from expunge.core.errors import UserError
from expunge.core.hashing import content_key, hash_tensors
from expunge.core.runtime import Runtime
from expunge.train.shard import local, spread, spread_state

if TYPE_CHECKING:
    from expunge.train.fit import Fit


def movable(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model's state that training can change: all but frozen parameters."""
    return {
        name: value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if not isinstance(value, nn.Parameter) or value.requires_grad
    }


class Checkpoints:
    """Writes the state of a training every so often and brings it back to the same bits."""

    def __init__(
        self,
        runtime: Runtime,
        stage: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        result: Fit,
        settings: Mapping[str, Any],
        sharded: Sequence[Tensor] = (),
    ) -> None:
        """Keep what is to be written.

        Args:
            runtime: says where and how often, or that there are none.
            stage: name of the file.
            model: the model, with its weights from before the training.
            optimizer: its optimiser.
            result: curve, steps and snapshots so far.
            settings: what, with the seed and the first weights, tells one training from another.
            sharded: what the optimiser moves, where it is spread over processes: each then writes a
                file of its part.
        """
        self._runtime, self._model, self._optimizer, self._result = (
            runtime,
            model,
            optimizer,
            result,
        )
        self._sharded = list(sharded)
        part = f"-{runtime.rank}-of-{runtime.processes}" if sharded else ""
        self._path: Path | None = (
            None if runtime.checkpoint is None else runtime.checkpoint / f"{stage}{part}.pt"
        )
        self._identity = ""
        if self._path is not None:
            first = local({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})
            self._identity = content_key([stage, settings, runtime.seed, hash_tensors(first)])
        self._state: dict[str, Any] | None = None
        self._seen = hashlib.sha256()
        self._start, self._worked = time.monotonic(), time.process_time()
        self.sound: dict[str, Tensor] | None = None

    def elapsed(self) -> float:
        """Seconds of training so far, those before a resumption included."""
        return time.monotonic() - self._start

    def restore(self) -> tuple[int, int]:
        """Load the checkpoint, if there is one, and return where to go on (epoch, batch in it).

        Raises:
            UserError: the checkpoint was written by a training with other settings or weights, or the
                parts of a sharded one are not of the same step.
        """
        if self._path is None:
            return 0, 0
        state = None
        if self._path.exists():
            state = torch.load(self._path, weights_only=True, map_location=self._runtime.device)
        if self._sharded:
            self._require_one_step(0 if state is None else state["steps"])
        if state is None:
            return 0, 0
        self._require(state["identity"] == self._identity)
        if self._sharded:
            like = self._model.state_dict()
            state["model"] = spread(state["model"], like)
            state["sound"] = None if state["sound"] is None else spread(state["sound"], like)
            state["optimizer"] = spread_state(state["optimizer"], self._sharded)
        self._model.load_state_dict(state["model"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
        self._result.curve = state["curve"]
        self._result.steps = state["steps"]
        self._result.snapshots = state["snapshots"]
        self._result.average.update(state.get("average", {}))
        self.sound = state["sound"]
        self._start -= state["seconds"]
        self._worked -= state["processor"]
        self._runtime.cost.seconds += state["seconds"]  # `metered` adds what this process takes
        self._runtime.cost.processor += state["processor"]
        self._state = state
        return state["epoch"], state["index"]

    def begin(self) -> None:
        """Start an epoch."""
        self._seen = hashlib.sha256()

    def saw(self, batch: Any) -> None:
        """Note which samples a batch holds: a training goes on only with the same ones."""
        if self._path is None:
            return
        if isinstance(batch, Batch):
            self._seen.update(batch.ids.cpu().numpy().tobytes() + b"|")
        elif isinstance(batch, (list, tuple)):
            for part in batch:
                self.saw(part)

    def resume(self) -> None:
        """After the last batch to skip: put random state and counters back to the checkpoint's.

        Raises:
            UserError: the batches skipped were not those the checkpoint had seen.
        """
        assert self._state is not None
        state, self._state = self._state, None
        # other processes hold other shares than the one that wrote the file
        own = self._runtime.is_main or bool(self._sharded)
        self._require(not own or state["seen"] == self._seen.hexdigest())
        torch.set_rng_state(state["random"].cpu())
        if state["random_device"] is not None:
            torch.cuda.set_rng_state(state["random_device"].cpu(), self._runtime.device)
        self._runtime.cost.samples = state["samples"]
        self._runtime.cost.gradients = state["gradients"]

    def maybe_save(self, epoch: int, index: int) -> None:
        """Write a checkpoint if it is time; `index` batches of `epoch` are done."""
        if self._path is None or self._result.steps % self._runtime.checkpoint_every:
            return
        if not self._runtime.is_main and not self._sharded:
            return
        device = self._runtime.device
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")  # another process may do the same
        torch.save(
            {
                "identity": self._identity,
                "seen": self._seen.hexdigest(),
                "model": local(movable(self._model)),
                "sound": local(self.sound),
                "optimizer": local(self._optimizer.state_dict()),
                "curve": self._result.curve,
                "steps": self._result.steps,
                "snapshots": self._result.snapshots,
                "average": self._result.average,
                "random": torch.get_rng_state(),
                "random_device": torch.cuda.get_rng_state(device) if "cuda" in device else None,
                "seconds": self.elapsed(),
                "processor": (time.process_time() - self._worked) * (device == "cpu"),
                "samples": self._runtime.cost.samples,
                "gradients": self._runtime.cost.gradients,
                "epoch": epoch,
                "index": index,
            },
            temporary,
        )
        temporary.replace(self._path)

    def _require_one_step(self, own: int) -> None:
        """Refuse parts of different steps: a run may have ended while its processes wrote theirs."""
        steps = torch.zeros(self._runtime.processes, device=self._runtime.device)
        steps[self._runtime.rank] = own
        found = self._runtime.sum(steps).int().tolist()
        if len(set(found)) > 1:
            raise UserError(
                f"{self._path} and the other processes' parts are of different steps "
                f"({', '.join(map(str, found))}; 0 is none); delete them or choose another folder"
            )

    def _require(self, same: bool) -> None:
        if not same:
            raise UserError(
                f"{self._path} belongs to another training; delete it or choose another folder"
            )

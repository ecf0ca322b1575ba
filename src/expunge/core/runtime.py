"""Runtime: where and how work happens — device, processes, seeds, progress, budget, checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import random
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from expunge.core.errors import SettingError
from expunge.core.outcome import Cost

PRECISIONS = ("no", "bf16", "fp16")


class Reporter(Protocol):
    """Where progress goes."""

    def start(self, task: str, total: int | None) -> None:
        """Begin a task of `total` steps."""

    def advance(self, task: str, steps: int = 1) -> None:
        """Count steps of a task as done."""

    def finish(self, task: str) -> None:
        """End a task."""

    def say(self, text: str) -> None:
        """Report one line."""


class Silent:
    """A reporter that says nothing; the default in library use."""

    def start(self, task: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, task: str, steps: int = 1) -> None:
        """Ignore."""

    def finish(self, task: str) -> None:
        """Ignore."""

    def say(self, text: str) -> None:
        """Ignore."""


class JsonLines:
    """One JSON object a line on standard error, at most one a second for each task."""

    def __init__(self) -> None:
        """Start with no tasks."""
        self._tasks: dict[str, list[Any]] = {}

    def _emit(self, **event: Any) -> None:
        print(json.dumps({"time": round(time.time(), 3), **event}), file=sys.stderr, flush=True)

    def start(self, task: str, total: int | None) -> None:
        """Emit the beginning of a task."""
        self._tasks[task] = [0, total, time.monotonic()]
        self._emit(event="start", task=task, total=total)

    def advance(self, task: str, steps: int = 1) -> None:
        """Count, and emit if the last line is a second old."""
        state = self._tasks.setdefault(task, [0, None, 0.0])
        state[0] += steps
        if time.monotonic() - state[2] >= 1.0:
            state[2] = time.monotonic()
            self._emit(event="progress", task=task, done=state[0], total=state[1])

    def finish(self, task: str) -> None:
        """Emit the end of a task."""
        done = self._tasks.pop(task, [0])[0]
        self._emit(event="finish", task=task, done=done)

    def say(self, text: str) -> None:
        """Emit one message."""
        self._emit(event="message", text=text)


@dataclass
class Budget:
    """Limits on one run; None is unlimited."""

    seconds: float | None = None
    steps: int | None = None


@dataclass
class Runtime:
    """Everything ambient that a method or audit may use.

    Attributes:
        device: where tensors live: `"cpu"`, `"cuda"`, …
        seed: the run's seed; each stage derives its own from it and its name.
        precision: `"no"`, `"bf16"` or `"fp16"` for mixed precision in training.
        threads: intra-op threads; fixed because results depend on it in the last bits.
        chunk: samples whose gradients are held at a time where each sample's is needed: fewer take
            less memory and more time. None fits them into a quarter of a GiB, 64 at most.
        budget: limits on training loops.
        reporter: where progress goes.
        checkpoint: folder for training checkpoints, or None.
        checkpoint_every: optimiser steps between two checkpoints.
        alone: do not share work with other processes: each does all of it, with the same result.
        shard: spread a model in training over the processes, in place of a copy in each.
        gradient_checkpointing: compute activations anew in the backward pass in place of keeping
            them: about a third more time for much less memory. For transformers models.
        engine: how several trainings of one recipe are run: `one-by-one`, `together`, `processes` or
            `ray` (see `expunge.fleet.executors`). None leaves it to each place. The models are the
            same, up to rounding, and so are the keys they are kept under.
        cost: counters of the run in progress.
    """

    device: str = "cpu"
    seed: int = 0
    precision: str = "no"
    threads: int | None = None
    chunk: int | None = None
    budget: Budget = field(default_factory=Budget)
    reporter: Reporter = field(default_factory=Silent)
    checkpoint: Path | None = None
    checkpoint_every: int = 50
    alone: bool = False
    shard: bool = False
    gradient_checkpointing: bool = False
    engine: str | None = None
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        """Check the chunk; raises `SettingError` below 1."""
        if self.chunk is not None and self.chunk < 1:
            raise SettingError(f"chunk must be at least 1 sample, not {self.chunk}")

    @property
    def processes(self) -> int:
        """Number of cooperating processes."""
        return 1 if self.alone or not _distributed() else torch.distributed.get_world_size()

    @property
    def sharded(self) -> bool:
        """Whether a model in training is spread over several processes."""
        return self.shard and self.processes > 1

    @property
    def rank(self) -> int:
        """This process' number, from 0."""
        return 0 if self.alone or not _distributed() else torch.distributed.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place."""
        if self.processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def share(self, items: torch.Tensor) -> torch.Tensor:
        """This process' share of a batch's items."""
        return items[self.rank :: self.processes] if self.processes > 1 else items

    def seed_for(self, *stage: str | int) -> int:
        """A seed for one stage: a hash of the run's seed and the stage's name."""
        text = "/".join(map(str, (self.seed, *stage)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    def generator(self, *stage: str | int) -> torch.Generator:
        """A random generator (CPU) that depends on the run's seed and the stage only."""
        return torch.Generator().manual_seed(self.seed_for(*stage))

    def seed_everything(self, *stage: str | int) -> None:
        """Seed Python, NumPy and torch for one stage, for code that draws from global state."""
        seed = self.seed_for(*stage)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (third-party recipes draw from it)
        torch.manual_seed(seed)

    @contextlib.contextmanager
    def task(self, name: str, total: int | None = None) -> Iterator[_Task]:
        """Report progress of a piece of work."""
        if self.is_main:
            self.reporter.start(name, total)
        try:
            yield _Task(self, name)
        finally:
            if self.is_main:
                self.reporter.finish(name)

    @contextlib.contextmanager
    def own_threads(self) -> Iterator[None]:
        """Use this runtime's number of torch threads for the enclosed work, if it has one."""
        before = torch.get_num_threads()
        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextlib.contextmanager
    def metered(self) -> Iterator[Cost]:
        """Count seconds, memory, samples and gradients of the enclosed work into a fresh `Cost`."""
        outer, self.cost = self.cost, Cost()
        inner = self.cost
        held = 0
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            held = torch.cuda.memory_allocated(self.device)
        start, worked, memory = time.perf_counter(), time.process_time(), _PeakMemory()
        try:
            with memory, self.own_threads():
                yield inner
        finally:
            inner.seconds += time.perf_counter() - start
            if self.device == "cpu":
                inner.processor += time.process_time() - worked
            grown = memory.growth
            if self.device.startswith("cuda"):
                grown = torch.cuda.max_memory_allocated(self.device) - held
            # work metered within this one starts the device's count anew
            inner.peak_bytes = max(inner.peak_bytes, grown)
            outer.peak_bytes = max(outer.peak_bytes, inner.peak_bytes)
            self.cost = outer
            outer.samples += inner.samples
            outer.gradients += inner.gradients

    def describe(self) -> dict[str, Any]:
        """What a record keeps of the runtime."""
        return {
            "device": self.device,
            "precision": self.precision,
            "processes": self.processes,
            "threads": self.threads or torch.get_num_threads(),
            "seed": self.seed,
            **({} if self.chunk is None else {"chunk": self.chunk}),
            **({"shard": True} if self.shard else {}),
            **({"gradient_checkpointing": True} if self.gradient_checkpointing else {}),
            **({} if self.budget == Budget() else {"budget": asdict(self.budget)}),
        }


@dataclass
class _Task:
    runtime: Runtime
    name: str

    def advance(self, steps: int = 1) -> None:
        if self.runtime.is_main:
            self.runtime.reporter.advance(self.name, steps)


class _PeakMemory:
    """Growth of the resident set over a block, sampled every 10 ms."""

    def __init__(self) -> None:
        self._base = 0
        self._done = threading.Event()
        self.growth = 0

    def _resident(self) -> int:
        try:
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * mmap.PAGESIZE
        except OSError:  # not Linux: the process' lifetime peak is the best there is
            if sys.platform == "win32":
                return 0
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def _look(self) -> None:
        self.growth = max(self.growth, self._resident() - self._base)

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._look()

    def __enter__(self) -> _PeakMemory:
        self._base = self._resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()  # work shorter than the interval counts too


@contextlib.contextmanager
def random_restored() -> Iterator[None]:
    """Give Python's, NumPy's and torch's global generators, GPUs' included, back as they were."""
    kept = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])  # noqa: NPY002
        torch.random.set_rng_state(kept[2])
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

"""Several comparisons at once, each in a process of its own, into one store."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expunge.core.request import Request
from expunge.core.runtime import Reporter, Runtime
from expunge.store import Store
from expunge.suite.bench import Bench
from expunge.suite.compare import Comparison, compare


@dataclass(frozen=True)
class Case:
    """One comparison on a bundled problem, as plain values that travel between processes."""

    workload: str
    request: Mapping[str, Any]
    methods: Sequence[str]
    references: int = 2


class Forwarded:
    """A reporter that hands every event to a queue, under the name of its case."""

    def __init__(self, events: Any, case: str) -> None:
        """Keep the queue's end."""
        self._events, self._case = events, case

    def _send(self, what: str, task: str, *more: Any) -> None:
        self._events.put((what, f"{self._case} · {task}", *more))

    def start(self, task: str, total: int | None) -> None:
        """Forward the beginning of a task."""
        self._send("start", task, total)

    def advance(self, task: str, steps: int = 1) -> None:
        """Forward progress."""
        self._send("advance", task, steps)

    def finish(self, task: str) -> None:
        """Forward the end of a task."""
        self._send("finish", task)

    def say(self, text: str) -> None:
        """Forward a message."""
        self._send("say", text)


def compare_all(
    cases: Sequence[Case], folder: Path, runtime: Runtime, workers: int = 2
) -> list[Comparison]:
    """Run comparisons in parallel; the results are those of running them one after the other.

    Args:
        cases: what to compare.
        folder: of the store that all of them use.
        runtime: device, seed and threads of each process; its reporter gets everybody's progress.
        workers: processes at a time.

    Returns:
        One comparison a case, in their order.
    """
    context = multiprocessing.get_context("spawn")
    options = {"device": runtime.device, "seed": runtime.seed, "threads": runtime.threads}
    # threads beyond the cores wait for each other: ten times slower, not twice
    share = max(1, (os.cpu_count() or 1) // workers)
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(
            workers, context, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool,
    ):
        events = manager.Queue()
        futures = [pool.submit(_run, case, str(folder), options, events) for case in cases]
        while not all(f.done() for f in futures) or not events.empty():
            try:
                _pass_on(runtime.reporter, events.get(timeout=0.2))
            except queue.Empty:
                continue
        return [Comparison(f.result()) for f in futures]


def _pass_on(reporter: Reporter, event: Sequence[Any]) -> None:
    getattr(reporter, event[0])(*event[1:])


def _run(case: Case, folder: str, options: Mapping[str, Any], events: Any) -> dict[str, Any]:
    runtime = Runtime(**options, reporter=Forwarded(events, case.workload))
    bench = Bench(Store.open(folder), runtime)
    problem = bench.workload(case.workload)
    request = Request.from_dict(case.request)
    found = compare(problem, request, case.methods, references=case.references, bench=bench)
    return found.data

"""Worker processes beside a server or a command: started, started again when they die, stopped together."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

from expunge.service.logs import configure, logger

PATIENCE = 86_400.0
"""Seconds that a worker waits for a database that is away."""
LONGEST_PAUSE = 30.0


def run_worker(policy: str, requests: int, level: str, as_json: bool, patience: int) -> None:
    """Be a worker until a signal asks to stop.

    Args:
        policy: its file.
        requests: how many requests to plan at a time.
        level: of the log.
        as_json: whether the log is JSON lines.
        patience: seconds to let a running deletion end after SIGTERM.
    """
    import torch

    from expunge.service.service import Service
    from expunge.service.worker import Worker

    configure(level, as_json=as_json)
    torch.set_num_threads(1)  # results depend on it in the last bits
    service = Service(policy, patience=PATIENCE)
    worker = Worker(service, requests=requests)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.ask_to_stop())
    worker.start()
    if (parent := multiprocessing.parent_process()) is not None:  # nobody would stop an orphan
        threading.Thread(target=_outlive, args=(parent, worker.ask_to_stop), daemon=True).start()
    worker.run()
    worker.stop(patience)
    service.close()


def _outlive(parent: BaseProcess | Any, stop: Callable[[], None]) -> None:
    parent.join()
    stop()


class Workers:
    """Several worker processes of one policy."""

    def __init__(
        self, policy: str, count: int, *, requests: int = 4, level: str = "info", as_json: bool = True,
        patience: int = 10,
    ) -> None:  # fmt: skip
        """Start them; `stop` ends them."""
        self._arguments = (policy, requests, level, as_json, patience)
        self._context = multiprocessing.get_context("spawn")
        self._patience = patience
        self._stop = threading.Event()
        self._living: list[BaseProcess] = [self._start() for _ in range(count)]
        self._thread = threading.Thread(target=self._watch, name="workers", daemon=True)
        self._thread.start()

    def _start(self) -> BaseProcess:
        process = self._context.Process(target=run_worker, args=self._arguments)
        process.start()
        return process

    def _watch(self) -> None:
        pause = 1.0
        while not self._stop.wait(0.5):
            for place, process in enumerate(self._living):
                if process.is_alive() or self._stop.is_set():
                    continue
                logger().warning("worker died", code=process.exitcode, again_in=pause)
                if self._stop.wait(pause):
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
                self._living[place] = self._start()

    def stop(self) -> None:
        """Ask all to stop, and insist after their patience is over."""
        self._stop.set()
        self._thread.join(timeout=LONGEST_PAUSE + 5)
        for process in self._living:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + self._patience + 10
        for process in self._living:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

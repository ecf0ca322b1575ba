"""The engine `processes`: a pool of fresh processes on this machine, each with one thread."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor

from expunge.core.errors import ExpungeError, UserError
from expunge.core.outcome import Cost
from expunge.core.problem import Problem, Recipe
from expunge.core.runtime import Runtime
from expunge.fleet.executors import recipe_for
from expunge.fleet.jobs import Done, Job
from expunge.fleet.worker import train_packed, unpacked

AHEAD = 2
"""Jobs handed out for each worker, so that none waits and few results lie about."""


class Processes:
    """Trainings side by side, each on one thread unless the recipe says how many.

    Workers are started anew and import the recipe's module: it must be one that they can import,
    and a script that starts them needs `if __name__ == "__main__":`. The recipe travels once a
    worker. They end with the process that started them, however it ends.
    """

    name = "processes"

    def __init__(self, workers: int | None = None) -> None:
        """Choose how many; None takes one for each core this process may use."""
        self.workers = workers or cores()

    def run(self, problem: Problem, jobs: Sequence[Job], runtime: Runtime) -> Iterator[Done]:
        """See `Executor`.

        Raises:
            UserError: the recipe cannot be sent to other processes.
            ExpungeError: a training failed, or a worker was ended from outside.
        """
        packed = packed_recipe(recipe_for(problem))
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        waiting = iter(range(len(jobs)))
        running: dict[Future[tuple[bytes, Cost]], int] = {}
        workers = min(self.workers, len(jobs))
        if not workers:
            return
        pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(packed, stop))
        ended = False
        try:
            while True:
                while len(running) < AHEAD * workers and (index := next(waiting, None)) is not None:
                    job = jobs[index]
                    future = pool.submit(_train, job.keep.numpy(), job.seed, runtime.device)
                    running[future] = index
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    state, cost = future.result()
                    yield Done(running.pop(future), unpacked(problem, state), cost)
            ended = True
        except BrokenProcessPool as error:
            raise ExpungeError(
                "a worker process ended before its training did: it ran out of memory, or the script "
                'that starts it lacks `if __name__ == "__main__":` around its work'
            ) from error
        finally:
            if not ended:
                stop.set()  # nobody will take what they are training
            pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def packed_recipe(recipe: Recipe) -> bytes:
    """A recipe as bytes.

    Raises:
        UserError: it holds something that has no such form, such as a lambda.
    """
    try:
        return pickle.dumps(recipe)
    except Exception as error:  # whatever a class of the user raises
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"the recipe cannot be sent to other processes ({line}); define its functions at the top "
            "of a module, or use the engine one-by-one or together"
        ) from error


_recipe: Recipe | None = None
_packed = b""


def _start(packed: bytes, stop: Any) -> None:
    global _packed
    _packed = packed
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, args=(stop,), daemon=True).start()


def _end_with_parent(stop: Any) -> None:
    """End this worker when it is told to, or when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    while not stop.wait(0.5) and parent is not None and parent.is_alive():
        pass
    os._exit(1)


def _train(keep: Any, seed: int, device: str) -> tuple[bytes, Cost]:
    global _recipe, _packed
    if _recipe is None:
        try:
            _recipe = pickle.loads(_packed)  # from the process that started this one
        except Exception as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(
                f"a worker process cannot load the recipe ({line}); define it in a module that can be "
                "imported, or use the engine one-by-one or together"
            ) from None
        _packed = b""
    assert _recipe is not None
    kept: Tensor = torch.from_numpy(keep)
    return train_packed(_recipe, kept, seed, device)

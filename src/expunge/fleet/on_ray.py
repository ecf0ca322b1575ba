"""The engine `ray`: trainings as tasks of a Ray cluster, on this machine or on many."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from expunge.core.errors import ExpungeError, NeedsError, UserError
from expunge.core.problem import Problem
from expunge.core.runtime import Runtime
from expunge.fleet.executors import recipe_for
from expunge.fleet.jobs import Done, Job
from expunge.fleet.worker import train_packed, unpacked

AHEAD = 2
"""Tasks handed to the cluster for each of its cores."""


class OnRay:
    """One task a training, with one core each, and one GPU each where the runtime's device is one.

    A connection that is open is used and stays. Otherwise one is opened, to the address given, to
    `$RAY_ADDRESS`, or to a cluster that is started on this machine, and closed at the end. The
    machines of a cluster need the same version of expunge, and the recipe's module.
    """

    name = "ray"

    def __init__(self, address: str | None = None) -> None:
        """Remember where the cluster is: `auto`, `host:port`, `ray://host:10001`, or None.

        Raises:
            NeedsError: Ray is not installed.
        """
        _ray()
        self.address = address

    def run(self, problem: Problem, jobs: Sequence[Job], runtime: Runtime) -> Iterator[Done]:
        """See `Executor`.

        Raises:
            UserError: there is no cluster at the address, no GPU in it where one is asked for, or the
                recipe cannot be sent there.
            ExpungeError: a training failed.
        """
        recipe, ray = recipe_for(problem), _ray()
        own = not ray.is_initialized()
        if own:
            self._connect(ray)
        waiting = iter(range(len(jobs)))
        running: dict[Any, int] = {}
        try:
            try:
                sent = ray.put(recipe)
            except Exception as error:  # whatever a class of the user raises
                raise UserError(
                    f"the recipe cannot be sent to a Ray cluster ({_line(error)}); use the engine "
                    "one-by-one or together"
                ) from error
            gpu = runtime.device.startswith("cuda")
            if gpu and not ray.cluster_resources().get("GPU"):
                raise UserError(  # a task would wait for one for ever
                    f"device {runtime.device} is asked for, but no machine of the Ray cluster has a GPU; "
                    "join one to it (ray start --num-gpus=1) or use the device cpu"
                )
            task = ray.remote(num_cpus=1, num_gpus=int(gpu))(train_packed)
            device = "cuda" if gpu else runtime.device  # a task sees its own GPU alone
            most = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while True:
                while len(running) < most and (index := next(waiting, None)) is not None:
                    job = jobs[index]
                    running[task.remote(sent, job.keep, job.seed, device)] = index
                if not running:
                    return
                ready, _ = ray.wait(list(running), num_returns=1)
                for one in ready:
                    try:
                        state, cost = ray.get(one)
                    except Exception as error:
                        raise _plain(error) from error
                    yield Done(running.pop(one), unpacked(problem, state), cost)
        finally:
            for one in running:  # nobody will take them
                ray.cancel(one, force=True)
            if own:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        address = self.address or os.environ.get("RAY_ADDRESS")
        options = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address:
                ray.init(address=address, **options)
            else:
                with _same_modules():
                    ray.init(include_dashboard=False, **options)
        except Exception as error:  # Ray raises many kinds
            where = f"at {address}" if address else "on this machine"
            raise UserError(f"no Ray cluster {where} ({_line(error)})") from error


@contextlib.contextmanager
def _same_modules() -> Iterator[None]:
    """Let a cluster that is started meanwhile import what this process can."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _ray() -> Any:
    """Ray itself.

    Raises:
        NeedsError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise NeedsError(
            "the engine ray needs Ray, which is not installed; pip install 'expunge[ray]'"
        ) from error


def _plain(error: Exception) -> ExpungeError:
    """What a task raised: our own error as it was, any other in one line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ExpungeError):
        return cause
    return ExpungeError(f"a training on the Ray cluster failed: {_line(cause or error)}")


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

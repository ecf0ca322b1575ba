"""Method: hyper-parameters, needs, a card, and `run(view, runtime) -> Outcome`."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from expunge.core.errors import UnchangedError
from expunge.core.hashing import hash_model
from expunge.core.needs import Card, Needs
from expunge.core.outcome import Outcome, Weights
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.settings import Configured
from expunge.core.view import View


@dataclass(frozen=True)
class Method(Configured):
    """Base of every unlearning method: a frozen dataclass of its hyper-parameters.

    Attributes:
        name: kebab-case name on the command line.
        domain: kind of problem it is for (`"general"`: any with the declared needs).
        card: paper, intent, guarantee, fidelity and deviations.
        may_leave_unchanged: whether returning the original weights can be right.
        needs: what it touches; a property, since it may depend on the settings.
    """

    name: ClassVar[str]
    domain: ClassVar[str] = "general"
    card: ClassVar[Card]
    may_leave_unchanged: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """What this method touches, with these settings."""
        raise NotImplementedError

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Unlearn what the view's request covers and return the outcome."""
        raise NotImplementedError


PACKAGES = (
    "expunge",
    "torch",
    "numpy",
    "scikit-learn",
    "accelerate",
    "safetensors",
    "transformers",
)


def unlearn(
    problem: Problem,
    request: Request,
    method: Method,
    *,
    runtime: Runtime | None = None,
    passed: Mapping[str, Any] | None = None,
) -> Outcome:
    """Make a problem's model forget what a request covers.

    Checks everything that can be checked before any compute, runs the method on its View, and
    measures what it cost.

    Args:
        problem: the model and its data.
        request: what to forget.
        method: how; its settings are in the record as passed and as in force.
        runtime: device, seed, progress; the default is silent, on CPU, with seed 0.
        passed: settings the caller wrote, for the record.

    Returns:
        The outcome; its `record` can be saved and run again.

    Raises:
        UserError: the request, the data or the needs do not fit.
        UnchangedError: the weights came back as they were.
    """
    runtime = runtime or Runtime()
    problem.check()
    needs = method.needs
    needs.check(method.name, problem)
    view = View(problem, request, needs, runtime)
    runtime.seed_everything("run", method.name)
    with runtime.metered() as cost:
        outcome = method.run(view, runtime)
    if runtime.processes > 1:  # each counted its own share
        counted = torch.tensor([cost.samples, cost.gradients], device=runtime.device)
        cost.samples, cost.gradients = runtime.sum(counted).tolist()
    model = outcome.runnable().cpu().eval()
    trainable = {n: p.requires_grad for n, p in problem.model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
    outcome.model = model
    outcome.cost = cost
    if outcome.change is None:
        outcome.change = Weights.between(problem.model, model)
    if not outcome.change.tensors:
        outcome.details["unchanged"] = True
        if not method.may_leave_unchanged:
            raise UnchangedError(
                f"{method.name} returned the original weights; its settings have no effect here"
            )
    outcome.problem, outcome.request = problem, request
    outcome.record = record_of(problem, request, method, runtime, passed) | {
        "weights": hash_model(model),
        "forgotten": view.forget_count,
    }
    return outcome


def record_of(
    problem: Problem,
    request: Request,
    method: Method,
    runtime: Runtime,
    passed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a run's record holds before it has run: enough to run it again."""
    return {
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "problem": problem.name,
        "source": problem.source,
        "fingerprint": problem.fingerprint(),
        "request": request.to_dict(),
        "method": {
            "name": method.name,
            "class": f"{type(method).__module__}.{type(method).__qualname__}",
            "passed": dict(passed or {}),
            "in_force": method.in_force(),
        },
        "runtime": runtime.describe(),
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions

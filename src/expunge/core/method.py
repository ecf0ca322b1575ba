"""Method: hyper-parameters, needs, a card, and `run(view, runtime) -> Outcome`."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.core.errors import UnchangedError, UserError
from expunge.core.hashing import content_key, hash_model
from expunge.core.needs import Card, Needs
from expunge.core.outcome import Cost, Outcome, Weights
from expunge.core.problem import Problem
from expunge.core.pruned import clear_pruned
from expunge.core.request import Request
from expunge.core.runtime import Runtime, random_restored
from expunge.core.settings import Configured
from expunge.core.view import View


@dataclass(frozen=True)
class Method(Configured):
    """Base of every unlearning method: a frozen dataclass of its hyper-parameters.

    Attributes:
        name: kebab-case name on the command line.
        domain: kind of problem it is for (`"general"`: any with the declared needs).
        search: what tuning searches unless told otherwise: ranges or choices by setting (see
            `expunge.suite.space`), None for a range around the value; empty: every number.
        card: paper, intent, guarantee, fidelity and deviations.
        may_leave_unchanged: whether returning the original weights can be right.
        prepares: whether it has something to compute before any request is known: `never`,
            `optional` (`run` computes it itself without), or `always`.
        needs: what it touches; a property, since it may depend on the settings.
    """

    name: ClassVar[str]
    domain: ClassVar[str] = "general"
    search: ClassVar[Mapping[str, Any]] = {}
    card: ClassVar[Card]
    may_leave_unchanged: ClassVar[bool] = False
    prepares: ClassVar[Literal["never", "optional", "always"]] = "never"

    @property
    def needs(self) -> Needs:
        """What this method touches, with these settings."""
        raise NotImplementedError

    def check(self, problem: Problem, request: Request) -> None:
        """Complain before any work where these settings cannot answer this request.

        Args:
            problem: the model and its data.
            request: what to forget; a method for whole classes, say, looks at its form.

        Raises:
            UserError: a need is missing, and how to give it; or the request is not for it.
        """
        self.needs.check(self.name, problem)

    def preparation_settings(self) -> dict[str, Any]:
        """The settings that what is prepared depends on; all of them unless a method says less."""
        return self.in_force()

    def prepare(self, problem: Problem, runtime: Runtime) -> Mapping[str, Tensor]:
        """Compute what serves every later request, for methods that say `prepares`."""
        raise NotImplementedError

    def run(self, view: View, runtime: Runtime) -> Outcome:
        """Unlearn what the view's request covers and return the outcome.

        A method that `prepares` takes the result as a third argument, `prepared`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Prepared:
    """What a method computed before any request was known, and for what.

    Attributes:
        tensors: whatever the method needs, by name.
        key: content key of method, settings, problem and runtime it belongs to.
        cost: of the preparation.
    """

    tensors: Mapping[str, Tensor]
    key: str
    cost: Cost = field(default_factory=Cost)


def prepare(problem: Problem, method: Method, *, runtime: Runtime | None = None) -> Prepared:
    """Compute once what a method can use for every later request on a problem.

    Args:
        problem: the model and its data.
        method: a method that says `prepares`.
        runtime: device, progress, and the seed unless the method must prepare: that uses seed 0.

    Returns:
        The artefact, to be passed to `unlearn`.

    Raises:
        UserError: the method has nothing to prepare.
    """
    runtime = runtime or Runtime()
    if method.prepares == "never":
        raise UserError(f"{method.name} has nothing to prepare")
    problem.check()
    method.needs.check(method.name, problem)
    if method.prepares == "always":  # one preparation serves every seed
        runtime = replace(runtime, seed=0, cost=Cost())
    with random_restored(), runtime.metered() as cost:
        runtime.seed_everything("prepare", method.name)
        tensors = method.prepare(problem, runtime)
    return Prepared(tensors, prepared_key(problem, method, runtime), cost)


def prepared_key(problem: Problem, method: Method, runtime: Runtime) -> str:
    """Content key of a preparation: what was prepared for one problem does not fit another."""
    return content_key([
        "prepared",
        problem.fingerprint(),
        [method.name, f"{type(method).__module__}.{type(method).__qualname__}"],
        method.preparation_settings(),
        problem.recipe_key() if problem.recipe is not None else None,
        # what `run` could compute itself must equal it; what must be prepared serves every seed
        runtime.seed if method.prepares == "optional" else None,
    ])


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
    prepared: Prepared | None = None,
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
        prepared: what `prepare` returned; where a method must have it, it is computed if None, and
            its cost stands apart in `details["preparation"]`.

    Returns:
        The outcome; its `record` can be saved and run again.

    Raises:
        UserError: the request, the data or the needs do not fit.
        UnchangedError: the weights came back as they were.
    """
    runtime = runtime or Runtime()
    problem.check()
    needs = method.needs
    method.check(problem, request)
    view = View(problem, request, needs, runtime)
    if prepared is not None and prepared.key != prepared_key(problem, method, runtime):
        raise UserError(
            f"what was prepared does not belong to this model, data, seed and {method.name}'s "
            "settings; prepare again"
        )
    if prepared is None and method.prepares == "always":
        prepared = prepare(problem, method, runtime=runtime)
    extra = {} if prepared is None else {"prepared": prepared.tensors}
    with random_restored(), runtime.metered() as cost:
        runtime.seed_everything("run", method.name)
        outcome = method.run(view, runtime, **extra)
    if prepared is not None:
        outcome.details["preparation"] = asdict(prepared.cost) | {"key": prepared.key}
    if runtime.processes > 1:  # each counted its own share
        counted = torch.tensor([cost.samples, cost.gradients], device=runtime.device)
        cost.samples, cost.gradients = runtime.sum(counted).tolist()
    model = outcome.runnable().cpu().eval()
    for module in model.modules():
        if callable(check := getattr(module, "check_inside", None)):
            check()  # a wrapper that was made for other weights than are inside now
    trainable = {n: p.requires_grad for n, p in problem.model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
    if problem.kept is not None and clear_pruned(model, problem.kept):
        outcome.change = None  # what the method described still held pruned weights
    outcome.model = model
    outcome.cost = cost
    if outcome.change is None:
        outcome.change = Weights.between(problem.model, model)
    if not outcome.change.tensors:
        outcome.details["unchanged"] = True
        if not method.may_leave_unchanged:
            why = outcome.details.get("stopped", "its settings have no effect here")
            raise UnchangedError(f"{method.name} returned the original weights; {why}")
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

"""Common checks that every method and audit must pass, our own and other people's.

Each check is a function that raises `AssertionError` with a sentence; `check_method(MyMethod)`
runs them all on the digits (a regressor's on the diabetes data), driven by what the method declares.
The test table of this
project is made of the same functions.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from expunge.core.audit import Audit, Subject
from expunge.core.data import Batch, Data
from expunge.core.errors import AccessError, ExpungeError, Interrupted, NeedsError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.method import Method, Prepared, prepare, prepared_key, unlearn
from expunge.core.needs import Needs
from expunge.core.outcome import Cost, Delta, Outcome, load
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime, Silent
from expunge.problems.classification import Classification
from expunge.suite.probes import PROBES
from expunge.workloads import registry as workloads


@dataclass(frozen=True)
class Result:
    """One check: `pass`, `fail` with the reason, or `skip` where it does not apply."""

    name: str
    state: str
    note: str = ""


class _NotApplicable(Exception):
    """The method's declaration makes a check meaningless."""


REQUEST = Request(label=(3,))
REQUESTS = {
    "regression": Request(where="y > 2.321"),
    "causal-lm": Request(where="entity < 2"),
}
"""What is forgotten in the checks, by domain, where it is not the digit 3."""
WORKLOADS = {"regression": "diabetes-range", "causal-lm": "tinyfacts-quick"}
"""What the checks run on, by domain, where it is not the digits."""


def bench_problem() -> Classification:
    """The digits workload with its original, trained once."""
    return cast(Classification, problem_for("general"))


def bench_reference() -> torch.nn.Module:
    """A model retrained without the digits to forget."""
    return reference_for("general", 1001)


@functools.cache
def problem_for(domain: str) -> Problem:
    """The problem that methods and audits of a domain are checked on."""
    return workloads.get(WORKLOADS.get(domain, "digits-class")).problem(0)


def request_for(domain: str) -> Request:
    """What is to be forgotten there."""
    return REQUESTS.get(domain, REQUEST)


@functools.cache
def reference_for(domain: str, seed: int) -> torch.nn.Module:
    """A model retrained without it."""
    problem = problem_for(domain)
    assert problem.recipe is not None
    return problem.recipe(problem.train.without(request_for(domain).resolve(problem.train)), seed)


def run(method: Method, problem: Problem | None = None, **runtime: Any) -> Outcome:
    """Run a method on the workload for its kind of problem with one thread."""
    where = Runtime(seed=0, threads=1, **runtime)
    problem, request = problem or problem_for(method.domain), request_for(method.domain)
    return unlearn(problem, request, method, runtime=where, prepared=_ready(problem, method))


_prepared: dict[str, Prepared] = {}


def _ready(problem: Problem, method: Method) -> Prepared | None:
    """What a method must prepare, once for all checks: it may take minutes."""
    if method.prepares != "always":
        return None
    key = prepared_key(problem, method, Runtime())
    if key not in _prepared:
        _prepared[key] = prepare(problem, method, runtime=Runtime(threads=1))
    return _prepared[key]


# ---------------------------------------------------------------- methods


def declares_itself(method: Method) -> None:
    """Name, card, needs and every setting are there and documented."""
    assert method.name == method.name.lower() and " " not in method.name, (
        "the name must be kebab-case"
    )
    card = method.card
    assert card.title and card.authors and card.link and card.idea and card.year > 1900, (
        "the card has gaps"
    )
    assert card.fidelity == "faithful" or card.deviations, "a variant lists its deviations"
    assert isinstance(method.needs, Needs), "needs must be a Needs"
    for setting in type(method).describe_settings():
        assert setting["help"], f"setting {setting['name']} has no help"
    assert (type(method).__doc__ or "").strip(), "the class has no docstring"


def settings_make_it_again(method: Method) -> None:
    """The settings in force rebuild an equal method, so that records can be run again."""
    assert type(method).create(method.in_force()) == method, (
        "settings in force do not rebuild the method"
    )


def changes_weights(method: Method) -> None:
    """The released weights differ from the original, and are finite."""
    if method.may_leave_unchanged:
        raise _NotApplicable
    outcome = run(method)
    assert outcome.record["weights"] != problem_for(method.domain).model_hash(), (
        "the weights did not change"
    )
    finite = all(bool(torch.isfinite(p).all()) for p in outcome.runnable().parameters())
    assert finite, "the weights are not finite"


def leaves_the_problem_alone(method: Method) -> None:
    """The problem's own model is as before."""
    before = hash_model(problem_for(method.domain).model)
    run(method)
    assert hash_model(problem_for(method.domain).model) == before, "the original model was changed"


def repeats_with_the_seed(method: Method) -> None:
    """The same seed gives the same bits."""
    assert run(method).record["weights"] == run(method).record["weights"], "two runs differ"


def frozen_stays_frozen(method: Method) -> None:
    """With `train="last(1)"` everything but the last layer stays identical to the bit."""
    if "train" not in {f.name for f in dataclasses.fields(method)}:
        raise _NotApplicable
    decayed = {"weight_decay": 0.1} if hasattr(method, "weight_decay") else {}
    frozen = type(method).create({**method.in_force(), "train": "last(1)", **decayed})
    try:
        outcome = run(frozen)
    except SettingError as error:  # it has nothing to train in the last layer, and says so
        raise _NotApplicable from error
    problem = problem_for(method.domain)
    original, last = problem.model.state_dict(), problem.role("last layer")[0]
    released = outcome.runnable()
    inside = getattr(released, "unwrapped", released)  # a wrapper says what it is around
    for name, value in inside.state_dict().items():
        if not name.startswith(last + "."):
            assert torch.equal(value, original[name]), f"frozen tensor {name} moved"


def reads_only_what_it_declares(method: Method) -> None:
    """Undeclared labels make no difference, and the View refuses what is not declared."""
    problem, needs = problem_for(method.domain), method.needs
    forget = request_for(method.domain).resolve(problem.train)
    labels = problem.train.labels
    if labels is None:  # texts are their own labels
        raise _NotApplicable
    garbled = labels.clone()
    on_forget = torch.isin(problem.train.ids, forget)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(10, (len(labels),), generator=generator).to(labels.dtype)
    if not needs.labels_of("forget"):
        garbled = torch.where(on_forget, noise, garbled)
    if not needs.labels_of("retain"):
        garbled = torch.where(on_forget, garbled, noise)
    if torch.equal(garbled, labels) or needs.recipe:
        raise _NotApplicable
    batch = problem.train.fetch(problem.train.ids)
    other = copy.copy(problem)
    other._hashes = {}
    other.train = Data((batch.x, garbled), ids=problem.train.ids)
    request = Request(ids=tuple(forget.tolist()))
    try:
        true = unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1))
    except NeedsError as error:  # it takes classes by their names, not samples
        raise _NotApplicable from error
    blind = unlearn(other, request, method, runtime=Runtime(seed=0, threads=1))
    same = true.record["weights"] == blind.record["weights"]
    assert same, "labels it does not declare changed the result"


def needs_what_it_declares(method: Method) -> None:
    """Taking one declared need away makes the View refuse."""
    if method.needs.recipe or not (method.needs.forget or method.needs.retain):
        raise _NotApplicable
    missing: dict[str, Any] = {"forget": False} if method.needs.forget else {"retain": False}
    starved = type(
        "Starved",
        (type(method),),
        {"needs": property(lambda self: replace(method.needs, **missing))},
    )
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    try:
        run(starved(**values))
    except AccessError:
        return
    raise AssertionError(f"it declares {next(iter(missing))} data but runs without")


class _Stopper(Silent):
    """Stops a training in the middle, as a kill would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, task: str, steps: int = 1) -> None:
        self.left -= steps
        if self.left <= 0:
            raise Interrupted("stopped on purpose")


def resumes_to_the_same_bits(method: Method) -> None:
    """Stopped after its first epoch and resumed, it ends at the weights of an unbroken run."""
    if getattr(method, "epochs", 1) < 2:
        raise _NotApplicable
    whole = run(method)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"checkpoint": Path(folder), "checkpoint_every": 1}
        try:
            # resuming reports the skipped epochs as one step of 0, so the second one stops
            run(method, reporter=_Stopper(1), **options)
        except Interrupted:
            pass
        else:
            raise AssertionError("the training reported no progress, so it cannot be stopped")
        resumed = run(method, **options)
    assert whole.record["weights"] == resumed.record["weights"], "resuming changed the result"
    assert whole.cost.gradients == resumed.cost.gradients, "resuming changed the counted cost"


def change_goes_there_and_back(method: Method) -> None:
    """The change on the original gives the released model; a delta undone gives the original."""
    outcome, original = run(method), problem_for(method.domain).model
    assert outcome.change is not None
    if outcome.change.kind == "weights":
        again = outcome.change.apply(copy.deepcopy(original))
        assert hash_model(again) == outcome.record["weights"], "the change does not give the model"
        delta = Delta.between(original, outcome.runnable())
        there = delta.apply(copy.deepcopy(original))
        assert hash_model(there) == outcome.record["weights"], "the delta does not give the model"
        assert hash_model(delta.undo(there)) == hash_model(original), "the delta cannot be undone"
    with tempfile.TemporaryDirectory() as folder:
        loaded = load(outcome.save(folder), model=original)
        assert hash_model(loaded.runnable()) == outcome.record["weights"], (
            "saving and loading differs"
        )


def counts_its_cost(method: Method) -> None:
    """Seconds, samples and gradient evaluations are counted."""
    cost = run(method).cost
    assert cost.seconds > 0 and cost.samples > 0, "no cost was counted"
    assert cost.gradients > 0 or not (method.needs.per_sample_grad or hasattr(method, "lr")), (
        "no gradients"
    )


def moves_toward_the_reference(method: Method) -> None:
    """With tuned settings it is closer to the retrained model and keeps the rest."""
    problem, request = problem_for(method.domain), request_for(method.domain)
    probe, splits = PROBES[problem.kind], problem.split(request)
    tuned = type(method).create({**method.in_force(), **problem.tuned.get(method.name, {})})
    after = run(tuned).runnable()

    def batch_of(side: str, held_out: bool) -> Batch:
        data = problem.test if held_out else problem.train
        assert data is not None
        return data.fetch(splits[f"{side}-{'test' if held_out else 'train'}"])

    # what answers known inputs only is asked about those
    held_out = probe.held_out and not getattr(method, "known_inputs_only", False)
    forgotten, rest = batch_of("forget", held_out), batch_of("retain", probe.held_out)

    @torch.no_grad()
    def on_forgotten(model: torch.nn.Module) -> torch.Tensor:
        return probe.said(problem, model.eval(), forgotten)

    @torch.no_grad()
    def kept(model: torch.nn.Module) -> float:
        return probe.known(problem, model.eval(), rest)

    reference = reference_for(method.domain, 1001)
    wanted = on_forgotten(reference)
    before_gap = float((on_forgotten(problem.model) - wanted).abs().mean())
    after_gap = float((on_forgotten(after) - wanted).abs().mean())
    assert after_gap < before_gap, f"gap to retraining {before_gap:.4f} → {after_gap:.4f}"
    floor = kept(reference) - 0.10
    assert kept(after) >= floor, f"what is known of the rest fell to {kept(after):.3f}"


METHOD_CHECKS: tuple[Callable[[Method], None], ...] = (
    declares_itself,
    settings_make_it_again,
    changes_weights,
    leaves_the_problem_alone,
    repeats_with_the_seed,
    frozen_stays_frozen,
    reads_only_what_it_declares,
    needs_what_it_declares,
    resumes_to_the_same_bits,
    change_goes_there_and_back,
    counts_its_cost,
    moves_toward_the_reference,
)


def check_method(cls: type[Method], settings: Mapping[str, Any] | None = None) -> list[Result]:
    """Run every common check on a method class.

    Args:
        cls: the method.
        settings: settings for the checked runs where the defaults do not suit digits.

    Returns:
        One result a check.
    """
    tuned = problem_for(getattr(cls, "domain", "general")).tuned.get(getattr(cls, "name", ""), {})
    try:
        method = cls.create({**tuned, **(settings or {})})
    except (ExpungeError, TypeError, AttributeError) as error:
        return [Result("can be created", "fail", str(error))]
    return [_result(check, method) for check in METHOD_CHECKS]


# ---------------------------------------------------------------- audits


def audit_declares_itself(audit: Audit) -> None:
    """Name, card and needs are there."""
    assert audit.name == audit.name.lower() and " " not in audit.name, "the name must be kebab-case"
    assert audit.card.idea and audit.card.title, "the card has gaps"
    assert audit.card.intent == "measurement", "an audit's intent is measurement"
    assert isinstance(audit.needs, Needs), "needs must be a Needs"


@functools.cache
def _subjects(domain: str) -> tuple[Subject, Subject, Subject]:
    problem, request, runtime = problem_for(domain), request_for(domain), Runtime(threads=1)
    return (
        Subject(problem.model, problem, request, runtime),
        Subject(reference_for(domain, 1001), problem, request, runtime, cost=Cost(seconds=1.0)),
        Subject(reference_for(domain, 1002), problem, request, runtime, cost=Cost(seconds=1.0)),
    )


def findings_are_readable(audit: Audit) -> None:
    """Findings carry the audit's name, a value or a reason, and an interval around the value."""
    original, first, second = _subjects(audit.domain)
    findings = audit.run(original, [first, second], Runtime(threads=1))
    assert findings, "it found nothing, not even a reason"
    for f in findings:
        assert f.name.startswith(audit.name + "/"), f"{f.name} does not start with {audit.name}/"
        assert f.value is not None or f.reason, f"{f.name} has neither value nor reason"
        if f.value is not None and f.low is not None and f.high is not None:
            assert f.low <= f.value + 1e-9 and f.value <= f.high + 1e-9, (
                f"{f.name}: interval misses value"
            )


def without_references_it_says_so(audit: Audit) -> None:
    """Without references there is a value without a verdict, and the reason."""
    original, *_ = _subjects(audit.domain)
    for f in audit.run(original, [], Runtime(threads=1)):
        assert f.reference is None or f.direction != "reference", f"{f.name} invents a reference"
        if f.reference is None and f.direction == "reference":
            assert f.reason, f"{f.name} does not say why there is no reference"


def audit_repeats(audit: Audit) -> None:
    """Two runs give the same findings."""
    original, first, second = _subjects(audit.domain)

    def values() -> list[tuple[str, float | None]]:
        return [(f.name, f.value) for f in audit.run(original, [first, second], Runtime(threads=1))]

    assert values() == values(), "two runs differ"


def leaves_models_alone(audit: Audit) -> None:
    """Auditing changes no weight and leaves no hook behind."""
    original, first, second = _subjects(audit.domain)
    before = [hash_model(s.model) for s in (original, first, second)]
    audit.run(original, [first, second], Runtime(threads=1))
    assert before == [hash_model(s.model) for s in (original, first, second)], "a weight changed"
    hooks = [m for m in original.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks, "a hook was left behind"


AUDIT_CHECKS: tuple[Callable[[Audit], None], ...] = (
    audit_declares_itself,
    findings_are_readable,
    without_references_it_says_so,
    audit_repeats,
    leaves_models_alone,
)


def check_audit(cls: type[Audit]) -> list[Result]:
    """Run every common check on an audit class and return one result a check."""
    try:
        audit = cls()
    except (ExpungeError, TypeError) as error:
        return [Result("can be created", "fail", str(error))]
    return [_result(check, audit) for check in AUDIT_CHECKS]


def _result(check: Callable[[Any], None], subject: Any) -> Result:
    name = check.__name__.replace("_", " ")
    try:
        check(subject)
    except _NotApplicable:
        return Result(name, "skip", "does not apply to what it declares")
    except AssertionError as error:
        return Result(name, "fail", str(error))
    except Exception as error:  # somebody else's code may raise anything
        return Result(name, "fail", f"{type(error).__name__}: {error}")
    return Result(name, "pass")

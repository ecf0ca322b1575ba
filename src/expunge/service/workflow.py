"""Durable workflows: one carries a request to its plan, one carries out all planned requests of a model.

DBOS runs a step again when its process died before the result was written down. Every step here gives the
same result then: rows move only from the state they were in, claims stand under the workflow's name, and
files appear by a rename.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dbos import DBOS

from expunge.core.errors import ExpungeError, StoreError, UserError
from expunge.service import steps
from expunge.service.logs import logger
from expunge.service.requests import BATCH_FLOW, REQUEST_FLOW
from expunge.service.service import Recorded, Service

RECOVERIES = 1000
"""How often a workflow is taken up again after its process died, before it counts as failed."""

LONGEST_PAUSE = 10.0
"""Seconds between two looks for a key to sign with."""

_bound: list[Service] = []


def bind(service: Service) -> None:
    """Say which service the workflows of this process work for."""
    _bound[:] = [service]


def _service() -> Service:
    if not _bound:
        raise ExpungeError("no service is bound to the workflows")
    return _bound[0]


def _step(name: str, retries: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a step, again with growing pauses if it fails for another reason than the user's mistake."""
    options: Any = {
        "name": name,
        "retries_allowed": retries > 0,
        "max_attempts": retries + 1,
        "interval_seconds": 0.5,
        "backoff_rate": 2.0,
        # a version may be superseded, and gone, while it is read
        "should_retry": lambda error: (
            not isinstance(error, UserError) or isinstance(error, StoreError)
        ),
    }
    try:
        return DBOS.run_step(options, work, _service(), *arguments)
    except (UserError, Recorded):
        raise
    except Exception as error:
        inner = getattr(error, "errors", None)
        raise Recorded(_sentence(inner[-1] if inner else error)) from error


def _signed(name: str, work: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Run a step that needs a key to sign with; while there is none, look again now and then."""
    pause = _pauses()
    while (done := _step(name, 10, work, *arguments)).get("waits"):
        DBOS.sleep(next(pause))
    return dict(done)


def _pauses() -> Iterator[float]:
    """Seconds between two looks for a key: growing, but short enough for a worker to stop."""
    seconds = 1.0
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_PAUSE)


def _sentence(error: BaseException) -> str:
    return " ".join((str(error) if isinstance(error, ExpungeError) else f"{type(error).__name__}: {error}").split())[:500]  # fmt: skip


@DBOS.workflow(name=REQUEST_FLOW, max_recovery_attempts=RECOVERIES)
def request_flow(identifier: str) -> str:
    """Resolve and plan one request; it then waits for a batch, or for somebody's approval."""
    service = _service()
    row = service.get(identifier)
    try:
        retries = service.policy.model(row["model"]).retries
        pause = _pauses()
        while (found := _step("resolve", retries, steps.resolve, identifier)) is None:
            DBOS.sleep(next(pause))
        if found:
            _step("plan", retries, steps.plan, identifier)
    except (ExpungeError, Recorded) as error:
        why = _sentence(error)
        _step("fail", 10, steps.fail_request, identifier, why)
    return str(service.get(identifier)["state"])


@DBOS.workflow(name=BATCH_FLOW, max_recovery_attempts=RECOVERIES)
def batch_flow(batch: str) -> str:
    """Claim all ready requests of a model, delete once for all of them, audit, release."""
    claimed: dict[str, Any] = _signed("claim", steps.claim, batch)
    if not claimed["requests"]:
        return "empty"
    model, retries = claimed["model"], claimed["retries"]
    log = logger().bind(batch=batch, model=model)
    log.info("batch began", requests=len(claimed["requests"]))
    try:
        for how in ("policy", "retrain"):
            made = _step(f"forget-{how}", retries, steps.forget, batch, how)
            found = _step(f"audit-{how}", retries, steps.audit, batch, how)
            if not found["broken"]:
                result = _signed("release", steps.release, batch, how, made, found)
                log.info("batch ended", **result)
                _step("clean", 3, steps.clean, batch)
                return "released"
            log.warning("audits failed", how=how, broken=found["broken"])
            if how == "retrain" or not found["escalate"]:
                break
            _step("escalate", 10, steps.escalate, batch, found)
        _step("reject", 10, steps.reject, batch, found)
        return "rejected"
    except (ExpungeError, Recorded) as error:
        why = _sentence(error)
        return str(_step("give-back", 10, steps.give_back, batch, why))

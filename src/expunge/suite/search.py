"""The loop of tuning: trials until a budget is spent, kept so that a stopped search goes on."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from expunge.core.errors import ExpungeError, Interrupted, SettingError, UserError
from expunge.core.method import Method
from expunge.suite.bench import Bench
from expunge.suite.space import distribution, within

Attempt = Callable[[Mapping[str, Any]], tuple[float, dict[str, float]]]
"""Tries settings and returns their distance and its terms."""

RANDOM_TRIALS = 5
"""Trials before the sampler has seen enough to prefer anything."""


@dataclass(frozen=True)
class Budget:
    """What tuning may use; at least one of the two.

    Attributes:
        trials: settings tried, failures included.
        seconds: wall time of the trials; the last one may end later. References come on top.
    """

    trials: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Insist on a budget."""
        if self.trials is None and self.seconds is None:
            raise SettingError("state a budget: trials=, seconds= or both")
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise SettingError(f"a budget's {name} must be above 0, not {value}")

    def spent(self, trials: Sequence[Trial]) -> bool:
        """Whether these trials used it up."""
        return (self.trials is not None and len(trials) >= self.trials) or (
            self.seconds is not None and sum(t.seconds for t in trials) >= self.seconds
        )

    def within(self, trials: Sequence[Trial]) -> list[Trial]:
        """The first trials, as many as this budget would have paid for."""
        paid: list[Trial] = []
        for trial in trials:
            if self.spent(paid):
                break
            paid.append(trial)
        return paid


@dataclass(frozen=True)
class Trial:
    """Settings that were tried: their distance with its terms, or the reason why there is none."""

    settings: dict[str, Any]
    value: float | None
    seconds: float
    terms: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str | None = None


def search(
    base: Method,
    searched: Mapping[str, Any],
    budget: Budget,
    bench: Bench,
    key: str,
    attempt: Attempt,
) -> list[Trial]:
    """Run trials until the budget is spent; earlier ones of the same search count.

    Args:
        base: the method as it came, which is the first trial.
        searched: ranges and choices by setting, see `space_of`.
        budget: what the trials may use; of a longer search in the store, those it pays for count.
        bench: its store keeps the trials, its runtime seeds the draws.
        key: content key of the search.
        attempt: tries settings.

    Returns:
        The trials in order.
    """
    with quiet_optuna() as optuna:
        folder = bench.store.folder / "tuning"
        folder.mkdir(parents=True, exist_ok=True)
        backend = optuna.storages.journal.JournalFileBackend(str(folder / f"{key}.log"))
        study = optuna.create_study(
            study_name=key, storage=optuna.storages.JournalStorage(backend), load_if_exists=True
        )
        ranges = {n: distribution(optuna, s) for n, s in searched.items()}
        began = {n: v for n in searched if within(v := getattr(base, n), searched[n])}
        done = budget.within(_finished(optuna, study))
        with bench.runtime.task(f"tune {base.name}", budget.trials) as task:
            task.advance(len(done))
            while not budget.spent(done):
                if not done:  # the method as it came, wherever that lies in the space
                    value, notes = _measured(attempt, {})
                    study.add_trial(
                        optuna.trial.create_trial(
                            state=_state(optuna, value), value=value, params=began,
                            distributions={n: ranges[n] for n in began}, user_attrs=notes,
                        )
                    )  # fmt: skip
                else:
                    # draws depend on what was finished only, so stopping changes nothing
                    study.sampler = optuna.samplers.TPESampler(
                        seed=bench.runtime.seed_for("tune", len(done)) % 2**32,
                        n_startup_trials=RANDOM_TRIALS,
                    )
                    asked = study.ask(ranges)
                    value, notes = _measured(attempt, asked.params)
                    for name, note in notes.items():
                        asked.set_user_attr(name, note)
                    study.tell(asked, value, state=_state(optuna, value))
                done = budget.within(_finished(optuna, study))
                task.advance()
    return done


def _measured(attempt: Attempt, settings: Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """The distance of a trial, None if the settings do not work, and what is noted beside it."""
    start = time.perf_counter()
    try:
        value, parts = attempt(settings)
        if not math.isfinite(value):
            raise ExpungeError("the distance is not a finite number")
    except _NOT_THE_SETTINGS:
        raise
    except (ExpungeError, RuntimeError, ArithmeticError, np.linalg.LinAlgError) as error:
        if "allocate memory" in str(error):
            raise
        # other settings may work
        why = str(error) if isinstance(error, ExpungeError) else f"{type(error).__name__}: {error}"
        return None, {"reason": why, "seconds": time.perf_counter() - start}
    return value, {"terms": parts, "seconds": time.perf_counter() - start}


_NOT_THE_SETTINGS: tuple[type[Exception], ...] = (
    Interrupted,
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),  # the device is of no use after it
)


def _state(optuna: Any, value: float | None) -> Any:
    states = optuna.trial.TrialState
    return states.FAIL if value is None else states.COMPLETE


def _finished(optuna: Any, study: Any) -> list[Trial]:
    """Trials that ended, in order; those that a kill left open never do."""
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL)
    return [
        Trial(
            t.params, t.value, t.user_attrs.get("seconds", 0.0),
            t.user_attrs.get("terms", {}), t.user_attrs.get("reason"),
        )
        for t in study.get_trials(deepcopy=False, states=states)
    ]  # fmt: skip


def import_optuna() -> Any:
    """Return the module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("tuning needs Optuna; pip install 'expunge[tune]'") from error
    return optuna


@contextmanager
def quiet_optuna() -> Iterator[Any]:
    """Optuna, with its own log lines held back: progress is reported by the runtime."""
    optuna = import_optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield optuna
    finally:
        optuna.logging.set_verbosity(before)

"""`expunge tune`: a method's settings from a tuning forget set, never from the reported one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import Seed, Settings, print_json, print_table, settings_from
from expunge.cli.options import Inputs, with_inputs
from expunge.cli.work import MethodName

if TYPE_CHECKING:
    from expunge.core.problem import Problem
    from expunge.core.request import Request
    from expunge.suite.bench import Bench

TuningRequests = Annotated[
    list[str],
    typer.Option(
        "--forget-tuning",
        help="What to tune on: label=7, ids=1,2, where=CONDITION, or fraction=0.1 (drawn apart from "
        "the reported samples); likewise worst-case=0.1, easiest=0.1, low-el2n=0.1, high-el2n=0.1; repeatable.",
    ),
]
SpaceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--space",
        help="What to search, lr=1e-4..0.1:log or alpha=1,10,100; repeatable. Numbers around the "
        "method's own settings by default.",
    ),
]


@with_inputs
def tune(
    method: MethodName,
    forget_tuning: TuningRequests,
    trials: Annotated[int | None, typer.Option("--trials", help="Settings to try.")] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Wall time of the trials.")
    ] = None,
    space: SpaceOption = None,
    settings: Settings = None,
    references: Annotated[
        int, typer.Option("--references", help="Retrained models a tuning request.", min=1)
    ] = 2,
    out: Annotated[
        str | None,
        typer.Option("--out", help="A .toml for a suite file, or a .json with all trials."),
    ] = None,
    seed: Seed = 0,
    *,
    inputs: Inputs,
) -> None:
    """Choose a method's settings by their distance to retraining on other samples than the reported.

    The request options say what will be reported; a workload has its usual one. The same command
    goes on where it was stopped.
    """
    from expunge.methods import registry
    from expunge.suite.tune import Budget, check_ending, write_tuning
    from expunge.suite.tune import tune as run_tune

    passed = settings_from(settings)
    registry.get(method).create(passed)  # complain before anything is loaded
    Budget(trials, seconds)
    wanted = [_words(one) for one in forget_tuning]
    searched = dict(_range(one) for one in space or [])
    if out is not None:
        check_ending(out)
    with inputs.bench(seed) as bench:
        reported = inputs.request()
        problem = inputs.problem(bench)
        found = run_tune(
            problem, {"name": method, **passed}, [_request(w, problem, reported, seed, bench) for w in wanted],
            reported=reported, trials=trials, seconds=seconds, space=searched, references=references,
            bench=bench,
        )  # fmt: skip
    if out is not None:
        write_tuning(found, out)
    if inputs.as_json:
        print_json(found.to_dict())
        return
    rows = [
        [n, " ".join(f"{k}={_short(v)}" for k, v in t.settings.items()), _short(t.value), f"{t.seconds:.1f}", t.reason or ""]
        for n, t in enumerate(found.trials)
    ]  # fmt: skip
    print_table(
        f"{method}: distance to retraining",
        ["trial", "settings", "distance", "seconds", "reason"],
        rows,
    )
    typer.echo(found.toml(), nl=False)


BY_DIFFICULTY = ("worst-case", "easiest", "low-el2n", "high-el2n")


def _words(text: str) -> tuple[str, str]:
    from expunge.core.errors import RequestError

    form, equals, value = text.partition("=")
    if not equals or form not in ("label", "ids", "where", "fraction", *BY_DIFFICULTY) or not value.strip():  # fmt: skip
        raise RequestError(
            f"--forget-tuning takes label=…, ids=…, where=…, fraction=… or a share of {', '.join(BY_DIFFICULTY)}, not {text!r}"
        )
    return form, value.strip()


def _request(
    words: tuple[str, str], problem: Problem, reported: Request, seed: int, bench: Bench
) -> Request:
    from expunge.core.errors import RequestError
    from expunge.core.request import forget as make
    from expunge.suite.tune import apart, apart_by_difficulty

    form, value = words
    try:
        if form == "label":
            return make(label=tuple(int(v) for v in value.split(",")))
        if form == "fraction":
            return apart(problem, reported, float(value), seed)
        if form in BY_DIFFICULTY:
            return apart_by_difficulty(problem, reported, form, float(value), bench)
    except ValueError as error:
        raise RequestError(f"--forget-tuning {form}={value}: a number is needed") from error
    if form == "ids":
        return make(ids=tuple(v.strip() for v in value.split(",") if v.strip()))
    return make(where=value)


def _range(text: str) -> tuple[str, Any]:
    from expunge.core.errors import SettingError

    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    ends, _, scale = value.partition(":")
    low, dots, high = ends.partition("..")
    try:
        if equals and dots and scale in ("", "log"):
            pair = (_number(low), _number(high))
            return name, (*pair, "log") if scale else pair
    except ValueError as error:
        raise SettingError(f"--space {text}: the ends of a range are numbers") from error
    if not name or not equals or dots or not value.strip():
        raise SettingError(
            f"--space takes NAME=LOW..HIGH, NAME=LOW..HIGH:log or NAME=A,B, not {text!r}"
        )
    return name, [_choice(v.strip()) for v in value.split(",")]


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _choice(text: str) -> int | float | str:
    try:
        return _number(text)
    except ValueError:
        return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)

"""What the commands share: runtime, request and settings from options, tables and JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from expunge.core.request import Request
    from expunge.core.runtime import Runtime
    from expunge.suite.compare import MethodSpec

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="Folder of the store; $EXPUNGE_STORE or .expunge by default."),
]
RecipePath = Annotated[
    str | None,
    typer.Option("--recipe", help="pkg.module:function(keep_ids, seed) -> model, for references."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the method, NAME=VALUE; repeatable.")
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, …")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the run.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Torch threads; results depend on it in the last bits."),
]

Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="How several models are trained: one-by-one, together, processes[:N] or ray[:ADDRESS]; "
        "the same models up to rounding.",
    ),
]


class RichReporter:
    """Progress bars on a terminal's standard error."""

    def __init__(self) -> None:
        """Start drawing."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._tasks: dict[str, Any] = {}
        self._progress.start()

    def start(self, task: str, total: int | None) -> None:
        """Add a bar."""
        self._tasks[task] = self._progress.add_task(task, total=total)

    def advance(self, task: str, steps: int = 1) -> None:
        """Move a bar."""
        self._progress.advance(self._tasks[task], steps)

    def finish(self, task: str) -> None:
        """Remove a bar."""
        self._progress.remove_task(self._tasks.pop(task))

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text)

    def stop(self) -> None:
        """Stop drawing."""
        self._progress.stop()


@contextlib.contextmanager
def runtime(
    device: str = "cpu", seed: int = 0, threads: int | None = None, **more: Any
) -> Iterator[Runtime]:
    """Make a runtime whose progress goes to a terminal as bars, elsewhere as JSON lines.

    `more` are further attributes of it. Under `accelerate launch` it joins the other processes first.
    """
    from expunge.core.errors import UserError
    from expunge.core.runtime import JsonLines, Runtime

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: this machine has no usable GPU; use --device cpu")
    if more.get("engine") is not None:
        from expunge.fleet.executors import executor

        executor(more["engine"])  # complain before any work
    reporter = RichReporter() if sys.stderr.isatty() else JsonLines()
    try:
        yield Runtime(device=device, seed=seed, threads=threads, reporter=reporter, **more)
    finally:
        if isinstance(reporter, RichReporter):
            reporter.stop()


def request_from(
    forget: str | None,
    label: Sequence[int] | None,
    ids: str | None,
    where: str | None,
    fraction: float | None,
    *,
    seed: int = 0,
    default: Request | None = None,
    model: str | None = None,
) -> Request:
    """Turn the request options into one request; labels in a file may be names of `model`'s classes.

    Raises:
        ModelError: the model's classes cannot be read.
        RequestError: none or several forms were given.
    """
    from expunge.core.errors import RequestError
    from expunge.core.request import forget as make

    given = [f for f in (forget, label, ids, where, fraction) if f not in (None, [])]
    if not given and default is not None:
        return default
    if len(given) != 1:
        raise RequestError(
            "say what to forget with exactly one of --forget, --label, --ids, --where, --fraction"
        )
    if forget is not None:
        from expunge.problems.forget_file import read_forget_file

        classes = []
        if model is not None:
            from expunge.problems.models_on_disk import class_names, model_config, model_folder

            classes = class_names(model_config(model_folder(model)))
        return read_forget_file(forget, classes)
    if ids is not None:
        return make(ids=tuple(i.strip() for i in ids.split(",") if i.strip()))
    if label:
        return make(label=tuple(label))
    return make(where=where) if where is not None else make(fraction=fraction, seed=seed)


def imported(path: str) -> Any:
    """Import `pkg.module:name`.

    Raises:
        UserError: it cannot be imported.
    """
    import importlib

    from expunge.core.errors import UserError

    module, _, name = path.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be imported ({error}); write package.module:function"
        ) from error
    finally:
        sys.path.pop(0)


def settings_from(pairs: Sequence[str] | None) -> dict[str, str]:
    """Turn `NAME=VALUE` words into a dict.

    Raises:
        SettingError: a word has no `=`.
    """
    from expunge.core.errors import SettingError

    settings = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--set takes NAME=VALUE, not {pair!r}")
        settings[name.strip().replace("-", "_")] = value.strip()
    return settings


def method_specs(names: str) -> list[MethodSpec]:
    """Split `a,b,c` into method names."""
    return [name.strip() for name in names.split(",") if name.strip()]


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    from expunge.core.hashing import plain

    print(json.dumps(plain(value), indent=1))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on standard output; nothing is cut when it is not a terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[Text(str(cell)) for cell in row])  # no markup: [0, 1] is an interval
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def is_main() -> bool:
    """Whether this process prints and writes (the first of several)."""
    return int(os.environ.get("RANK", "0")) == 0

"""Options of every command that works on a problem and a request: one block, written once.

A command takes them as one keyword-only parameter and is decorated:

```python
@with_inputs
def look(method: MethodName, *, inputs: Inputs) -> None:
    with inputs.bench() as bench:
        request = inputs.request()
        problem = inputs.problem(bench)
```
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from expunge.cli.common import (
    Device,
    Engine,
    Json,
    RecipePath,
    StoreOption,
    Threads,
    imported,
    request_from,
    runtime,
)

if TYPE_CHECKING:
    from expunge.core.problem import Problem
    from expunge.core.request import Request
    from expunge.suite.bench import Bench


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the shared options say; a field is an option, its annotation what `--help` shows."""

    workload: Annotated[
        str | None, typer.Option("--workload", help="A bundled problem, by name.")
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A transformers image classifier or causal language model: folder or hub name; for "
            "the latter also a GGUF file, or smollm2.",
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Training data: image folder, .npz with X and y, or datasets folder; .jsonl of "
            "records for a language model.",
        ),
    ] = None
    test: Annotated[
        str | None, typer.Option("--test", help="Held-out data, in the same forms.")
    ] = None
    forget: Annotated[
        str | None,
        typer.Option(
            "--forget",
            help="What to forget: a .csv, .txt or .jsonl of ids, names or labels; .jsonl of records "
            "for a language model.",
        ),
    ] = None
    retain: Annotated[
        str | None,
        typer.Option("--retain", help="A language model's other training records, .jsonl."),
    ] = None
    label: Annotated[
        list[int] | None, typer.Option("--label", help="Forget a class; repeatable.")
    ] = None
    ids: Annotated[
        str | None, typer.Option("--ids", help="Forget samples: ids, separated by commas.")
    ] = None
    where: Annotated[
        str | None,
        typer.Option("--where", help='Forget by a condition, e.g. "label == 3 and id < 99".'),
    ] = None
    fraction: Annotated[
        float | None, typer.Option("--fraction", help="Forget a random share of the samples.")
    ] = None
    prune: Annotated[
        str | None,
        typer.Option(
            "--prune", help="Prune the model first, for any method: omp|imp|synflow:RATE."
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="A language model's weights: float32, bfloat16, float16 or auto."
        ),
    ] = "float32"
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Most tokens of a language model's sample.", min=2),
    ] = None
    long: Annotated[
        str, typer.Option("--long", help="Longer samples: error, cut, or split (texts only).")
    ] = "error"
    chat: Annotated[
        bool, typer.Option("--chat", help="Put questions into the model's chat template.")
    ] = False
    secrets: Annotated[
        str,
        typer.Option(
            "--secrets",
            help="Sensitive segments of records: given by their secret or spans, or detect others too.",
        ),
    ] = "given"
    packing: Annotated[
        bool,
        typer.Option("--packing", help="Ask a language model for batches without their padding."),
    ] = False
    precision: Annotated[
        str, typer.Option("--precision", help="Mixed precision in training: no, bf16 or fp16.")
    ] = "no"
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations of a transformers model anew in the backward pass: less memory.",
        ),
    ] = False
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Under accelerate launch, spread the model in training over processes."
        ),
    ] = False
    recipe: RecipePath = None
    device: Device = "cpu"
    threads: Threads = None
    engine: Engine = None
    store: StoreOption = None
    as_json: Json = False

    @contextlib.contextmanager
    def bench(self, seed: int = 0) -> Iterator[Bench]:
        """Open the store and a runtime; `--prune` is checked before.

        Raises:
            NeedsError: the engine's package is missing.
            SettingError: `--prune` names no pruning, `--precision` no precision, or `--engine` no engine.
            UserError: the store cannot be opened, or there is no such device.
        """
        from expunge.core.errors import SettingError
        from expunge.core.runtime import PRECISIONS
        from expunge.store import Store
        from expunge.suite.bench import Bench
        from expunge.train.prune import Pruning

        if self.prune is not None:
            Pruning.parse(self.prune)
        if self.precision not in PRECISIONS:
            raise SettingError(
                f"--precision {self.precision} is not a choice; use {', '.join(PRECISIONS)}"
            )
        with runtime(
            self.device, seed, self.threads, precision=self.precision, shard=self.shard,
            gradient_checkpointing=self.gradient_checkpointing, engine=self.engine,
        ) as made:  # fmt: skip
            yield Bench(Store.open(self.store), made)

    def request(self, seed: int = 0) -> Request:
        """Return what to forget: as the options say, else what is usual on the workload.

        Nothing but the forget list is read, so a command asks for it before it loads a problem.

        Args:
            seed: of the draw with `--fraction`.

        Raises:
            RequestError: none or several of the options were given.
            UserError: there is no such workload.
        """
        from expunge.problems.records_on_disk import holds_records, request_for
        from expunge.workloads import registry

        others = (self.workload, self.label, self.ids, self.where, self.fraction)
        if holds_records(self.forget) and all(o in (None, []) for o in others):
            return request_for(str(self.forget), self.retain)
        usual = None if self.workload is None else registry.get(self.workload).request
        return request_from(
            self.forget, self.label, self.ids, self.where, self.fraction,
            seed=seed, default=usual, model=None if self.is_text() else self.model,
        )  # fmt: skip

    def problem(self, bench: Bench) -> Problem:
        """Load or train the problem, pruned if `--prune` says so.

        Raises:
            NeedsError: it is to be pruned and has no recipe that can.
            UserError: neither a workload nor a model with data was named, or both were.
        """
        problem = self._dense(bench)
        return problem if self.prune is None else bench.pruned(problem, self.prune)

    def is_text(self) -> bool:
        """Whether this is about a language model: the model is one, or the data are records."""
        from expunge.problems.lm_on_disk import is_language_model
        from expunge.problems.records_on_disk import holds_records

        return (
            self.retain is not None
            or any(map(holds_records, (self.forget, self.data)))
            or is_language_model(self.model)
        )

    def _dense(self, bench: Bench) -> Problem:
        from expunge.core.errors import UserError

        if (self.workload is None) == (self.model is None):
            raise UserError("name either --workload, or --model with --data")
        if self.workload is not None:
            return bench.workload(self.workload)
        if self.is_text():
            return self._language_model(bench)
        if self.data is None:
            raise UserError(
                "--model needs --data: the training data, as an image folder, .npz or datasets folder"
            )
        from expunge.problems.data_on_disk import problem_from_disk

        recipe = imported(self.recipe) if self.recipe else None
        return problem_from_disk(str(self.model), self.data, test=self.test, recipe=recipe)

    def _language_model(self, bench: Bench) -> Problem:
        from expunge.problems.records_on_disk import holds_records, lm_from_disk

        # what to forget is a list of ids where all records are in one file
        records = self.data is None or holds_records(self.forget)
        recipe = imported(self.recipe) if self.recipe else None
        with bench.runtime.task("read model and data"):
            return lm_from_disk(
                str(self.model), forget=self.forget if records else None, retain=self.retain,
                data=self.data, test=self.test, recipe=recipe, dtype=self.dtype,
                max_length=self.max_length, long=self.long, chat=self.chat, packing=self.packing,
                secrets=self.secrets,
            )  # fmt: skip


def with_inputs(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the fields of `Inputs` as options, in place of its parameter `inputs`.

    Args:
        command: takes `inputs` as a keyword; its other parameters are options of its own.

    Returns:
        The command with each option in its signature, where typer looks for them.

    Raises:
        TypeError: the command has no parameter `inputs`, or an option of its own has a shared name.
    """
    own = inspect.signature(command, eval_str=True)
    if "inputs" not in own.parameters:
        raise TypeError(f"{command.__name__} takes no inputs=")
    kinds = get_type_hints(Inputs, include_extras=True)
    shared = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=kinds[f.name]
        )
        for f in fields(Inputs)
    ]
    twice = [p.name for p in shared if p.name in own.parameters]
    if twice:
        raise TypeError(f"{command.__name__} has options of the shared names {', '.join(twice)}")
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        parameters += shared if parameter.name == "inputs" else [parameter]
    whole = own.replace(parameters=parameters)

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        given = whole.bind(*args, **options)
        given.apply_defaults()
        values = given.arguments
        inputs = Inputs(**{p.name: values.pop(p.name) for p in shared})
        command(**values, inputs=inputs)

    # typer reads both, and older versions resolve the annotations by themselves
    vars(run)["__signature__"] = whole
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    return run

"""`expunge exact`: train a model in shards and slices, and delete samples from it exactly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import (
    Device,
    Json,
    Seed,
    imported,
    print_json,
    request_from,
    runtime,
    settings_from,
)

if TYPE_CHECKING:
    from torch import nn

    from expunge.core.problem import Problem
    from expunge.core.request import Request
    from expunge.exact.plan import Plan, Status
    from expunge.exact.sharded import Sharded

app = typer.Typer(
    help="Models trained in shards and slices, from which samples are deleted exactly.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the sharded model.")]
WorkloadOption = Annotated[
    str | None,
    typer.Option("--workload", help="A bundled problem, by name; training starts untrained."),
]
ProblemOption = Annotated[
    str | None,
    typer.Option(
        "--problem",
        help="pkg.module:function that returns your problem; its model is the backbone.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Backbone that never saw the data: a transformers image classifier or causal language "
        "model, folder or hub name.",
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data", help="Training data: image folder, .npz or datasets folder; .jsonl of records."
    ),
]
Test = Annotated[str | None, typer.Option("--test", help="Held-out data, in the same forms.")]
Ids = Annotated[str | None, typer.Option("--ids", help="Sample ids or names, with commas.")]
Label = Annotated[list[int] | None, typer.Option("--label", help="A whole class; repeatable.")]
Where = Annotated[
    str | None, typer.Option("--where", help='A condition, e.g. "label == 3 and id < 99".')
]
Forget = Annotated[
    str | None, typer.Option("--forget", help="A .csv, .txt or .jsonl of ids, names or labels.")
]


@app.command()
def train(
    folder: Folder,
    workload: WorkloadOption = None,
    problem: ProblemOption = None,
    model: Model = None,
    data: DataOption = None,
    test: Test = None,
    shards: Annotated[
        int | None, typer.Option("--shards", help="Models of the ensemble, m.")
    ] = None,
    slices: Annotated[int | None, typer.Option("--slices", help="Slices of a shard, L.")] = None,
    orders: Annotated[
        int | None, typer.Option("--orders", help="Orders a shard's slices are learned in, B.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", help="Weights of a slice: lora(R), scale-shift, …, or whole: SISA."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the training, NAME=VALUE; repeatable."),
    ] = None,
    fitted: Annotated[
        list[str] | None,
        typer.Option(
            "--fitted", help="What something was fitted on: NAME=public or NAME=data; repeatable."
        ),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option("--accept", help="Put up with what breaks exactness, by name; repeatable."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a sharded model into a folder; started again after an interruption, it goes on."""
    from expunge.core.errors import SettingError, UserError
    from expunge.core.problem import Problem
    from expunge.exact.manifest import stages
    from expunge.exact.settings import Settings
    from expunge.exact.sharded import Sharded

    chosen: dict[str, Any] = dict(settings_from(settings))
    named = {"shards": shards, "slices": slices, "orders": orders, "adapter": adapter}
    for name, value in named.items():
        if value is not None and name in chosen:
            raise SettingError(f"{name} was given twice, as --{name} and as --set {name}=")
    chosen |= {k: v for k, v in named.items() if v is not None}
    if workload is not None:
        chosen.setdefault("start", "fresh")  # there is no public backbone
    Settings.create(chosen)  # complain before anything is loaded
    given = _problem(workload, problem, model, data, test)
    if not isinstance(given, Problem):
        raise UserError("training needs data: name --workload, --problem, or --model with --data")
    with runtime(device, seed) as made:
        sharded = Sharded.train(
            given, folder=folder, runtime=made, fitted=_pairs(fitted), accept=accept or (), **chosen
        )
    count = len(list(stages(sharded.manifest)))
    spent = sum(stage["seconds"] for _, _, stage in stages(sharded.manifest))
    score = _accuracy(given, sharded)
    status = sharded.status()
    if as_json:
        print_json({
            "folder": str(folder), "settings": sharded.settings.in_force(), "exact": sharded.exact,
            "stages": count, "seconds": spent, "test_accuracy": score, "status": status.to_dict(),
        })  # fmt: skip
        return
    typer.echo(f"{folder}: {count} stages trained in {spent:.1f} s")
    if score is not None:
        typer.echo(f"accuracy on the test data: {score:.3f}")
    if not sharded.exact:
        breaks = ", ".join(sharded.manifest["exactness"]["breaks"])
        typer.echo(f"deletion from it is not exact: {breaks} was accepted")
    _say(status)


@app.command()
def plan(
    folder: Folder,
    ids: Ids = None,
    label: Label = None,
    where: Where = None,
    forget: Forget = None,
    workload: WorkloadOption = None,
    problem: ProblemOption = None,
    model: Model = None,
    data: DataOption = None,
    as_json: Json = False,
) -> None:
    """Say what deleting samples would switch off and cost; nothing is changed."""
    asked = _request(ids, label, where, forget)
    sharded = _opened(folder, _problem(workload, problem, model, data), asked)
    found = sharded.plan(asked)
    if as_json:
        print_json(found.to_dict())
        return
    typer.echo(str(found))
    _explain(found)


@app.command("forget")
def forget_(
    folder: Folder,
    ids: Ids = None,
    label: Label = None,
    where: Where = None,
    forget: Forget = None,
    skip: Annotated[
        bool,
        typer.Option("--skip-unknown", help="Delete the others where some are not in the model."),
    ] = False,
    workload: WorkloadOption = None,
    problem: ProblemOption = None,
    model: Model = None,
    data: DataOption = None,
    as_json: Json = False,
) -> None:
    """Delete samples: switch off what saw them, and erase it. Ids need no model and no data."""
    from expunge.core.errors import RequestError

    asked = _request(ids, label, where, forget)
    sharded = _opened(folder, _problem(workload, problem, model, data), asked)
    before = sharded.plan(asked)
    missing = [*before.unknown, *before.outside]
    if missing and not skip:
        raise RequestError(
            f"{len(missing)} of the samples are no part of the model, such as {missing[0]}; nothing "
            "was deleted; pass --skip-unknown to delete the others"
        )
    done = sharded.forget(asked)
    if as_json:
        print_json(done.to_dict())
        return
    if done.changed:
        typer.echo(str(done.plan))
    else:
        which = "none of it is in the model" if missing else "all of it was deleted before"
        typer.echo(f"{which}; nothing changed")
    _explain(done.plan)
    typer.echo(f"weights before: {done.weights_before}")
    typer.echo(f"weights after:  {done.weights_after}")
    typer.echo(f"manifest:       {done.manifest}")
    typer.echo(f"took {1000 * done.seconds:.1f} ms")


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Say what is served, how much of it is left, and how long it is expected to last."""
    from expunge.exact.sharded import Sharded

    found = Sharded.load(folder).status()
    if as_json:
        print_json(found.to_dict())
        return
    _say(found)


@app.command()
def verify(folder: Folder, as_json: Json = False) -> None:
    """Compare every file with the manifest; exit 0 if all is well, 1 if not."""
    from expunge.exact.verify import verify_folder

    faults = verify_folder(folder)
    if as_json:
        print_json({"ok": not faults, "faults": faults})
    else:
        for sentence in faults:
            typer.echo(f"wrong: {sentence}")
        typer.echo("the model is refused" if faults else "every file is what the manifest says")
    if faults:
        raise typer.Exit(1)


@app.command()
def retrain(
    folder: Folder,
    shards: Annotated[
        str | None, typer.Option("--shards", help="Which, with commas; the dead ones by default.")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep-slices",
            help="Leave samples in their slices and train dead stages alone, as SISA.",
        ),
    ] = False,
    workload: WorkloadOption = None,
    problem: ProblemOption = None,
    model: Model = None,
    data: DataOption = None,
    test: Test = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train shards anew, on samples that are not deleted; the others go on serving."""
    from expunge.core.errors import SettingError

    try:
        wanted = None if shards is None else [int(s) for s in shards.split(",")]
    except ValueError as error:
        raise SettingError(f"--shards takes numbers with commas, not {shards!r}") from error
    sharded = _opened(folder, _problem(workload, problem, model, data, test))
    with runtime(device) as made:
        found = sharded.retrain(wanted, keep_slices=keep, runtime=made)
    if as_json:
        print_json(found.to_dict())
        return
    _say(found)


# ---------------------------------------------------------------------- what the commands share


def _problem(
    workload: str | None, path: str | None, model: str | None, data: str | None,
    test: str | None = None,
) -> Problem | nn.Module | None:  # fmt: skip
    """What the options name: a problem, or a backbone alone; None if they name nothing."""
    from torch import nn

    from expunge.core.errors import UserError
    from expunge.core.problem import Problem

    if sum(o is not None for o in (workload, path, model)) > 1:
        raise UserError("name one of --workload, --problem and --model")
    if (data is not None or test is not None) and model is None:
        raise UserError("--data and --test go with --model")
    if workload is not None:
        from expunge.workloads import registry

        return registry.get(workload).untrained()
    if path is not None:
        made = imported(path)()
        if not isinstance(made, (nn.Module, Problem)):
            raise UserError(f"{path} returns neither a problem nor a network")
        return made
    if model is None:
        return None
    if data is None:
        raise UserError("--model needs --data, the training data")
    from expunge.problems.lm_on_disk import is_language_model
    from expunge.problems.records_on_disk import holds_records, lm_from_disk

    if holds_records(data) or is_language_model(model):
        return lm_from_disk(model, data=data, test=test)
    from expunge.problems.data_on_disk import problem_from_disk

    return problem_from_disk(model, data, test=test)


def _opened(
    folder: Path, given: Problem | nn.Module | None, asked: Request | None = None
) -> Sharded:
    """The model; what asks for more than ids gets the data of the workload it was trained on."""
    from expunge.exact.folder import Folder
    from expunge.exact.now import Now
    from expunge.exact.sharded import Sharded

    manifest = Now.read(Folder(folder)).manifest
    source = manifest["problem"].get("source") or {}
    by_ids = asked is not None and asked.ids is not None and not manifest.get("named")
    if given is None and not by_ids and source.get("kind") == "workload":
        given = _problem(source["workload"], None, None, None)
    return Sharded.load(folder, given)


def _request(
    ids: str | None, label: list[int] | None, where: str | None, forget: str | None
) -> Request:
    from expunge.core.errors import RequestError

    if sum(o not in (None, []) for o in (ids, label, where, forget)) != 1:
        raise RequestError(
            "say what to delete with exactly one of --ids, --label, --where, --forget"
        )
    return request_from(forget, label, ids, where, None)


def _pairs(words: list[str] | None) -> dict[str, str]:
    from expunge.core.errors import SettingError

    found = {}
    for word in words or []:
        name, equals, source = word.partition("=")
        if not equals:
            raise SettingError(f"--fitted takes NAME=public or NAME=data, not {word!r}")
        found[name.strip()] = source.strip()
    return found


def _accuracy(problem: Problem, sharded: Sharded) -> float | None:
    if problem.kind != "classification" or problem.test is None:
        return None
    right = 0
    for batch in problem.test.batches(256):
        assert batch.y is not None
        right += int(sharded.predict(batch.x).argmax(1).eq(batch.y).sum())
    return right / len(problem.test)


def _explain(found: Plan) -> None:
    for shard, off in found.off.items():
        names = "; ".join("-".join(map(str, prefix)) for prefix in off)
        typer.echo(f"  shard {shard}: stages {names} switched off")
    for words, ids in (("unknown", found.unknown), ("not in the model", found.outside)):
        if ids:
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            typer.echo(f"  {words}: {', '.join(map(str, ids[:5]))}{more}")


def _say(found: Status) -> None:
    for shard, prefix in enumerate(found.served):
        served = "dead" if prefix is None else f"serves slices {', '.join(map(str, prefix))}"
        typer.echo(f"shard {shard}: {served}; {found.live[shard]} live prefixes")
    typer.echo(
        f"{found.samples} samples, {found.deleted} deleted, {found.collateral} others not in use"
    )
    if found.dead:
        typer.echo("dead shards wait to be trained anew: expunge exact retrain")
    typer.echo(f"about {found.remaining:.0f} more requests until no shard is alive")
    typer.echo(f"weights {found.weights}")

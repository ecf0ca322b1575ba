"""`expunge unlearn`, `audit`, `compare`, `reproduce`: the five lines, from a shell."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import (
    Device,
    Json,
    RecipePath,
    Seed,
    Settings,
    StoreOption,
    is_main,
    method_specs,
    print_json,
    print_table,
    settings_from,
)
from expunge.cli.common import runtime as make_runtime
from expunge.cli.options import Inputs, with_inputs

if TYPE_CHECKING:
    from expunge.core.audit import Finding
    from expunge.core.outcome import Outcome

MethodName = Annotated[str, typer.Option("--method", help="Method; see expunge methods list.")]
Train = Annotated[
    str | None,
    typer.Option(
        "--train", help="Weights that train: full, last(K), role(NAME), lora(R), …; --set train=…."
    ),
]
OutFolder = Annotated[str | None, typer.Option("--out", help="Folder for the result.")]
References = Annotated[int, typer.Option("--references", help="Retrained models.", min=0)]
Audits = Annotated[str, typer.Option("--audits", help="standard, quick, or names with commas.")]
StrataOption = Annotated[
    str | None,
    typer.Option(
        "--strata", help="Also by difficulty of the training samples: el2n|grand|forgetting."
    ),
]


@with_inputs
def unlearn(
    method: MethodName,
    settings: Settings = None,
    train: Train = None,
    out: OutFolder = None,
    seed: Seed = 0,
    *,
    inputs: Inputs,
) -> None:
    """Make a model forget; with --out, write the model that forgot.

    Of a language model, a few greedy answers before and after are shown.
    """
    from expunge.methods import registry
    from expunge.problems.models_on_disk import check_out_folder
    from expunge.suite.compare import make_method

    passed = _with_train(settings_from(settings), train)
    registry.get(method).create(passed)  # complain before anything is loaded
    if out is not None:
        check_out_folder(out)  # before any work
    with inputs.bench(seed) as bench:
        request = inputs.request(seed)
        problem = inputs.problem(bench)
        chosen, _ = make_method({"name": method, **passed}, problem)
        speaks = getattr(problem, "tokenizer", None) is not None
        look = functools.partial(_answers, device=inputs.device) if speaks else None
        outcome, run = bench.unlearn(problem, request, chosen, seed, passed, look)
        if look is not None and "answers" not in outcome.details:  # stored by another command
            outcome.details |= look(outcome)
    if not is_main():
        return
    folder = _write(outcome, run, out, inputs)
    shown = {
        "run": run,
        "out": folder,
        "method": chosen.name,
        "forgotten": outcome.record["forgotten"],
        "weights": outcome.record["weights"],
        "cost": vars(outcome.cost),
        "details": outcome.details,
    }
    if inputs.as_json:
        print_json(shown)
        return
    for answer in outcome.details.get("answers", ()):
        for name in ("question", "before", "after"):
            label = answer["part"] if name == "question" else f"  {name}"
            typer.echo(f"{label:10} {_line(answer[name], end=name == 'question')}")
    cost = outcome.cost
    typer.echo(
        f"run {run}: {chosen.name} on {outcome.record['forgotten']} samples in {cost.seconds:.1f} s"
    )
    typer.echo(
        f"model: {folder}" if folder else f"kept in the store; audit it with: expunge audit {run}"
    )


@with_inputs
def audit(
    run: Annotated[
        str,
        typer.Argument(
            help="Run id or prefix of an unlearning run; with --against, a model on disk.",
            metavar="RUN|MODEL",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Audit a model that somebody else unlearned: a workload's name, or the original "
            "model, with --data; say what was forgotten by --label, --forget, ….",
        ),
    ] = None,
    audits: Audits = "standard",
    references: References = 3,
    strata: StrataOption = None,
    *,
    inputs: Inputs,
) -> None:
    """Audit released weights against retrained references: a stored run's, or a model on disk.

    Nothing is believed of a model on disk but its weights: a .safetensors file, a folder of
    transformers, or one that unlearn --out wrote.
    """
    from expunge.suite.bench import check_strata

    if strata is not None:
        check_strata(strata)
    findings, name = (
        _audit_run(run, audits, references, strata, inputs)
        if against is None
        else _audit_artefact(run, against, audits, references, strata, inputs)
    )
    if inputs.as_json:
        print_json({"run": name, "findings": {f.name: _shown(f) for f in findings}})
        return
    rows = [[f.name, _number(f.value), _number(f.reference), _number(f.gap), _interval(f), f.reason or ""] for f in findings]  # fmt: skip
    title = f"run {name}" if against is None else f"{name}, against {against}"
    print_table(title, ["finding", "value", "reference", "gap", "95 %", "reason"], rows)


def _audit_run(
    run: str, audits: str, references: int, strata: str | None, inputs: Inputs
) -> tuple[list[Finding], str]:
    from expunge.cli.common import imported
    from expunge.core.errors import UserError
    from expunge.core.request import Request
    from expunge.store import Store
    from expunge.suite.compare import audit as run_audit
    from expunge.suite.reproduce import problem_of

    given = [n for n in ("workload", "model", "data", "test", "forget", "retain", "label", "ids", "where", "fraction", "prune") if getattr(inputs, n)]  # fmt: skip
    if given:
        raise UserError(
            f"--{given[0]} belongs to a model on disk; a run has its problem and request in its record. "
            "Say --against for a model on disk"
        )
    found = Store.open(inputs.store).get(run)
    if found.kind != "unlearn":
        raise UserError(f"run {found.id} is of kind {found.kind}; audit takes an unlearning run")
    with inputs.bench() as bench:
        recipe = imported(inputs.recipe) if inputs.recipe else None
        problem = problem_of(found.record, bench, recipe)
        request = Request.from_dict(found.record["request"])
        outcome = bench.stored_outcome(found, problem, request)
        findings = run_audit(
            outcome, _audits(audits), references=references, strata=strata, store=bench.store,
            runtime=bench.runtime, run=found.id,
        )  # fmt: skip
    return findings, found.id


def _audit_artefact(
    model: str, against: str, audits: str, references: int, strata: str | None, inputs: Inputs
) -> tuple[list[Finding], str]:
    from dataclasses import replace

    from expunge.core.errors import UserError
    from expunge.suite.foreign import audit_model
    from expunge.workloads import registry

    if inputs.workload is not None or inputs.model is not None:
        raise UserError("--against names the problem; leave --workload and --model out")
    if not Path(model).expanduser().exists():  # before an original is trained for it
        raise UserError(f"there is no model at {model}")
    bundled = against in list(registry) and inputs.data is None
    inputs = (
        replace(inputs, workload=against) if bundled else replace(inputs, model=against)
    )  # fmt: skip
    with inputs.bench() as bench:
        request = inputs.request()
        problem = inputs.problem(bench)
        findings = audit_model(
            model, problem, request, _audits(audits), references=references, strata=strata,
            store=bench.store, runtime=bench.runtime,
        )  # fmt: skip
    return findings, model


@with_inputs
def compare(
    methods: Annotated[str, typer.Option("--methods", help="Names, separated by commas.")],
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "0",
    references: References = 3,
    audits: Audits = "standard",
    strata: StrataOption = None,
    out: Annotated[str, typer.Option("--out", help="Folder for the report.")] = "report",
    *,
    inputs: Inputs,
) -> None:
    """Compare methods on one problem and request, beside retrained references."""
    from expunge.cli.demo import show_comparison
    from expunge.core.errors import SettingError
    from expunge.methods import registry
    from expunge.suite.bench import check_strata
    from expunge.suite.compare import compare as run_compare

    names = method_specs(methods)
    for name in names:
        if name != "original":
            registry.get(str(name))
    try:
        numbers = [int(s) for s in seeds.split(",")]
    except ValueError as error:
        raise SettingError(
            f"--seeds takes whole numbers separated by commas, not {seeds!r}"
        ) from error
    if strata is not None:
        check_strata(strata, inputs.workload)
    with inputs.bench() as bench:
        request = inputs.request()
        problem = inputs.problem(bench)
        found = run_compare(
            problem, request, names, seeds=numbers, references=references, audits=_audits(audits),
            strata=strata, bench=bench,
        )  # fmt: skip
    found.data["command"] = "expunge compare"
    show_comparison(found, Path(out), inputs.as_json)


def reproduce(
    run: Annotated[str, typer.Argument(help="Run id or prefix.")],
    recipe: RecipePath = None,
    device: Device = "cpu",
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Run a record again and compare the weights bit by bit; exit 1 if they differ."""
    from expunge.cli.common import imported
    from expunge.core.errors import ExpungeError
    from expunge.store import Store
    from expunge.suite.reproduce import reproduce as again

    opened = Store.open(store)
    with make_runtime(device) as runtime:
        result = again(opened.get(run), opened, runtime, imported(recipe) if recipe else None)
    if as_json:
        print_json(vars(result))
    else:
        typer.echo(f"run {result.run}")
        typer.echo(f"recorded {result.recorded}\nrepeated {result.repeated}")
        for line in result.differences:
            typer.echo(f"differs: {line}")
    if not result.identical:
        why = "; ".join(result.differences) or "the packages are the same; the processor may not be"
        raise ExpungeError(f"the weights differ from the record ({why})")
    if not as_json:
        typer.echo("identical to the bit")


def _audits(names: str) -> str | list[str]:
    from expunge.audits import SUITES

    return names if names in SUITES else [n.strip() for n in names.split(",") if n.strip()]


LORA_RANK = 8
"""Rank of `--train lora` without a number."""


def _with_train(passed: dict[str, str], train: str | None) -> dict[str, str]:
    from expunge.core.errors import SettingError

    if train is None:
        return passed
    if "train" in passed:
        raise SettingError("train was given twice, as --train and as --set train=")
    return passed | {"train": f"lora({LORA_RANK})" if train.strip() == "lora" else train}


def _answers(outcome: Outcome, device: str) -> dict[str, Any]:
    from expunge.problems.before_after import answers

    return {"answers": answers(outcome, device)}


def _line(text: str, *, end: bool, width: int = 100) -> str:
    words = " ".join(text.split())
    if len(words) <= width:
        return words
    # before a question there may be a long template
    return "…" + words[1 - width :] if end else words[: width - 1] + "…"


def _write(outcome: Outcome, run: str, out: str | None, inputs: Inputs) -> str | None:
    if out is None:
        return None
    model = inputs.model
    if model is None:
        return str(outcome.save(out))
    tokenizer = getattr(outcome.problem, "tokenizer", None)
    if tokenizer is not None:
        from expunge.problems.lm_on_disk import base_name, save_lm

        save_lm(outcome, out, tokenizer, base_name(model, inputs.dtype), run=run)
        return out
    from expunge.problems.models_on_disk import save_image_classifier

    save_image_classifier(outcome.runnable(), out, model, {**outcome.record, "run": run})
    return out


def _shown(finding: Finding) -> dict[str, Any]:
    kept = {k: v for k, v in vars(finding).items() if k not in ("name", "per_sample")}
    return kept | {"gap": finding.gap}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(finding: Finding) -> str:
    return "" if finding.low is None else f"{_number(finding.low)} … {_number(finding.high)}"

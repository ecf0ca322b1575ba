"""`expunge forget-sets`: methods on random forget sets and on both tails of what is hard to unlearn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expunge.cli.common import Seed, is_main, method_specs, print_json, print_table, settings_from
from expunge.cli.options import Inputs, with_inputs

if TYPE_CHECKING:
    from expunge.suite.forget_sets import BySet

SearchOption = Annotated[
    list[str] | None,
    typer.Option("--search", help="A setting of the search, NAME=VALUE; repeatable."),
]


@with_inputs
def forget_sets(
    methods: Annotated[
        str, typer.Option("--methods", help="Names, separated by commas; none: only choose sets.")
    ] = "",
    sets: Annotated[
        str,
        typer.Option(
            "--sets", help="Of low-el2n, worst-case, random, easiest, high-el2n, with commas."
        ),
    ] = "worst-case,random,high-el2n",
    share: Annotated[float, typer.Option("--share", help="Of all samples, in each set.")] = 0.1,
    draws: Annotated[int, typer.Option("--draws", help="Random sets.", min=1)] = 10,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Of each class as many as its share of all.")
    ] = False,
    search: SearchOption = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds, separated by commas.")] = "0",
    references: Annotated[
        int, typer.Option("--references", help="Retrained models a set.", min=1)
    ] = 1,
    out: Annotated[str, typer.Option("--out", help="Folder for the results.")] = "forget-sets",
    seed: Seed = 0,
    *,
    inputs: Inputs,
) -> None:
    """Audit methods on forget sets of different difficulty: random ones and both tails.

    One tail is redundant (a retrained model still knows it), the other memorised (only the forgotten
    samples taught it). --out gets report, picture and a list of ids of each set, which --forget takes.
    """
    from expunge.core.errors import SettingError, UserError
    from expunge.fleet.forget_sets import check_set
    from expunge.fleet.worst_case import Search
    from expunge.methods import registry
    from expunge.suite.forget_sets import by_forget_set

    said = [n for n in ("forget", "label", "ids", "where", "fraction") if getattr(inputs, n) not in (None, [])]  # fmt: skip
    if said:
        raise UserError(f"leave --{said[0]} out: what is forgotten are the sets of --sets")
    names = method_specs(methods)
    for name in names:
        registry.get(str(name))
    kinds = [check_set(s.strip()) for s in sets.split(",") if s.strip()]
    settings = settings_from(search)
    Search.create(settings)  # complain before anything is loaded
    try:
        numbers = [int(s) for s in seeds.split(",")]
    except ValueError as error:
        raise SettingError(f"--seeds takes whole numbers separated by commas, not {seeds!r}") from error  # fmt: skip
    if not 0 < share < 1:
        raise SettingError(f"--share lies between 0 and 1, not {share:g}")
    with inputs.bench(seed) as bench:
        problem = inputs.problem(bench)
        found = by_forget_set(
            problem, names, max(1, round(share * len(problem.train))), kinds, draws=draws,
            balanced=balanced, search=settings, seeds=numbers, references=references, bench=bench,
        )  # fmt: skip
    if is_main():
        _show(found, Path(out), inputs.as_json)


def _show(found: BySet, folder: Path, as_json: bool) -> None:
    from expunge.report.forget_sets import set_picture, set_sentences, set_table

    found.comparison.data["command"] = "expunge forget-sets"
    page = found.comparison.report(folder)
    summary = found.summary()
    document: dict[str, Any] = {
        "sets": found.sets, "summary": summary, "sentences": set_sentences(summary),
        "rows": found.rows, "report": str(page),
        "requests": {n: [r.to_dict() for r in of_kind] for n, of_kind in found.requests.items()},
    }  # fmt: skip
    for name, of_kind in found.requests.items():
        ids = "\n".join(map(str, of_kind[0].ids or ()))
        (folder / f"{name}.csv").write_text(f"id\n{ids}\n")
    (folder / "forget_sets.svg").write_text(set_picture(summary))
    text = [set_table(summary), "", *(f"- {s}" for s in document["sentences"])]
    (folder / "forget_sets.md").write_text("\n".join(text) + "\n")
    (folder / "forget_sets.json").write_text(json.dumps(document, indent=1) + "\n")
    if as_json:
        print_json(document)
        return
    lines = set_table(summary).splitlines()
    heads, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]  # fmt: skip
    print_table("percent; gap to retraining [95 %]", heads, rows)
    for sentence in document["sentences"]:
        typer.echo(f"  {sentence}")
    typer.echo(f"report: {page}")

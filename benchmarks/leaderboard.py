"""One honest leaderboard: every method for classifiers on real problems, beside retraining.

    python benchmarks/leaderboard.py --trials 6 --seeds 0 1 2

Settings come from the same number of trials for every method, on another forget set than the one
reported (`TUNED_ON`). Results are kept in a store and reused, so that the script can be stopped and
goes on, and a method can be added without running the others again. Writes
`benchmarks/results/leaderboard.json`, `docs/leaderboard.md`, `docs/images/leaderboard-*.svg` and the
figures on the methods' pages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import expunge as xp
from expunge.core.errors import ExpungeError
from expunge.methods import registry as methods
from expunge.report.leaderboard import entries, figures, markdown, picture, replace_figures
from expunge.suite.bench import Bench
from expunge.suite.compare import compare, join
from expunge.suite.tune import apart, tune
from expunge.workloads import registry as workloads

ROOT = Path(__file__).parent.parent
TUNED_ON: dict[str, xp.Request | None] = {
    "digits-class": xp.forget(label=7),
    "mnist-class": xp.forget(label=7),
    "mnist-random": None,
    "mnist-mislabelled": None,
}
"""What settings are chosen on, never the reported request; None: another tenth, drawn apart from it."""

TOO_DEAR = dict.fromkeys(
    ("oracle-matching", "datamodel-matching", "dm-direct"),
    "it rests on hundreds of trainings of this network, which take hours here",
)
"""Methods that run on the digits only."""


def suited(problem: xp.Problem, request: xp.Request) -> tuple[list[str], dict[str, str]]:
    """Methods whose needs this problem meets, and why the others are left out."""
    fit, left = [], dict(TOO_DEAR) if problem.name.startswith("mnist") else {}
    for name in methods:
        cls = methods.get(name)
        if name in ("retrain", *left) or cls.domain not in ("general", "classification"):
            continue
        method = cls.create(problem.tuned.get(name, {}))
        try:
            method.check(problem, request)
        except ExpungeError as error:
            left[name] = str(error)
        else:
            fit.append(name)
    return fit, left


def tuned(
    problem: xp.Problem, workload: str, name: str, reported: xp.Request, trials: int, bench: Bench
) -> dict[str, object]:
    """The method with settings tuned under the common budget, or its bundled ones with no trials."""
    if not trials:
        return {"name": name, **problem.tuned.get(name, {})}
    on = TUNED_ON[workload] or apart(problem, reported, 0.1)
    return tune(problem, name, on, reported=reported, trials=trials, bench=bench).spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(TUNED_ON))
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--references", type=int, default=3)
    parser.add_argument("--store", default=str(ROOT / ".expunge" / "leaderboard"))
    parser.add_argument("--no-write", action="store_true", help="fill the store only")
    arguments = parser.parse_args()
    bench = Bench(xp.Store.open(arguments.store), xp.Runtime(threads=1))
    found, left_out = [], {}
    for workload in arguments.workloads:
        problem, request = bench.workload(workload), workloads.get(workload).request
        names, left_out[workload] = suited(problem, request)
        chosen = []
        for name in arguments.methods or names:
            if name not in names:
                continue
            try:
                made = tuned(problem, workload, name, request, arguments.trials, bench)
                compare(
                    problem, request, [made], seeds=arguments.seeds,
                    references=arguments.references, audits=AUDITS, bench=bench,
                )  # fmt: skip
            except ExpungeError as error:
                left_out[workload][name] = str(error)
                print(f"{workload}: {name}: {error}", flush=True)
            else:
                chosen.append(made)
                print(f"{workload}: {made}", flush=True)
        found.append(
            compare(
                problem,
                request,
                chosen,
                seeds=arguments.seeds,
                references=arguments.references,
                audits=AUDITS,
                bench=bench,
            )
        )
    if not arguments.no_write:
        command = f"python benchmarks/leaderboard.py --trials {arguments.trials}"
        write(join(found, command).data, left_out)


AUDITS = ["accuracy", "membership", "cost"]


def write(data: dict, left_out: dict[str, dict[str, str]]) -> None:
    """Write figures, pages and pictures."""
    comparisons = data["comparisons"]
    ranked = [e for c in comparisons for e in entries(c)]
    document = {
        "command": data["command"],
        "expunge": data["expunge"],
        "entries": [vars(e) for e in ranked],
        "settings": {
            c["workload"]: {
                r["method"]: r["settings"].get("in_force", {}) for r in c["rows"] if r["settings"]
            }
            for c in comparisons
        },
        "left_out": left_out,
    }
    results = ROOT / "benchmarks" / "results"
    (results / "leaderboard.json").write_text(json.dumps(document, indent=1) + "\n")
    images = ROOT / "docs" / "images"
    parts = [HEAD.format(command=data["command"])]
    for one in comparisons:
        (images / f"leaderboard-{one['workload']}.svg").write_text(picture(one) + "\n")
        table = markdown([one])
        title, rest = table.split("\n", 1)
        parts += [
            title,
            f"\n![Distance to retraining on {one['workload']}](images/leaderboard-{one['workload']}.svg)",
            rest,
        ]
        missing = left_out.get(one["workload"], {})
        parts += [f"- `{name}` is not here: {why}" for name, why in sorted(missing.items())]
    (ROOT / "docs" / "leaderboard.md").write_text("\n".join(parts).rstrip() + "\n")
    for name in methods:
        page = ROOT / "docs" / "methods" / f"{name}.md"
        if name not in NO_FIGURES:
            page.write_text(replace_figures(page.read_text(), figures(ranked, name)))


NO_FIGURES = ("retrain", "blindspot", "gaussian-amnesiac")
"""What the others are held against, and methods for other problems."""


HEAD = """# Leaderboard

Made by `{command}`; do not edit. Every method got the same number of tuning trials, on another forget set
than the one reported; the settings in force are in `benchmarks/results/leaderboard.json`. The distance is the mean
absolute gap to retrained models over the accuracies on forgotten and kept data and the membership
AUC; the dashed line in a picture is doing nothing. *Retrain once more* is a retrained model that is held against the others: nearer than
that is luck. The interval is over the method's own seeds: there is one original model, one forget set, and the same references and test samples for all.
A method that forgets *more* than retraining is marked over-forgotten. Costs are CPU seconds over those of a retraining and leave out
what is prepared once for all requests (the datamodels). Settings tuned on one class need not carry over to another: that is part of the result.
"""


if __name__ == "__main__":
    main()

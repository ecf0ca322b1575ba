"""WORST-CASE-FORGET on 4,000 MNIST digits: sets of 400 to forget from both tails, three seeds.

Five kinds of set, and the search at other steps of its upper level. Writes
benchmarks/results/worst_case_forget.json, .md and a picture.
"""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from _results import RESULTS, must_be_seen, write
from torch import nn

import expunge as xp
from expunge.core.hashing import plain
from expunge.fleet.forget_sets import forget_set
from expunge.report.forget_sets import ORDER, set_picture, set_sentences, set_table
from expunge.suite.bench import Bench
from expunge.suite.forget_sets import by_forget_set, summarise
from expunge.workloads import mnist

pytestmark = pytest.mark.acceptance
SEEDS = (0, 1, 2)
SIZE = 400
SEARCH = {"lr": 2e-4, "rounds": 15}
RATES = (100.0, 1.0, 0.01)
METHODS = (
    {"name": "finetune", "epochs": 4, "lr": 0.05},
    {"name": "random-label", "epochs": 5, "lr": 0.02},
)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def of_one_seed(seed: int, store) -> dict:
    data = mnist.splits()
    recipe = xp.ClassifierRecipe(perceptron, data.train, epochs=15, lr=0.05)
    problem = xp.Classification(
        recipe(data.train.ids, seed), data.train, data.test, recipe=recipe, name="mnist-perceptron"
    )
    bench = Bench(store, xp.Runtime(seed=seed, threads=1))
    whole = by_forget_set(problem, METHODS, SIZE, ORDER, draws=1, search=SEARCH, bench=bench)
    rows = [r | {"draw": seed} for r in whole.rows]
    easy = forget_set(problem, "low-el2n", SIZE, store=store, runtime=bench.runtime)
    low = easy.resolve(problem.train)
    searches = {}
    for rate in (None, *RATES):
        how = SEARCH | {"rate": rate}
        found = xp.worst_case(problem, SIZE, store=store, runtime=bench.runtime, **how)
        one = by_forget_set(problem, METHODS, SIZE, ["worst-case"], search=how, bench=bench)
        labels = problem.train.labels_of(found.found)
        searches["default" if rate is None else f"{rate:g}"] = {
            "rate": found.rate,
            "objective": found.objective,
            "overlap with low-el2n": float(torch.isin(found.found, low).double().mean()),
            "overlap with its start": float(torch.isin(found.found, found.start).double().mean()),
            "per class": labels.bincount(minlength=10).tolist(),
        } | {r["method"]: {f: r[f]["value"] for f in ("UA", "MIA", "RA", "TA")} for r in one.rows}
    return {"rows": rows, "sets": whole.sets, "searches": searches}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    torch.set_num_threads(1)
    store = xp.Store.open(tmp_path_factory.mktemp("store"))
    runs = [of_one_seed(seed, store) for seed in SEEDS]
    summary = summarise([r for run in runs for r in run["rows"]])
    rows = [
        (sentence, " / ".join(f"{v:.3g}" for v in values), holds)
        for source in (expectations, told)
        for sentence, values, holds in source((summary, runs))
    ]
    kept = {"seeds": SEEDS, "search": SEARCH, "methods": METHODS, "summary": summary, "runs": runs}
    write("worst_case_forget", plain(kept), rows, more=words(summary, runs))
    picture = set_picture(summary).replace("<svg ", "<svg style='font: 12px sans-serif' ")
    (RESULTS / "worst_case_forget.svg").write_text(picture)
    return summary, runs


def words(summary, runs) -> str:
    lines = [
        "In percent, means over seeds: value; gap to a model retrained without the set [95 %].",
        "",
        set_table(summary),
        "",
        *(f"- {sentence}" for sentence in set_sentences(summary)),
        "",
        "The search at other steps of its upper level (UA / MIA in percent; means over seeds):",
        "",
        "| step | objective | overlap with low-el2n | with its random start | retrain | finetune | random-label |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate in runs[0]["searches"]:
        ones = [run["searches"][rate] for run in runs]
        first, last = (fmean(o["objective"][at] for o in ones) for at in (0, -1))
        cells = [
            f"{100 * fmean(o[m]['UA'] for o in ones):.1f} / {100 * fmean(o[m]['MIA'] for o in ones):.1f}"
            for m in ("retrain", "finetune", "random-label")
        ]
        shown = [f"{rate} ({fmean(o['rate'] for o in ones):.3g})", f"{first:.3g} → {last:.2g}"]
        shown += [
            f"{100 * fmean(o[f'overlap with {what}'] for o in ones):.0f} %"
            for what in ("low-el2n", "its start")
        ]
        lines.append(f"| {' | '.join([*shown, *cells])} |")
    return "\n".join(lines)


def expectations(found):
    """What the card says must be seen, in percent, and what else it measured."""
    summary, runs = found

    def mean(name, method, figure):
        row = next(r for r in summary if (r["set"], r["method"]) == (name, method))
        return 100 * row[figure]["value"]

    def searched(rate, method, figure):
        return 100 * fmean(run["searches"][rate][method][figure] for run in runs)

    random = mean("random", "retrain", "UA")
    for rate in ("default", "100"):
        values = [searched(rate, "retrain", "UA"), random]
        yield f"Retrained UA on the searched set (step {rate}) at most a third of random", values, values[0] <= random / 3  # fmt: skip
    for rate in ("default", "100"):
        values = [searched(rate, m, "MIA") for m in ("random-label", "retrain")]
        yield f"Random labels' MIA far above the retrained model's on the searched set (step {rate})", values, values[0] >= values[1] + 10  # fmt: skip
    values = [100 * fmean(run["searches"]["100"]["overlap with low-el2n"] for run in runs)]
    yield "Overlap of the searched set (step 100) with the lowest-EL2N tenth well above 10", values, values[0] >= 20  # fmt: skip
    values = [mean("low-el2n", "retrain", "UA"), random, mean("high-el2n", "retrain", "UA")]
    yield "Retrained UA: lowest EL2N near 0, random, highest EL2N far above", values, values[0] < 1 and values[2] > 3 * random  # fmt: skip
    values = [mean("easiest", "retrain", "UA")]
    yield "The search turned round finds the other tail", values, values[0] > 3 * random
    ends = [fmean(run["searches"]["100"]["objective"][at] for run in runs) for at in (0, -1)]
    yield "The objective falls tenfold (step 100)", ends, ends[1] < ends[0] / 10
    values = [100 * fmean(run["searches"]["0.01"]["overlap with its start"] for run in runs)]
    yield "The released step of 0.01 hardly moves w: the set is its random start", values, values[0] > 90  # fmt: skip


def told(found):
    """The same at step 1, where nearly all of the set is its random start: told, not tested."""
    ones = [run["searches"]["1"] for run in found[1]]
    values = [100 * fmean(one[m]["MIA"] for one in ones) for m in ("random-label", "retrain")]
    yield "Random labels' MIA 10 points above the retrained model's at step 1 (card 22.8 / 10.5; not tested)", values, values[0] >= values[1] + 10  # fmt: skip


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 9)

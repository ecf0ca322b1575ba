"""UNEM on the digits: a class that the output has forgotten comes back from five samples.

Three seeds of a network 64-128-64-10 that is to forget the nines. Writes benchmarks/results/unem.json
and .md.
"""

from __future__ import annotations

import copy

import pytest
import torch
from _results import must_be_seen, write
from _tricks import mask
from torch import nn

import expunge as xp
from expunge.core.audit import Subject
from expunge.core.data import Data

pytestmark = pytest.mark.acceptance
SEEDS = (0, 1, 2)
MODELS = ("original", "masked", "relabel", "finetune", "retrained", "random")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def problem(seed: int) -> xp.Classification:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16).float(), torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    half = len(y) // 2
    train, test = (Data((x[o], y[o])) for o in (order[:half], order[half:]))
    recipe = xp.ClassifierRecipe(network, train, epochs=40, lr=0.1, batch_size=64)
    return xp.Classification(recipe(train.ids, seed), train, test, recipe=recipe)


def models(of: xp.Classification, request: xp.Request, seed: int) -> dict[str, nn.Module]:
    torch.manual_seed(100 + seed)
    runtime = xp.Runtime(seed=seed, threads=1)
    # labels other than the true one: with it among them, as in random-label, a tenth goes on being
    # called so; epochs and rate were chosen on seeds 10 to 12
    relabel = xp.methods.Amnesiac(epochs=30, lr=1e-3, batch_size=64)
    finetune = xp.methods.FineTune(epochs=10, lr=0.1, batch_size=64)
    return {
        "original": of.model,
        "masked": mask(copy.deepcopy(of.model), "4", [9]),
        "relabel": xp.unlearn(of, request, relabel, runtime=runtime).model,
        "finetune": xp.unlearn(of, request, finetune, runtime=runtime).model,
        "retrained": of.recipe(of.train.without(request.resolve(of.train)), 1000 + seed),
        "random": copy.deepcopy(network()).eval(),
    }


@pytest.fixture(scope="module")
def seen():
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    curves: dict[str, list[list[float]]] = {name: [] for name in MODELS}
    for seed in SEEDS:
        of, request = problem(seed), xp.forget(label=9)
        for name, model in models(of, request, seed).items():
            runtime = xp.Runtime(seed=seed, threads=1)
            subject = Subject(model, of, request, runtime)
            found = {f.name: f for f in xp.audits.Recovery(tasks=200).run(subject, [], runtime)}
            head = (subject.logits("forget-test").argmax(1) == 9).float().mean()
            runs[name].append(
                {"head": float(head)}
                | {n.removeprefix("recovery/"): float(f.value) for n, f in found.items()}
            )
            curves[name].append(found["recovery/forget"].detail["values"])
    shots = found["recovery/forget"].detail["shots"]
    rows = {
        name: {key: sum(run[key] for run in each) / len(each) for key in each[0]}
        for name, each in runs.items()
    }
    data = {"rows": rows, "runs": runs, "shots": shots, "curves": curves}
    shown = [
        (sentence, " / ".join(f"{v:.3f}" for v in values), holds)
        for sentence, values, holds in expectations(rows)
    ]
    write("unem", data, shown, more=table(rows))
    return rows


def table(rows) -> str:
    keys = ("head", "forget-prototype", "forget", "retain-prototype", "retain")
    lines = [
        f"Means over {len(SEEDS)} seeds; 5 shots.",
        "",
        f"| model | {' | '.join(keys)} |",
        "|---|" + "---|" * len(keys),
    ]
    lines += [
        f"| {name} | {' | '.join(f'{row[k]:.3f}' for k in keys)} |" for name, row in rows.items()
    ]
    return "\n".join(lines)


def expectations(rows):
    relabel, retrained = rows["relabel"], rows["retrained"]
    gap = relabel["forget"] - retrained["forget"]
    heads = [relabel["head"], retrained["head"]]
    yield "the output of relabelled and retrained models never says the class", heads, max(heads) <= 0.02  # fmt: skip
    yield "recovery of the relabelled model is .30 above the retrained one's", [gap], gap >= 0.3
    gap = abs(rows["masked"]["forget"] - rows["original"]["forget"])
    yield "a masked output changes recovery by at most .03", [gap], gap <= 0.03
    for name in MODELS[:-1]:
        values = [rows[name]["retain"], rows[name]["retain-prototype"]]
        yield f"{name}: learnt turns beat the nearest prototype on kept classes", values, values[0] > values[1]  # fmt: skip


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 8)

"""The small-scale run of the card truly-forgetting: who agrees with a retrained model in features as well?

Digits, classes 7, 8 and 9 forgotten; the original, a second retrained model, fine-tuning, gradient ascent, labels
of the next best kept class (PL), and the last layer alone trained anew on kept data, each held against the first
retrained model by the audit `representation`, whose probes know the training images. Four seeds. Writes
benchmarks/results/truly_forgetting.json and .md.
"""

from __future__ import annotations

import copy
from statistics import fmean

import pytest
import torch
from _results import must_be_seen, write
from torch.nn.functional import cross_entropy

import expunge as xp
from expunge.workloads.corrupted import _digits
from expunge.workloads.nets import DigitsCNN

pytestmark = pytest.mark.acceptance
FORGET, SEEDS = (7, 8, 9), (0, 1, 5, 6)  # 2 to 4 were those on which settings were looked for
MODELS = ("original", "retrain #2", "fine-tune", "GA", "PL", "head-only")
SCORES = ("agl", "knn", "probe", "cka", "cka-original", "agr", "h-lr")


def recipe_for(train: xp.Data) -> xp.ClassifierRecipe:
    return xp.ClassifierRecipe(
        DigitsCNN, train, epochs=25, lr=1e-3, batch_size=64, step="adam", weight_decay=0.0
    )  # fmt: skip


def next_best(problem, request, runtime) -> torch.nn.Module:
    """PL: the forget data alone, under the label of the kept class the original likes best."""
    model, data = copy.deepcopy(problem.model), problem.train
    ids = request.resolve(data)
    with torch.no_grad():
        logits = problem.model(data.fetch(ids).x)
        logits[:, list(FORGET)] = -torch.inf
    labels = dict(zip(ids.tolist(), logits.argmax(1).tolist(), strict=True))
    step = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    for epoch in range(5):
        for batch in data.batches(64, ids, runtime.generator("pl", epoch)):
            y = torch.tensor([labels[i] for i in batch.ids.tolist()])
            step.zero_grad()
            cross_entropy(model(batch.x), y).backward()
            step.step()
    return model.eval()


def run(seed: int) -> list[dict]:
    """Every model of one original beside one retrained model."""
    train, test = (xp.Data(pair) for pair in _digits())
    recipe, request, runtime = recipe_for(train), xp.forget(label=FORGET), xp.Runtime(seed=seed, threads=1)  # fmt: skip
    problem = xp.Classification(recipe(train.ids, seed), train, test, recipe=recipe)
    keep = train.without(request.resolve(train))
    reference, second = (recipe(keep, 1001 + 10 * seed + i) for i in range(2))
    methods = {
        "fine-tune": xp.methods.FineTune(epochs=5, lr=1e-3, step="adam", batch_size=64, weight_decay=0.0),
        "GA": xp.methods.GradientAscent(epochs=5, lr=1e-3, batch_size=64),
        "head-only": xp.methods.FineTune(
            epochs=20, lr=1e-2, step="adam", batch_size=64, weight_decay=0.0, train="last(1)", reset=True
        ),
    }  # fmt: skip
    models = {name: xp.unlearn(problem, request, m, runtime=runtime).runnable() for name, m in methods.items()}  # fmt: skip
    models |= {"original": problem.model, "retrain #2": second}
    models["PL"] = next_best(problem, request, runtime)
    against = [xp.Subject(reference, problem, request, runtime)]
    rows = []
    for name in MODELS:
        subject = xp.Subject(models[name], problem, request, runtime)
        found = {f.name.split("/")[1]: f for f in xp.audits.Representation(known="training").run(subject, against, runtime)}  # fmt: skip
        row = {"model": name, "seed": seed, "cka": found["agl"].detail["cka"]}
        row |= {what: f.value for what, f in found.items()}
        rows.append(row | {"reference_probe": found["probe"].reference})
    return rows


@pytest.fixture(scope="module")
def seen():
    rows = [r for seed in SEEDS for r in run(seed)]
    shown = [
        (sentence, " / ".join(f"{v:.3f}" for v in values), holds)
        for source in (expectations, told)
        for sentence, values, holds in source(rows)
    ]
    write("truly_forgetting", {"rows": rows}, shown, more=table(rows))
    return rows


def of(rows, model, what):
    return [r[what] for r in rows if r["model"] == model]


def table(rows) -> str:
    lines = [
        f"Seeds {', '.join(map(str, SEEDS))}; features of test images of 7, 8 and 9; CKA is the debiased one. PROBE and KNN are fitted on the 355 training images "
        "of these classes and asked about all 178 (`known=training`): of a fifth, 36, one image is worth .03.",
        "", f"| model | {' | '.join(s.upper() for s in SCORES)} |", "|---|" + "---|" * len(SCORES),
    ]  # fmt: skip
    for model in MODELS:
        cells = [" / ".join(f"{v:.2f}" for v in of(rows, model, what)) for what in SCORES]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def expectations(rows):
    values = of(rows, "head-only", "agl")
    yield "a new last layer alone has AGL > .97", values, min(values) > 0.97
    values = of(rows, "head-only", "cka-original")
    yield "its features are the original's: CKA 1", values, all(abs(v - 1) < 1e-9 for v in values)
    for number, seed in enumerate(SEEDS):
        values = [of(rows, m, "h-lr")[number] for m in ("retrain #2", *(m for m in MODELS if m != "retrain #2"))]  # fmt: skip
        yield f"the second retrained model has the best H-LR, seed {seed}", values, values[0] > max(values[1:])  # fmt: skip
    values = [fmean(of(rows, m, "probe")) for m in MODELS] + [fmean(r["reference_probe"] for r in rows)]  # fmt: skip
    yield "a linear probe on the forgotten classes stays above .94 for all models, retrained ones too: means over seeds", values, min(values) > 0.94  # fmt: skip


def told(rows):
    """The same of every model by itself, of 178 images each; told, not tested: with .96 one in ten has 167 or fewer."""
    values = [min(of(rows, m, "probe")) for m in MODELS] + [min(r["reference_probe"] for r in rows)]
    yield "and for each seed by itself (not tested)", values, min(values) > 0.94


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 7)

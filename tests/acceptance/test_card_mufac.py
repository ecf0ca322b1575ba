"""People to forget, as in MUFAC: writers of digits and people of MovieLens, and the score with its two parts.

The card's small run on 60 invented writers (two seeds, methods as bundled, i.e. tuned on other writers), and beside
it the same with real people: 100 of 643 of MovieLens-100k. Writes benchmarks/results/mufac.json and .md.
"""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from _results import must_be_seen, write
from torch import nn

import expunge as xp
from expunge.workloads import registry

pytestmark = pytest.mark.acceptance
SEEDS = {"digits-people": (0, 1), "movielens-people": (0,)}
METHODS = ("finetune", "gradient-ascent", "neggrad-plus")
NAMES = {"gradient-ascent": "NegGrad", "neggrad-plus": "Advanced NegGrad", "finetune": "fine-tune"}
ROWS = ("original", "retrain", "fine-tune", "NegGrad", "Advanced NegGrad", "constant")


class Constant(nn.Module):
    """One answer for everything, with the same loss whatever the label."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(classes))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def run(name: str, seed: int) -> list[dict]:
    """Every model of one original, measured beside two retrained ones."""
    workload, runtime = registry.get(name), xp.Runtime(seed=seed, threads=1)
    problem, request = workload.problem(seed), workload.request
    keep = problem.train.without(request.resolve(problem.train))
    retrained = [problem.recipe(keep, 1001 + 10 * seed + i) for i in range(3)]
    models = {"original": problem.model, "retrain": retrained[0], "constant": Constant(problem.classes)}  # fmt: skip
    for method in METHODS:
        settings = workload.tuned[method]
        tuned = xp.methods.registry.get(method).create(settings)
        models[NAMES[method]] = xp.unlearn(problem, request, tuned, runtime=runtime).runnable()
    references = [xp.Subject(m, problem, request, runtime) for m in retrained[1:]]
    rows = []
    for who, model in models.items():
        subject = xp.Subject(model, problem, request, runtime)
        found = {f.name.split("/")[1]: f for f in xp.audits.NoMUS().run(subject, references, runtime)}  # fmt: skip
        score, mia, tested = (found[n] for n in ("score", "mia", "accuracy-retain-test"))
        right = subject.logits("forget-train").argmax(1) == subject.labels("forget-train")
        rows.append(
            {
                "model": who, "seed": seed, "nomus": score.value, "nomus_low": score.low,
                "nomus_high": score.high, "accuracy": tested.value, "mia": mia.detail["mia"], "mia_two_sided": mia.value,
                "mia_low": mia.low, "mia_high": mia.high, "sided": mia.detail["auc"],
                "reference_nomus": score.reference, "reference_accuracy": tested.reference,
                "reference_mia": mia.reference, "forget_accuracy": float(right.float().mean()),
                "units": mia.detail["units"], "same_answer": score.detail["same_answer"],
            }
        )  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def seen():
    rows = {name: [r for s in seeds for r in run(name, s)] for name, seeds in SEEDS.items()}
    shown = [
        (sentence, " / ".join(f"{v:.2f}" for v in values), holds)
        for sentence, values, holds in expectations(rows)
    ]
    write("mufac", {"rows": rows}, shown, more="\n\n".join(table(n, r) for n, r in rows.items()))
    return rows


def of(rows, model, what, seed=None):
    return [r[what] for r in rows if r["model"] == model and seed in (None, r["seed"])]


def table(name, rows) -> str:
    lines = [
        f"**{name}**, seeds {', '.join(map(str, SEEDS[name]))}. M: held-out accuracy of telling the forgotten from unseen people, "
        "two-sided, with its 95 % interval over people. *constant* gives all classes the same logit.",
        "", "| model | NoMUS | accuracy on other people | M | accuracy on the forgotten |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for model in ROWS:
        there = [r for r in rows if r["model"] == model]
        cells = [
            " / ".join(f"{r['nomus']:.2f} ({r['nomus_low']:.2f}–{r['nomus_high']:.2f})" for r in there),
            " / ".join(f"{r['accuracy']:.2f}" for r in there),
            " / ".join(f"{r['mia_two_sided']:.2f} ({r['mia_low']:.2f}–{r['mia_high']:.2f})" for r in there),
            " / ".join(f"{r['forget_accuracy']:.2f}" for r in there),
        ]  # fmt: skip
        lines.append(f"| {model} | {' | '.join(cells)} |")
    floor = " / ".join(f"{v:.2f}" for v in of(rows, "original", "reference_mia"))
    best = " / ".join(f"{v:.2f}" for v in of(rows, "original", "same_answer"))
    told = f"Floor: M of two more retrained models, two-sided, {floor}. The commonest class as the one answer: NoMUS {best}."
    return "\n".join([*lines, "", told])


def expectations(rows):
    digits, films = rows["digits-people"], rows["movielens-people"]
    for seed in SEEDS["digits-people"]:
        values = [of(digits, m, "nomus", seed)[0] for m in ("retrain", "Advanced NegGrad", "original")]  # fmt: skip
        yield f"retrain > Advanced NegGrad > original, seed {seed}", values, values[0] > values[1] > values[2]  # fmt: skip
        values = [of(digits, m, "mia", seed)[0] for m in ("original", "fine-tune")]
        yield f"fine-tuning does not move the MIA (by .04 or more), seed {seed}", values, abs(values[0] - values[1]) < 0.04  # fmt: skip
        values = [of(digits, m, w, seed)[0] for w in ("mia", "accuracy") for m in ("original", "NegGrad")]  # fmt: skip
        repaired, destroyed = abs(values[1] - 0.5) < abs(values[0] - 0.5) / 2, values[3] < values[2] / 2  # fmt: skip
        yield f"NegGrad repairs the MIA by destroying accuracy, seed {seed}", values, repaired and destroyed  # fmt: skip
        values = [of(digits, m, "nomus", seed)[0] for m in ("constant", "original")]
        yield f"the constant model is no worse than the original, seed {seed}", values, values[0] >= values[1]  # fmt: skip
    values = of(digits, "constant", "mia") + of(films, "constant", "mia")
    yield "the constant model has M = ½ exactly", values, set(values) == {0.5}
    values = [fmean(of(films, m, "mia")) for m in ("original", "retrain")]
    yield "real people are remembered, and not by a retrained model", values, values[0] > 0.6 and abs(values[1] - 0.5) < 0.05  # fmt: skip


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 10)

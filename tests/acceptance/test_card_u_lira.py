"""The small-scale U-LiRA of the card baselines-vision: 300 digits, 33 of them eights, 240 shadow models.

Writes benchmarks/results/u_lira.json and .md.
"""

from __future__ import annotations

import pytest
import torch
from _results import must_be_seen, write
from torch import nn

import expunge as xp
from expunge.audits.u_lira import ULiRA
from expunge.workloads.digits import splits

pytestmark = pytest.mark.acceptance

METHODS = {
    "original": {},
    "retrain": {},
    "finetune": {"epochs": 5, "lr": 0.02, "batch_size": 32},
    "gradient-ascent": {"epochs": 5, "lr": 0.037, "batch_size": 32},
}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.fixture(scope="module")
def seen():
    """Findings of each method; everything is written, whether it holds or not."""
    data = splits()
    eights, others = (data.train.ids[(data.train.labels == 8) == want] for want in (True, False))
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:267]
    train = data.train.only(torch.cat([eights[:33], others[drawn]]))
    recipe = xp.ClassifierRecipe(mlp, train, epochs=30, lr=0.1, batch_size=32, weight_decay=0.0)
    problem = xp.Classification(
        recipe(train.ids, 0), train, data.test, recipe=recipe, tuned=METHODS
    )
    runtime, request = xp.Runtime(threads=1), xp.forget(label=8)
    subject = xp.Subject(problem.model, problem, request, runtime)
    keep = train.without(request.resolve(train))
    reference = xp.Subject(recipe(keep, 1001), problem, request, runtime)
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        audit = ULiRA(models=240, targets=40, method=method)
        with runtime.metered() as cost:
            findings = {f.name.split("/")[1]: f for f in audit.run(subject, [], runtime)}
        auc, balanced = findings["auc"], findings["balanced-accuracy"]
        found[method] = {
            "auc": auc.detail["auc"],
            "low": auc.low,
            "high": auc.high,
            "balanced accuracy": balanced.detail["balanced_accuracy"],
            "tpr at 1 %": findings["tpr-at-0.01"].value,
            "retain accuracy": auc.detail["retain_accuracy"],
            "seconds": cost.seconds,
        }
    attack = xp.audits.Membership(scores=("loss",), attackers=())
    (loss, *_) = attack.run(subject, [reference], runtime)
    found["population loss attack"] = {"original": loss.original, "retrain": loss.reference}
    rows = [(s, " / ".join(f"{v:.3f}" for v in values), ok) for s, values, ok in expectations(found)]  # fmt: skip
    write("u_lira", {"methods": METHODS, "findings": found}, rows)
    return found


def expectations(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    nothing, retrain, tuned, ascent = (found[m] for m in METHODS)
    pairs = [v for m in (nothing, retrain, tuned, ascent) for v in (m["balanced accuracy"], m["auc"])]  # fmt: skip
    yield "do nothing .75/.84, retrain .50/.49, FT .72/.81, GA .52/.52 (card, balanced accuracy/AUC): do nothing ≥ FT > GA", pairs, nothing["auc"] + 0.03 >= tuned["auc"] > ascent["auc"]  # fmt: skip
    error = (retrain["high"] - retrain["auc"]) / 1.96
    yield "retraining within 3 standard errors of ½", [retrain["auc"], error], abs(retrain["auc"] - 0.5) < 3 * error  # fmt: skip
    yield "doing nothing clearly above ½", [nothing["low"]], nothing["low"] > 0.65
    yield "FT nearer to doing nothing than to retraining", [tuned["auc"]], tuned["auc"] > (nothing["auc"] + retrain["auc"]) / 2  # fmt: skip
    yield "GA nearer to retraining than to doing nothing", [ascent["auc"]], ascent["auc"] < (nothing["auc"] + retrain["auc"]) / 2  # fmt: skip
    kept = [m["retain accuracy"] for m in (nothing, ascent)]
    yield "but GA loses retain accuracy (card: 1.0 → .83)", kept, kept[1] < kept[0] - 0.05
    loss = found["population loss attack"]
    yield "a threshold on the loss sees less of doing nothing than U-LiRA", [loss["original"], nothing["auc"]], loss["original"] < nothing["auc"]  # fmt: skip


test_u_lira_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 7)

"""Calibration and power of every membership audit of classifiers, regressors and language models.

Nothing to find: a retrained model is audited beside another one, forty times with samples, halves, shadow
models and seeds of its own. Something to find: an original that was trained on label-noised duplicates, of
which forty are to be forgotten and two hundred others were never seen. Writes
benchmarks/results/calibration.json and .md and the tables of docs/audits/calibration.md.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from _results import must_be_seen, write
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

import expunge as xp
from expunge.audits._shadow_attack import useless
from expunge.audits.u_lira import ULiRA
from expunge.fleet.subsets import train_many
from expunge.problems.causal_lm import CausalLM
from expunge.problems.tokens import TokenData, Tokens
from expunge.train.lm_recipe import LMRecipe
from expunge.workloads.nets import diabetes_mlp, small_llama

pytestmark = pytest.mark.acceptance

SEEDS = range(40)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "audits" / "calibration.md"
LIKELY = 6
"""So many alarms of forty or fewer are seen in 997 of 1,000 calibrated tests."""
STRONG = ("lira/auc-online", "rmia/auc-online", "u-lira/auc", "membership/auc-loss", "residual-membership/auc", "text-membership/auc-loss")  # fmt: skip
U_LIRA = ULiRA(method="original", models=40, targets=14, fprs=(0.1,))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits(seed: int, planted: bool):
    """300 training and as many test digits, drawn anew; 40 to forget.

    Planted: the forty are noisy copies of other training digits with a wrong label, and the test data
    are copies of that kind that nothing was trained on.
    """
    x, y = (torch.as_tensor(v) for v in load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(seed)
    x, y = (x / 16).float(), y.long()
    order = torch.randperm(len(x), generator=g)
    if not planted:
        train, test = order[:300], order[300:600]
        return xp.Data((x[train], y[train])), xp.Data((x[test], y[test])), range(40)
    clean = order[:300]
    copies = x[clean] + 0.1 * torch.randn(300, 64, generator=g)
    wrong = (y[clean] + torch.randint(1, 10, (300,), generator=g)) % 10
    inputs, labels = torch.cat([copies[:40], x[clean]]), torch.cat([wrong[:40], y[clean]])
    return xp.Data((inputs, labels)), xp.Data((copies[40:], wrong[40:])), range(40)


def classifiers(seed: int, planted: bool):
    train, test, forget = digits(seed, planted)
    recipe = xp.ClassifierRecipe(mlp, train, epochs=20, lr=0.2, batch_size=50, weight_decay=0.0)
    runtime, request = xp.Runtime(seed=seed, threads=1), xp.forget(ids=list(forget))
    keep = train.without(request.resolve(train))
    bare = xp.Classification(mlp(), train, test, recipe=recipe)
    seeds = [runtime.seed_for("model", n) for n in range(3)]
    original, *retrained = [
        *train_many(bare, [train.ids], seeds[:1], runtime, "original"),
        *train_many(bare, [keep] * 2, seeds[1:], runtime, "retrained"),
    ]
    problem = xp.Classification(original, train, test, recipe=recipe)
    models = [original, *retrained] if planted else retrained
    subject, *references = [xp.Subject(m, problem, request, runtime) for m in models]
    audits = [
        xp.audits.Membership(nonmembers="test"),
        xp.audits.LiRA(models=32, nonmembers="test", fprs=(0.1, 0.01)),
        xp.audits.RMIA(models=32, nonmembers="test", fprs=(0.1,)),
    ]
    found = [f for audit in audits for f in audit.run(subject, references[:1], runtime)]
    return found + u_lira(subject, "before" if planted else "retrained", runtime)


def u_lira(subject, what: str, runtime):
    """The audit of leaving models as they are, or of retraining them, all of them at once."""
    made = U_LIRA._runs(subject, None, runtime)
    told = U_LIRA._tell(made, what, torch.arange(40))
    names = ["u-lira/auc", "u-lira/balanced-accuracy", "u-lira/tpr-at-0.1"]
    assert not isinstance(told, str) and not useless(told.positive, told.negative)
    return U_LIRA._findings(names, told, told, told, {})


def regressors(seed: int, planted: bool):
    x, y = load_diabetes(return_X_y=True)
    x = torch.as_tensor(x / x.std(0)).float()
    y = torch.as_tensor((y - y.mean()) / y.std()).float()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    one, two = order[:200], order[200:400]
    inputs, targets, held = x[one], y[one], (x[two], y[two])
    if planted:
        copies = x[one] + 0.1 * torch.randn(200, 10, generator=g)
        noisy = y[one][torch.randperm(200, generator=g)]
        inputs, targets = torch.cat([copies[:40], x[one]]), torch.cat([noisy[:40], y[one]])
        held = copies[40:], noisy[40:]
    train, test = xp.Data((inputs, targets)), xp.Data(held)
    # in 80 epochs it learns some of them by heart, which left 32 of 40 to be found; chosen on other seeds
    recipe = xp.RegressorRecipe(
        diabetes_mlp, train, epochs=240, lr=1e-2, batch_size=50, step="adam"
    )
    request, runtime = xp.forget(ids=list(range(40))), xp.Runtime(seed=seed, threads=1)
    keep = train.without(request.resolve(train))
    problem = xp.Regression(recipe(train.ids, seed), train, test, recipe=recipe)
    models = [recipe(keep, 1000 + seed), recipe(keep, 2000 + seed)]
    models = [problem.model, *models] if planted else models
    subject, *references = [xp.Subject(m, problem, request, runtime) for m in models]
    audit = xp.audits.ResidualMembership(nonmembers="test")
    return audit.run(subject, references[:1], runtime)


def lm() -> nn.Module:
    return small_llama(40, 32, 1, 64, context=16)


def texts(seed: int, planted: bool):
    """120 training and as many other texts of random words, drawn anew; 40 to forget.

    Planted: they were trained on, and can only be known by heart; the others are of the same kind.
    """
    g = torch.Generator().manual_seed(seed)
    answered = torch.arange(13) >= 4
    words = torch.cat([torch.ones(240, 1).long(), torch.randint(4, 40, (240, 12), generator=g)], 1)
    train, held = (
        TokenData([Tokens(row, answered) for row in words[part]], filler=0, ids=list(range(240))[part])
        for part in (slice(0, 120), slice(120, None))
    )  # fmt: skip
    recipe = LMRecipe(lm, train, epochs=20, lr=5e-3, batch_size=30, warmup=0, clip=None)
    request, runtime = xp.forget(ids=list(range(40))), xp.Runtime(seed=seed, threads=1)
    keep = train.without(request.resolve(train))
    models = [recipe(keep, 1000 + seed), recipe(keep, 2000 + seed)]
    problem = CausalLM(recipe(train.ids, seed) if planted else models[0], train, held, recipe=recipe)  # fmt: skip
    models = [problem.model, *models] if planted else models
    subject, *references = [xp.Subject(m, problem, request, runtime) for m in models]
    return xp.audits.TextMembership().run(subject, references[:1], runtime)


def alarm(f) -> bool:
    """Whether the interval of a finding excludes what is found where nothing is.

    Chance for AUCs and accuracies, α for rates, the other retrained model for attackers fitted on other
    data and for the leak, which is relative to it.
    """
    if "efficacy" in f.name or f.name.endswith(("/svc", "/privleak")):
        return not f.low <= f.reference <= f.high
    return f.low > (float(f.name.rpartition("-at-")[2]) if "-at-" in f.name else 0.5)


@pytest.fixture(scope="module")
def seen():
    """Alarms by finding; everything is written, whether it holds or not."""
    torch.set_num_threads(1)
    values: dict = defaultdict(lambda: {"null": [], "planted": []})
    for seed in SEEDS:
        for kind, planted in (("null", False), ("planted", True)):
            for f in [*classifiers(seed, planted), *regressors(seed, planted), *texts(seed, planted)]:  # fmt: skip
                if f.value is not None:
                    values[f.name][kind].append((f.value, alarm(f)))
    found = {
        name: {
            kind: {
                "runs": len(of),
                "alarms": sum(a for _, a in of),
                "mean": float(np.mean([v for v, _ in of])) if of else None,
            }
            for kind, of in by.items()
        }
        for name, by in values.items()
    }
    rows = [(s, " / ".join(map(str, v)), ok) for s, v, ok in expectations(found)]
    table = tables(found)
    write("calibration", {"seeds": len(SEEDS), "findings": found}, rows, table)
    page = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?s)(<!-- table -->\n).*?(<!-- end -->)", lambda m: m[1] + table + "\n" + m[2], page))  # fmt: skip
    return found


def tables(found) -> str:
    lines = [
        "| finding | false alarms | mean, nothing to find | found | mean, planted |",
        "|---|---|---|---|---|",
    ]
    for name, by in found.items():
        null, planted = by["null"], by["planted"]
        cells = [
            "–" if not of["runs"] else words
            for of, words in (
                (null, f"{null['alarms']} of {null['runs']}"),
                (null, f"{null['mean'] or 0:.3f}"),
                (planted, f"{planted['alarms']} of {planted['runs']}"),
                (planted, f"{planted['mean'] or 0:.3f}"),
            )
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def expectations(found):
    """The sentence, the figures, and whether it holds."""
    most = {name: by["null"]["alarms"] for name, by in found.items()}
    for audit in ("membership", "lira", "rmia", "u-lira", "residual-membership", "text-membership"):
        own = {n: a for n, a in most.items() if n.startswith(audit + "/")}
        worst = max(own, key=own.get)
        sentence = f"{audit}: false alarms in {len(SEEDS)} retrained models at no more than 5 %, up to chance ({LIKELY})"  # fmt: skip
        yield sentence, [worst, own[worst]], own[worst] <= LIKELY
    runs = sum(by["null"]["runs"] for by in found.values())
    total = sum(most.values())
    yield "all false alarms together, at most 5 % and a little", [total, runs], total <= 0.07 * runs
    for name in STRONG:
        hits = found[name]["planted"]
        yield f"{name} finds planted duplicates, nine times of ten", [hits["alarms"], hits["runs"]], hits["alarms"] >= 0.9 * hits["runs"] > 0  # fmt: skip


test_calibration_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 13)

"""The small-scale run of the card quantification-shift: digits with 25 % wrong labels, memorised in known shares.

A model is really trained on the retain set and a share of the forget set; that share is the truth. Twice:
`card` as the card has it (references on data of their own, kept records for members), `audit` as the
library has it (references retrained on the retain set, the original's scores for members).
Writes benchmarks/results/quantification_shift.json and .md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _results import must_be_seen, write
from sklearn.linear_model import LogisticRegression
from torch import nn

import expunge as xp
from expunge.audits._members import best_threshold
from expunge.audits._mixture import Mixture, Population
from expunge.audits.memorised_fraction import MemorisedFraction
from expunge.core.audit import Subject
from expunge.core.request import Request
from expunge.train.losses import margin_each

pytestmark = pytest.mark.acceptance

SEEDS, TRUTHS, REFERENCES = (0, 1, 2, 3), (0.0, 0.1, 0.25, 0.5, 1.0), 4
RETAIN, FORGET, OTHER = slice(0, 500), slice(500, 900), slice(900, 1300)
TEST = slice(1300, None)
AUDIT = {"resamples": 50, "injections": 20}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def recipe_for(data: xp.Data) -> xp.ClassifierRecipe:
    return xp.ClassifierRecipe(
        network, data, epochs=40, lr=1e-3, batch_size=32, weight_decay=0.0, step="adam"
    )


def noisy_digits(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.from_numpy(images / 16).float()[order], torch.from_numpy(labels).long()[order]
    wrong = torch.rand(len(y), generator=generator) < 0.25
    other = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    return x, torch.where(wrong, other, y)


def emq(members: np.ndarray, out: np.ndarray, forget: np.ndarray) -> float:
    """EMQ on the posteriors of a logistic regression on the score."""
    s = np.concatenate([members, out])[:, None]
    y = np.repeat([1, 0], [len(members), len(out)])
    model = LogisticRegression(class_weight="balanced").fit(s, y)
    p = model.predict_proba(forget[:, None])
    share = np.full(2, 0.5)
    for _ in range(2000):
        moved = p * share
        share = (moved / moved.sum(1, keepdims=True)).mean(0)
    return float(share[1])


def as_the_card(score: np.ndarray, base: np.ndarray, random: np.random.Generator) -> dict:
    """Figures of one model from calibrated scores, and without calibration."""
    found: dict = {}
    for name, s in (("", score - base), ("uncalibrated_", score)):
        members, forget, out = s[RETAIN], s[FORGET], s[TEST]
        p = Population(Mixture.of([out], members, forget, random), forget)
        found |= {name + "estimate": p.best.fraction, name + "limit": p.limit()}
        if name:
            continue
        bent = Population(p.mixture, forget, covariate=True)
        cut = best_threshold(members, out)
        hit, false = float((members > cut).mean()), float((out > cut).mean())
        counted = float((forget > cut).mean())
        found |= {
            "limit_3.84": p.limit(3.84),
            "shifted_estimate": bent.best.fraction,
            "shifted_limit": bent.limit(),
            "emq": emq(members, out, forget),
            "classify_and_count": counted,
            "adjusted_count": float(np.clip((counted - false) / (hit - false), 0, 1)),
            "balanced_accuracy": (hit + 1 - false) / 2,
        }
    return found


def as_the_audit(problem, request, model, references, runtime) -> dict:
    subject = Subject(model, problem, request, runtime)
    found = {f.name: f for f in MemorisedFraction(**AUDIT).run(subject, references, runtime)}
    limit, estimate = (found[f"memorised-fraction/{w}"] for w in ("limit", "estimate"))
    return {
        "estimate": estimate.value,
        "limit": limit.value,
        "plain_limit": limit.detail["plain_limit"],
        "shifted_estimate": found["memorised-fraction/estimate-shifted"].value,
        "shifted_limit": found["memorised-fraction/limit-shifted"].value,
        "reference_limit": limit.reference,
        "erased": found["memorised-fraction/erased"].value,
        "self_test": found["memorised-fraction/self-test"].value,
        "classify_and_count": limit.detail["classify_and_count"],
    }


def one_seed(seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    x, y = noisy_digits(generator)
    every = xp.Data((x, y))
    recipe, ids = recipe_for(every), every.ids
    train = xp.Data((x[:900], y[:900]))
    original = recipe(ids[:900], 300)
    problem = xp.Classification(original, train, (x[TEST], y[TEST]), recipe=recipe_for(train))
    request, runtime = Request(ids=tuple(range(500, 900))), xp.Runtime(threads=1, seed=seed)
    apart = [recipe(ids[OTHER], 100 + k) for k in range(REFERENCES)]
    retrained = [
        Subject(recipe(ids[RETAIN], 200 + k), problem, request, runtime) for k in range(REFERENCES)
    ]

    @torch.no_grad()
    def score(model: nn.Module) -> np.ndarray:
        return margin_each(model(x).double(), y).clamp(-18, 18).numpy()

    base = np.mean([score(m) for m in apart], axis=0)
    rows = []
    for truth in TRUTHS:
        chosen = ids[FORGET][torch.randperm(400, generator=generator)[: round(400 * truth)]]
        model = recipe(torch.cat([ids[RETAIN], chosen]), 400)
        rows.append({
            "seed": seed,
            "truth": truth,
            "card": as_the_card(score(model), base, np.random.default_rng(seed)),
            "audit": as_the_audit(problem, request, model, retrained, runtime),
        })
    return rows


def mean(rows, which: str, what: str, truth: float) -> float:
    return float(np.mean([r[which][what] for r in rows if r["truth"] == truth]))


def expected(rows):
    def line(which, what):
        return [round(mean(rows, which, what, t), 3) for t in TRUTHS]

    def words(values):
        return " / ".join(f"{v:.3f}" for v in values)

    yield from (
        (
            f"{what} monotone in the true fraction ({which})",
            words(line(which, what)),
            bool((np.diff(line(which, what)) > 0).all()),
        )
        for which, what in (("card", "estimate"), ("card", "emq"), ("audit", "estimate"))
    )
    for which in ("card", "audit"):
        off = np.abs(np.array(line(which, "estimate")) - TRUTHS).max()
        yield f"estimate within .17 of ρ ({which}, means)", f"{off:.3f}", bool(off <= 0.17)
    for which in ("card", "audit"):
        holds = [r[which]["limit"] >= r["truth"] for r in rows]
        yield (
            f"limits cover the truth in ≥ 95 % ({which})",
            f"{sum(holds)} of {len(holds)}",
            bool(np.mean(holds) >= 0.95),
        )
    counted = mean(rows, "card", "classify_and_count", 0.0)
    yield "classify and count is off by ≥ .35 at ρ = 0", f"{counted:.3f}", counted >= 0.35
    rough, sharp = mean(rows, "card", "uncalibrated_limit", 0.0), mean(rows, "card", "limit", 0.0)
    yield (
        "without calibration the limit at ρ = 0 is higher",
        f"{rough:.3f} against {sharp:.3f}",
        rough > sharp,
    )


@pytest.fixture(scope="module")
def seen():
    torch.set_num_threads(1)
    rows = [row for seed in SEEDS for row in one_seed(seed)]
    means = {
        which: {what: [mean(rows, which, what, t) for t in TRUTHS] for what in rows[0][which]}
        for which in ("card", "audit")
    }
    lines = [f"Means over {len(SEEDS)} seeds, at ρ = 0, .1, .25, .5 and 1.", ""]
    for which, table in means.items():
        lines += [f"| {which} | " + " | ".join(f"ρ = {t:g}" for t in TRUTHS) + " |"]
        lines += ["|---" * (len(TRUTHS) + 1) + "|"]
        lines += [
            f"| {what} | " + " | ".join(f"{v:.3f}" for v in row) + " |"
            for what, row in table.items()
        ]
        lines += [""]
    write(
        "quantification_shift",
        {"truths": TRUTHS, "means": means, "rows": rows, "settings": AUDIT},
        expected(rows),
        "\n".join(lines),
    )
    return rows


test_quantification_shift_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 9)

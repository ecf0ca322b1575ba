"""Coverage of NoMUS' intervals over simulated people whose truths are known.

Losses of forgotten and unseen people, who differ among each other or not, of two shapes and at five distances;
right answers of test people. True M is the accuracy against endless people of an attack with the same penalty
that was fitted to endless people; 40 draws a setting. Writes benchmarks/results/nomus_coverage.json and .md.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from _results import must_be_seen, write
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from expunge.audits._nomus import HELD_OUT, attack_interval, nomus, nomus_interval, share

pytestmark = pytest.mark.acceptance
SIZES, SPREADS, SHIFTS = ((20, 12), (10, 6)), (0.0, 0.5), (0.0, 0.15, 0.4, 1.2, 3.5)
SHAPES, DRAWS, ENDLESS = ("normal", "skewed"), 40, 20_000
WHATS = ("mia", "accuracy", "score")


def losses(random, people, each, at, own, shape):
    level = np.repeat(random.normal(at, own, people), each)
    if shape == "normal":
        return (1 + level + random.normal(0, 1, len(level))).clip(0.02)
    return np.exp(level + random.normal(0, 0.8, len(level)))


def hits(random, people, each, own):
    odds = 1 + random.normal(0, 1.4 * own, people)
    return (random.random(people * each) < np.repeat(1 / (1 + np.exp(-odds)), each)).astype(float)


def truth(people, each, at, own, shape):
    random = np.random.default_rng(99)
    sides = [losses(random, ENDLESS, 1, a, own, shape) for a in (0.0, at)]
    if at == 0:
        return 0.5
    x, y = np.concatenate(sides)[:, None], np.repeat([1, 0], ENDLESS)
    fitted = (1 - HELD_OUT) * 2 * people * each
    model = make_pipeline(StandardScaler(), LogisticRegression(C=fitted / len(y))).fit(x, y)
    return float((model.predict(x) == y).mean())


@pytest.fixture(scope="module")
def seen():
    rows = []
    for number, (shape, (people, each), own, at) in enumerate(itertools.product(SHAPES, SIZES, SPREADS, SHIFTS)):  # fmt: skip
        true = {"mia": truth(people, each, at, own, shape)}
        true["accuracy"] = float(hits(np.random.default_rng(98), ENDLESS * 10, 1, own).mean())
        true["score"] = nomus(true["accuracy"], true["mia"])
        groups, held, wide = np.repeat(np.arange(people), each), dict.fromkeys(WHATS, 0), []
        for draw in range(DRAWS):
            random = np.random.default_rng([number, draw])
            sides = [losses(random, people, each, a, own, shape) for a in (0.0, at)]
            found = {"mia": attack_interval(*sides, (groups, groups))}
            found["accuracy"] = share(hits(random, people, each, own), groups)
            found["score"] = nomus_interval(found["accuracy"], found["mia"])
            for what in WHATS:
                held[what] += int(found[what].low <= true[what] <= found[what].high)
            wide.append(found["score"].high - found["score"].low)
        rows.append({
            "shape": shape, "people": people, "each": each, "own": own, "at": at, "true": true,
            "covered": {w: n / DRAWS for w, n in held.items()}, "width": float(np.mean(wide)),
        })  # fmt: skip
    shown = [
        (s, " / ".join(f"{v:.3f}" for v in values), ok) for s, values, ok in expectations(rows)
    ]
    write("nomus_coverage", {"rows": rows, "draws": DRAWS}, shown, more=table(rows))
    return rows


def table(rows) -> str:
    lines = [
        f"{DRAWS} draws a setting; `own` is how much people differ among each other, `at` how far the unseen are away "
        "from the forgotten. Shares of the 95 % intervals that hold the truth; WIDTH is that of the score's.",
        "", "| losses | people × samples | own | at | true M | MIA | ACCURACY | SCORE | WIDTH |", "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        shares = " | ".join(f"{r['covered'][w]:.2f}" for w in WHATS)
        lines.append(f"| {r['shape']} | {r['people']} × {r['each']} | {r['own']} | {r['at']} | {r['true']['mia']:.3f} | {shares} | {r['width']:.3f} |")  # fmt: skip
    return "\n".join(lines)


def expectations(rows):
    for what in WHATS:
        values = [r["covered"][what] for r in rows]
        mean = float(np.mean(values))
        yield f"intervals of the {what} hold in 95 % over all settings", [mean], mean >= 0.95
    for shape in SHAPES:
        values = [r["covered"]["score"] for r in rows if r["shape"] == shape]
        yield f"those of the score with {shape} losses too", [float(np.mean(values))], bool(np.mean(values) >= 0.95)  # fmt: skip
    values = [r["covered"]["score"] for r in rows if r["at"] == 0]
    yield "and where nothing is to be found, M = 1/2", [float(np.mean(values))], bool(np.mean(values) >= 0.95)  # fmt: skip
    values = [min(r["covered"].values()) for r in rows]
    yield f"no setting is below what chance makes of 95 % in {DRAWS} draws", [min(values)], min(values) >= 0.85  # fmt: skip


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 7)

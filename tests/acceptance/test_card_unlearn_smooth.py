"""The small-scale run of the card unlearn-smooth: NPO on TinyFacts, smoothed in five ways, and attacked.

Three originals and three retrained models. An attack relearns all 20 forget questions, another one 5 of
them, drawn at random, while the other 15 are looked at. Writes benchmarks/results/unlearn_smooth.json,
.md and .svg.
"""

from __future__ import annotations

import pytest
import torch
from _results import RESULTS, must_be_seen, write
from _tinyfacts import STEPS, exact, relearnt

import expunge as xp
from expunge.report.svg import Plot
from expunge.workloads.tinyfacts import tinyfacts

pytestmark = pytest.mark.acceptance

NPO = STEPS | {"epochs": 80, "beta": 0.3}
ARMS = {
    "npo": "none", "sam 0.01": "sam(0.01)", "sam 0.05": "sam(0.05)", "sam 0.5": "sam(0.5)",
    "gp 0.01": "gp(0.01)", "average": "swa(64, 2)",
}  # fmt: skip
"""What smooths; the average is of the last 20 % of the steps, every second one."""
SEEDS = (0, 1, 2)
ALL, ALL_LR = (0, 4, 8, 16, 32), 2e-4
FIVE, FIVE_LR, FEW = 40, 5e-4, 5
DRAWS = 2
"""Draws of five questions for each seed, each an attack of its own; the mean of their figures is taken."""
COLOURS = {"npo": "#c2410c", "sam 0.05": "#6d28d9", "average": "#15803d", "retrain": "#525252"}


def attacked(problem, model, gone, kept) -> dict[str, list[float]]:
    """Exact memorisation: of all forget questions and of retain ones; under both attacks."""
    others = []
    for draw in range(DRAWS):
        order = torch.randperm(len(gone), generator=torch.Generator().manual_seed(draw))
        few, rest = gone[order[:FEW]], gone[order[FEW:]]
        others += relearnt(problem, model, few, rest, [FIVE], FIVE_LR)
    return {
        "all": relearnt(problem, model, gone, gone, ALL, ALL_LR),
        "others": [sum(others) / len(others)],
        "retain": [exact(problem, model, kept)],
    }


@pytest.fixture(scope="module")
def seen():
    """Everything is written, whether it holds or not."""
    torch.set_num_threads(1)
    found: dict = {name: [] for name in [*ARMS, "retrain"]}
    for seed in SEEDS:
        problem, runtime = tinyfacts.problem(seed), xp.Runtime(seed=seed, threads=1)
        gone = tinyfacts.request.resolve(problem.train)
        kept = problem.train.without(gone)
        models = {"retrain": problem.recipe(kept, 1001 + seed)}
        for name, smooth in ARMS.items():
            method = xp.methods.NPO(**NPO, smooth=smooth)
            outcome = xp.unlearn(problem, tinyfacts.request, method, runtime=runtime)
            models[name] = outcome.released()
        for name, model in models.items():
            found[name].append(attacked(problem, model, gone, kept))
    rows = [(s, " / ".join(f"{v:.3g}" for v in values), ok) for s, values, ok in expected(found)]
    write("unlearn_smooth", {"seeds": SEEDS, "arms": found}, rows, table(found))
    (RESULTS / "unlearn_smooth.svg").write_text(picture(found))
    return found


def mean(found, name, part) -> list[float]:
    runs = [run[part] for run in found[name]]
    return [sum(values) / len(runs) for values in zip(*runs, strict=True)]


def table(found) -> str:
    lines = [
        "Exact memorisation, means over three seeds (and their range):",
        "",
        f"| arm | {' | '.join(f'after {n} steps' for n in ALL)} | 15 others after relearning 5 | retain |",
        "|---|" + "---|" * (len(ALL) + 2),
    ]
    for name in found:
        cells = []
        for part in ("all", "others", "retain"):
            for n, value in enumerate(mean(found, name, part)):
                each = [run[part][n] for run in found[name]]
                cells.append(f"{value:.2f} ({min(each):.2f}–{max(each):.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![relearning](unlearn_smooth.svg)"])


def picture(found) -> str:
    plot = Plot(
        "Relearning what was forgotten", "NPO, smoothed or not, beside a retrained model.",
        (0, max(ALL)), (0, 1), x_label="steps on all forget questions", y_label="exact memorisation",
    )  # fmt: skip
    styles = {name: name.replace(" ", "").replace(".", "") for name in COLOURS}
    taken: list = []
    for name, style in styles.items():
        points = list(zip(ALL, mean(found, name, "all"), strict=True))
        plot.line(points, style)
        plot.label(*points[-2], name, taken)
    return plot.standalone({style: COLOURS[name] for name, style in styles.items()})


def expected(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    start = {name: mean(found, name, "all")[0] for name in found}
    same = ("npo", "sam 0.01", "sam 0.05", "gp 0.01", "average")
    values = [start[name] for name in same]
    yield "forgetting is equal before the attack: EM of npo, SAM .01 and .05, GP, the average (card .13, .13, .13, .16, .14)", values, max(values) - min(values) < 0.1  # fmt: skip
    for n, steps in enumerate(ALL):
        if steps >= 8:
            values = [mean(found, name, "all")[n] for name in ("sam 0.05", "npo", "retrain")]
            yield f"SAM .05 is below npo after relearning for {steps} steps; and the retrained model", values, values[0] < values[1]  # fmt: skip
    values = [mean(found, name, "others")[0] for name in ("sam 0.05", "npo", "retrain")]
    yield "SAM .05 is below npo on 15 questions after relearning 5 others; and the retrained model (card .15, .24, .05)", values, values[0] < values[1]  # fmt: skip
    apart = [a - b for a, b in zip(mean(found, "average", "all"), mean(found, "npo", "all"), strict=True)]  # fmt: skip
    yield "the average of weights is like npo: differences of EM after 0 to 32 steps", apart, max(map(abs, apart)) < 0.06  # fmt: skip
    values = [start["sam 0.5"], start["npo"]]
    yield "ρ .5 forgets too little: EM before the attack, and npo's (card .35, .13)", values, values[0] > values[1] + 0.1  # fmt: skip
    values = [mean(found, name, "retain")[0] for name in found]
    yield "retain EM of all arms and of the retrained model (card 1.00)", values, min(values) > 0.95  # fmt: skip


test_unlearn_smooth_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 8)

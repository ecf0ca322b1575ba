"""The small-scale run of the card baselines-llm: TinyFacts, 60 steps of each loss.

Its AUCs count the end of an answer, which ascent makes unlikely too; the audit leaves it out. CE-U takes
an answer's first token as well: of three tokens, none is left in the card's run.
Writes benchmarks/results/baselines_llm.json and .md.
"""

from __future__ import annotations

import pytest
import torch
from _results import must_be_seen, write
from _tinyfacts import STEPS, figures

import expunge as xp
from expunge.core.audit import Subject
from expunge.workloads.tinyfacts import tinyfacts

pytestmark = pytest.mark.acceptance

M = xp.methods
RUNS = {
    "gradient ascent, 12 steps": lambda: M.GradDiff(**(STEPS | {"epochs": 12}), alpha=0.0),
    "grad-diff": lambda: M.GradDiff(**STEPS),
    "kl-min": lambda: M.KLMin(**STEPS),
    "npo 0.1": lambda: M.NPO(**STEPS, beta=0.1),
    "npo 0.3": lambda: M.NPO(**STEPS, beta=0.3),
    "npo 1": lambda: M.NPO(**STEPS, beta=1.0),
    "simnpo": lambda: M.SimNPO(**STEPS),
    "wga": lambda: M.WGA(**STEPS),
    "satimp": lambda: M.SatImp(**STEPS),
    "ceu": lambda: M.CEU(**STEPS, alpha=1.0, skip=0),
    "undial": lambda: M.UNDIAL(**(STEPS | {"lr": 5e-4}), alpha=1.0),
    "task-vector 1": lambda: M.TaskVector(**VECTOR, strength=1.0),
    "task-vector 3": lambda: M.TaskVector(**VECTOR, strength=3.0),
    "task-vector 10": lambda: M.TaskVector(**VECTOR, strength=10.0),
}
VECTOR = {"epochs": 60, "lr": 5e-4, "batch_size": 20}


@pytest.fixture(scope="module")
def seen():
    """One seed, as the card's; everything is written, whether it holds or not."""
    torch.set_num_threads(1)
    runtime, request = xp.Runtime(seed=0, threads=1), tinyfacts.request
    problem = tinyfacts.problem(0)
    models = {
        "original": problem.model,
        "retrain": problem.recipe(problem.train.without(request.resolve(problem.train)), 1001),
    }
    for name, make in RUNS.items():
        models[name] = xp.unlearn(problem, request, make(), runtime=runtime).released()
    found = {n: figures(Subject(m, problem, request, runtime), runtime) for n, m in models.items()}
    rows = [(s, " → ".join(f"{v:.3f}" for v in values), ok) for s, values, ok in expected(found)]
    write("baselines_llm", found, rows)
    return found


def expected(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    for name in ("grad-diff", "wga", "ceu"):
        values = [found[name]["auc, end"], found["retrain"]["auc, end"], found[name]["retain"], found[name]["auc"], found["retrain"]["auc"]]  # fmt: skip
        yield f"{name} over-forgets while utility looks perfect: AUC, that of retraining, retain EM; AUCs without the end of answers", values, values[0] < values[1] - 0.1 and values[2] > 0.95  # fmt: skip
    values = [found[f"npo {b}"]["forget"] for b in ("0.1", "0.3", "1")]
    yield "a larger β of npo forgets less: forget EM at 0.1, 0.3, 1", values, values[0] <= values[1] <= values[2] and values[2] > values[0]  # fmt: skip
    for side in ("forget", "retain"):
        values = [found[f"task-vector {a}"][side] for a in (1, 3, 10)]
        yield f"task-vector trades utility: {side} EM at 1, 3, 10", values, values[0] >= values[1] >= values[2] and values[0] > values[2]  # fmt: skip
    values = [found["original"]["forget"], found["retrain"]["forget"], found["retrain"]["retain"]]
    yield "the retrained model is the target: forget EM of both, and its retain EM", values, values[0] > 0.99 and values[1] < 0.2 and values[2] > 0.99  # fmt: skip


test_baselines_llm_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 7)

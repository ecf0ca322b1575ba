"""The small-scale run of the card open-data-llm: authors on the preset xs.

A target, two models retrained without the forgotten people, and NPO on the target. Writes
benchmarks/results/open_data_llm.json and .md.
"""

from __future__ import annotations

import pytest
import torch
from _results import must_be_seen, write
from scipy.stats import ks_2samp

import expunge as xp
from expunge.problems.encoding import Encoder, encode
from expunge.workloads import registry
from expunge.workloads.open_data import corpus

pytestmark = pytest.mark.acceptance

SPLITS = ("forget", "retain", "holdout")


def value_accuracy(problem, model, rows) -> float:
    """Share of questions whose greedy answer holds the value."""
    encoder = Encoder(problem.tokenizer)
    prompts = [torch.tensor(encoder.prompt(row["question"])) for row in rows]
    said = problem.texts(problem.generate(model, prompts, tokens=32, batch_size=64))
    return sum(row["value"] in text for row, text in zip(rows, said, strict=True)) / len(rows)


@torch.no_grad()
def likelihoods(problem, model, rows, answer) -> torch.Tensor:
    """Mean log-likelihood of each row's answer, whose text `answer(row)` gives."""
    records = [{"question": row["question"], "answer": answer(row)} for row in rows]
    data = encode(records, problem.tokenizer)
    return -torch.cat([problem.each_loss(model, batch) for batch in data.batches(64)])


def truth_ratios(problem, model, rows) -> list[float]:
    """Geometric mean likelihood of the perturbed answers over that of the paraphrase, row by row."""
    number = len(rows[0]["perturbed_answer"])
    wrong = [
        likelihoods(problem, model, rows, lambda row, n=n: row["perturbed_answer"][n])
        for n in range(number)
    ]
    right = likelihoods(problem, model, rows, lambda row: row["paraphrased_answer"])
    return (torch.stack(wrong).mean(0) - right).exp().tolist()


@pytest.fixture(scope="module")
def seen():
    """Everything is written, whether it holds or not."""
    workload, rows = registry.get("authors"), corpus("authors").splits
    problem = workload.problem(0)
    kept = problem.train.without(workload.request.resolve(problem.train))
    retrained = [problem.recipe(kept, seed) for seed in (1001, 1002)]
    outcome = xp.unlearn(problem, workload.request, xp.methods.NPO(**workload.tuned["npo"]), runtime=xp.Runtime(seed=0, threads=1))  # fmt: skip
    models = {
        "target": problem.model, "retrain": retrained[0], "second retrain": retrained[1],
        "npo": outcome.model,
    }  # fmt: skip
    ratios = {n: truth_ratios(problem, m, rows["forget"]) for n, m in models.items()}
    found = {
        name: {split: value_accuracy(problem, model, rows[split]) for split in SPLITS}
        | {"ks": float(ks_2samp(ratios[name], ratios["retrain"]).pvalue)}
        for name, model in models.items()
    }
    found["npo"]["seconds"] = outcome.cost.seconds
    shown = [
        (sentence, " / ".join(f"{v:.3g}" for v in values), holds)
        for sentence, values, holds in expectations(found)
    ]
    write("open_data_llm", {"data": corpus("authors").meta, "models": found}, shown)
    return found


def expectations(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    target, retrain, second, npo = (
        found[n] for n in ("target", "retrain", "second retrain", "npo")
    )
    values = [target["forget"], target["retain"]]
    yield "the target knows at least .95 of the values of forget and retain", values, min(values) >= 0.95  # fmt: skip
    values = [retrain["forget"], second["forget"]]
    yield "models retrained without them know at most .10 of the forget values", values, max(values) <= 0.10  # fmt: skip
    values = [retrain["retain"], second["retain"]]
    yield "and at least .95 of the retain values", values, min(values) >= 0.95
    values = [found[n]["holdout"] for n in ("target", "retrain", "second retrain")]
    yield "nobody knows more than .10 of the holdout values", values, max(values) <= 0.10
    yield "forget quality of the target below 1e-8", [target["ks"]], target["ks"] < 1e-8
    yield "forget quality of the second retraining above .05", [second["ks"]], second["ks"] > 0.05
    yield "NPO leaves at most .05 of the forget values", [npo["forget"]], npo["forget"] <= 0.05
    yield "and keeps at least .9 of the retain values", [npo["retain"]], npo["retain"] >= 0.9


test_open_data_llm_invariant_2_and_what_must_be_seen, test_every_expectation_is_tested = (
    must_be_seen(expectations, 8)
)

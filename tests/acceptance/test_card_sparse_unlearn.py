"""The small-scale run of the card sparse-unlearn: a perceptron on 5,000 MNIST digits, three seeds.

Writes benchmarks/results/sparse_unlearn.json and .md.
"""

from __future__ import annotations

import pytest
import torch
from _five_scores import five_scores, over_seeds
from _results import must_be_seen, write
from torch import nn

import expunge as xp
from expunge.workloads.mnist import splits

pytestmark = pytest.mark.acceptance

SEEDS = (0, 1, 2)
GAMMAS = (0.0, 1e-4, 3e-4, 1e-3)
REQUESTS = {"class": xp.forget(label=3), "random": xp.forget(fraction=0.1, seed=3)}
STEPS = {"epochs": 5, "lr": 0.05}


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def small_share(model) -> float:
    """Share of all weights below a thousandth, in percent."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return 100 * float((flat.abs() < 1e-3).float().mean())


def of_one_seed(seed: int) -> dict[str, dict[str, dict[str, float]]]:
    data = splits()
    runtime = xp.Runtime(seed=seed, threads=1)
    recipe = xp.ClassifierRecipe(perceptron, data.train, epochs=20, lr=0.05)
    dense = xp.Classification(recipe(data.train.ids, seed), data.train, data.test, recipe=recipe)
    sparse = xp.prune(dense, "omp:0.9", runtime=runtime)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind, request in REQUESTS.items():
        keep = data.train.without(request.resolve(data.train))

        def after(problem, method, request=request):
            return xp.unlearn(problem, request, method, runtime=runtime).model

        models = {
            "original": dense.model,
            "original, 90 % sparse": sparse.model,
            "retrain": recipe(keep, 1001 + seed),
            "retrain, 90 % sparse": sparse.recipe(keep, 1001 + seed),
            "finetune": after(dense, xp.methods.FineTune(**STEPS)),
            "finetune, 90 % sparse": after(sparse, xp.methods.FineTune(**STEPS)),
        }
        for gamma in GAMMAS[1:]:
            models[f"l1-sparse {gamma:g}"] = after(dense, xp.methods.L1Sparse(gamma=gamma, **STEPS))
        for alpha in (1, 20):
            method = xp.methods.Influence(mode="official", alpha=alpha)
            models[f"influence, official {alpha}"] = after(dense, method)
        models["influence"] = after(dense, xp.methods.Influence(damping=0.06))
        found[kind] = {
            name: five_scores(dense, request, model) | {"small weights": small_share(model)}
            for name, model in models.items()
        }
    return found


@pytest.fixture(scope="module")
def seen():
    """Means over the seeds; everything is written, whether it holds or not."""
    runs = [of_one_seed(seed) for seed in SEEDS]
    found = {
        kind: {name: over_seeds([run[kind][name] for run in runs]) for name in runs[0][kind]}
        for kind in REQUESTS
    }
    rows = []
    for sentence, values, holds in expectations(found):
        rows.append((sentence, " → ".join(f"{v:.1f}" for v in values), holds))
    write("sparse_unlearn", {"seeds": SEEDS, "mean": found, "runs": runs}, rows)
    return found


def by_gamma(found, kind: str, score: str) -> list[float]:
    names = ["finetune", *(f"l1-sparse {g:g}" for g in GAMMAS[1:])]
    return [found[kind][name][score] for name in names]


def expectations(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    sparse, dense = (found["class"][n]["UA"] for n in ("finetune, 90 % sparse", "finetune"))
    yield "class: UA of fine-tuning, dense below 90 % sparse", [dense, sparse], sparse > dense
    for kind in REQUESTS:
        ua, ra, small = (by_gamma(found, kind, s) for s in ("UA", "RA", "small weights"))
        yield f"{kind}: UA rises with γ = {GAMMAS}", ua, ua == sorted(ua) and ua[-1] > ua[0]
        falls = min(ra[:-1]) > 99.5 and ra[-1] < ra[-2] - 0.2
        yield f"{kind}: RA falls only at the largest γ", ra, falls
        grows = small == sorted(small) and small[-1] > small[0] + 10
        yield f"{kind}: the share of weights below 0.001 grows", small, grows
    mia = [found["random"][n]["MIA"] for n in ("original", "retrain")]
    yield "random: MIA-efficacy of the original near 0, of retraining above", mia, mia[0] < 3 < mia[1]  # fmt: skip
    weak, strong = (found["class"][f"influence, official {a}"]["UA"] for a in (1, 20))
    yield "class: influence as released, α = 1 does nothing, α = 20 forgets", [weak, strong], weak < 5 and strong > 50  # fmt: skip


test_sparse_unlearn_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 9)

"""The small-scale run of the card laf: the published CNN on 5,000 MNIST digits.

Network and pixels are those of the released code, as the card asks: convolutions padded by two pixels, images
from 0 to 1. Without the padding, LAF gains about one point on noisy labels in place of two to three (seeds 10
and 11, on which this was looked for; those below are others). The released code trains at a constant rate; half
a cosine gives an original like the card's (on noisy labels .84 of the test digits and .26 of the wrong labels
at seed 10, the card .87 and .25), a constant rate one that knows more of the wrong labels (.77 and .53).

Writes benchmarks/results/laf.json and .md.
"""

from __future__ import annotations

import functools
import statistics

import pytest
import torch
from _results import must_be_seen, write
from torch import Tensor, nn

import expunge as xp
from expunge.workloads.mnist import PIXELS, splits

pytestmark = pytest.mark.acceptance
SEEDS = (0, 1, 2)

CLASS = {
    "laf": {},
    "extractor only": {"lr_alignment": 0.0},
    "lr ×4": {"lr": 2e-4},
}
NOISY = {
    "laf": {},
    "laf+r 10 %": {"repair": 0.1},
}


class CNN(nn.Module):
    """Two convolutions, a representation of 256 without ReLU, a linear head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 7 * 7, 256),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@functools.cache
def pixels() -> tuple[xp.Data, xp.Data]:
    """Training and test digits from 0 to 1; the workload's are standardised."""
    sides = []
    for side in (splits().train, splits().test):
        batch = side.fetch(side.ids)
        x = batch.x * PIXELS["std"][0] + PIXELS["mean"][0]
        sides.append(xp.Data((x, batch.y), ids=side.ids))
    return sides[0], sides[1]


def recipe_for(train: xp.Data) -> xp.ClassifierRecipe:
    return xp.ClassifierRecipe(
        CNN, train, epochs=10, lr=1e-3, batch_size=32, weight_decay=0.0, step="adam"
    )  # fmt: skip


def problem_of(model: nn.Module, train: xp.Data) -> xp.Classification:
    head = {"last layer": ["head.0", "head.1"]}
    return xp.Classification(model, train, pixels()[1], roles=head)


def unlearned(problem, request, settings, checkpoint=None, seed=0) -> nn.Module:
    runtime = xp.Runtime(seed=seed, threads=1, checkpoint=checkpoint)
    return xp.unlearn(problem, request, xp.methods.LAF(**settings), runtime=runtime).runnable()


@torch.no_grad()
def agreement(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return float((found == y).float().mean())


def of_class() -> dict[str, dict[str, float]]:
    """Class 0 is to be forgotten."""
    (train, test), request = pixels(), xp.forget(label=0)
    recipe = recipe_for(train)
    keep = train.without(request.resolve(train))
    problem = problem_of(recipe(train.ids, 0), train)
    models = {"original": problem.model, "retrain": recipe(keep, 1001)}
    models |= {name: unlearned(problem, request, s) for name, s in CLASS.items()}
    parts = {}
    for name, ids in problem.split(request).items():
        side = test if name.endswith("test") else train
        parts[name] = side.fetch(ids)
    assert set(parts) == {"forget-train", "retain-train", "forget-test", "retain-test"}
    return {
        name: {part: agreement(model.eval(), b.x, b.y) for part, b in parts.items()}
        for name, model in models.items()
    }


def noisy_train() -> tuple[xp.Data, Tensor, Tensor]:
    """60 % of the classes 0 to 4 with another label, drawn from all nine; ids and true labels."""
    clean, generator = pixels()[0], torch.Generator().manual_seed(0)
    ids = clean.ids.sort().values
    batch = clean.fetch(ids)
    true, labels = batch.y, batch.y.clone()
    chosen = []
    for c in range(5):
        there = torch.where(true == c)[0]
        chosen.append(
            there[torch.randperm(len(there), generator=generator)[: round(0.6 * len(there))]]
        )
    rows = torch.cat(chosen).sort().values
    shift = torch.randint(1, 10, (len(rows),), generator=generator)
    labels[rows] = (true[rows] + shift) % 10
    return xp.Data((batch.x, labels), ids=ids), ids[rows], true[rows]


def of_noise(folder, seed: int) -> dict[str, dict[str, float]]:
    """The samples with a wrong label, the same for all seeds, are to be forgotten."""
    train, wrong, true = noisy_train()
    request = xp.forget(ids=wrong.tolist())
    recipe = recipe_for(train)
    problem = problem_of(recipe(train.ids, seed), train)
    models = {"original": problem.model, "retrain": recipe(train.without(wrong), 1001 + seed)}
    # both begin alike, and the second goes on from the first one's checkpoints
    models |= {name: unlearned(problem, request, s, folder, seed) for name, s in NOISY.items()}
    noisy, test = train.fetch(wrong), pixels()[1]
    held = test.fetch(test.ids)
    return {
        name: {
            "test": agreement(model.eval(), held.x, held.y),
            "noisy label": agreement(model, noisy.x, noisy.y),
            "true label": agreement(model, noisy.x, true),
        }
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Both tasks, noise as a mean over seeds; everything is written, whether it holds or not."""
    runs = [of_noise(tmp_path_factory.mktemp("noise"), seed) for seed in SEEDS]
    noise = {
        name: {score: statistics.fmean(run[name][score] for run in runs) for score in row}
        for name, row in runs[0].items()
    }
    found = {"class": of_class(), "noise": noise, "noise by seed": runs}
    rows = [(s, " / ".join(f"{v:.3f}" for v in values), ok) for s, values, ok in expected(found)]
    write("laf", found, rows)
    return found


def expected(found):
    """What the card says must be seen: the sentence, the figures, and whether it holds."""
    of = found["class"]
    forget, retain = of["laf"]["forget-train"], of["laf"]["retain-train"]
    yield "class removal: below .05 on forget, above .97 on retain training data", [forget, retain], forget < 0.05 and retain > 0.97  # fmt: skip
    before, after = found["noise"]["original"]["test"], found["noise"]["laf"]["test"]
    yield "noisy labels: test accuracy up by at least .015", [before, after], after >= before + 0.015  # fmt: skip
    wrecked = [of["lr ×4"][part] for part in ("retain-train", "forget-train")]
    yield (
        "lr of the extractor × 4 wrecks it: the class stays and the rest loses 3 points or more "
        "(card: .88 / .997)", wrecked, wrecked[0] < retain - 0.03 and wrecked[1] > 0.5,
    )  # fmt: skip
    alone = [of["extractor only"][part] for part in ("retain-train", "forget-train")]
    yield "extractor steps alone cost retain accuracy (card: .757 / 1.0)", alone, alone[0] < retain - 0.05  # fmt: skip
    agree = [found["noise"][n]["noisy label"] for n in ("original", "laf", "laf+r 10 %")]
    yield "noisy labels are said less, and less again after the repair", agree, agree[0] > agree[1] > agree[2]  # fmt: skip
    true = [found["noise"][n]["true label"] for n in ("original", "laf", "laf+r 10 %")]
    yield "true labels are said more, and more again after the repair", true, true[0] < true[1] < true[2]  # fmt: skip


test_laf_must_be_seen, test_every_expectation_is_tested = must_be_seen(expected, 6)

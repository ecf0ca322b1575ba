"""DMM on 300 digits: 15 eights that look alike, 800 half-data models, 100 originals and oracles.

Writes benchmarks/results/dmm.json and .md.
"""

from __future__ import annotations

import copy

import _results
import numpy as np
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.audits._klom import klom, margins, summary
from expunge.core.request import Request
from expunge.core.view import View
from expunge.fleet.subsets import train_many
from expunge.methods.general.datamodel_matching import DatamodelMatching
from expunge.methods.general.dm_direct import DMDirect
from expunge.methods.general.finetune import FineTune
from expunge.methods.general.gradient_ascent import GradientAscent
from expunge.methods.general.oracle_matching import OracleMatching

pytestmark = pytest.mark.acceptance

SUBSETS, MODELS, FORGET, DIGIT = 800, 100, 15, 8
LOOP = {"epochs": 30, "lr": 5e-3, "batch_size": 300, "decay": 0.97, "retain_multiplier": 20.0, "forget_multiplier": 3.0}  # fmt: skip
"""Of the matching. Chosen near settings tried on fifteen threes that look alike, with 30 to 50
originals. The recipe's learning rate (0.005; the card gives none) and λ (30; the card has 100) were
chosen there too: at 0.02 and λ = 100 several orderings of the card are missed on the threes."""
ESTIMATE = {"models": SUBSETS, "lam": 30.0, "validation": True}
ASCENTS = ((1e-3, 5), (1e-3, 10), (3e-3, 10), (1e-2, 10), (2e-2, 10))
"""Learning rates and steps of gradient ascent; the best on the forget data is compared."""


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def alike(x: torch.Tensor, y: torch.Tensor, digit: int) -> torch.Tensor:
    """Positions of the tightest group of samples of a digit: one and its nearest neighbours."""
    own = (y == digit).nonzero().squeeze(1)
    near = torch.cdist(x[own], x[own]).sort(1)
    middle = int(near.values[:, FORGET - 1].argmin())
    return own[near.indices[middle, :FORGET]].sort().values


class Pool:
    """The recipe without the forget data, from models that it made before."""

    epochs = 100

    def __init__(self, oracles: list[nn.Module]) -> None:
        self.oracles = oracles

    def __call__(self, keep_ids: torch.Tensor, seed: int) -> nn.Module:
        return copy.deepcopy(self.oracles[seed % len(self.oracles)])


class Fleet:
    """Originals, two sets of oracles, and the margins of what methods make of the originals."""

    def __init__(self, digit: int = DIGIT, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        self.runtime = xp.Runtime(threads=1, seed=seed)
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=self.runtime.generator("split"))[:800]
        x, y = (
            torch.from_numpy(images / 16.0).float()[order],
            torch.from_numpy(labels).long()[order],
        )
        self.y = y
        train, valid = xp.Data((x[:300], y[:300])), xp.Data((x[300:], y[300:]))
        self.recipe = xp.ClassifierRecipe(
            network, train, epochs=100, lr=0.005, batch_size=300, weight_decay=0.01, step="adamw"
        )
        self.problem = xp.Classification(network(), train, valid, valid=valid, recipe=self.recipe)
        self.forget = alike(x[:300], y[:300], digit)
        self.request = Request(ids=tuple(self.forget.tolist()))
        retain = train.without(self.forget)
        self.parts = {
            "forget": self.forget.numpy(), "retain": retain.numpy(), "validation": np.arange(300, 800)
        }  # fmt: skip
        self.originals = self.trained(train.ids, "original")
        self.oracles = self.trained(retain, "oracle")
        self.others = self.trained(retain, "other oracle")
        self.wanted = self.margins(self.oracles)

    def trained(self, keep: torch.Tensor, stage: str) -> list[nn.Module]:
        seeds = [self.runtime.seed_for(stage, k) for k in range(MODELS)]
        return list(train_many(self.problem, [keep] * MODELS, seeds, self.runtime, stage))

    @torch.no_grad()
    def logits(self, models: list[nn.Module]) -> torch.Tensor:
        train, valid = self.problem.train, self.problem.valid
        assert valid is not None
        x = [data.fetch(data.ids).x for data in (train, valid)]
        return torch.stack([torch.cat([m.eval()(part) for part in x]) for m in models])

    def margins(self, models: list[nn.Module]) -> np.ndarray:
        return margins(self.logits(models), self.y)

    def run(self, method, prepared=None, recipe=None, models=None) -> list[nn.Module]:
        """What a method makes of every original."""
        made = []
        for k, original in enumerate(models or self.originals):
            problem = xp.Classification(
                original, self.problem.train, valid=self.problem.valid, recipe=recipe or self.recipe
            )
            runtime = xp.Runtime(threads=1, seed=k)
            view = View(problem, self.request, method.needs, runtime)
            extra = {} if prepared is None else {"prepared": prepared}
            made.append(method.run(view, runtime, **extra).model)
        return made

    def score(self, models: list[nn.Module]) -> dict[str, dict]:
        """KLoM of models against the oracles on each part, beside the floor."""
        got, other = self.margins(models), self.margins(self.others)
        return {
            part: summary(got[:, at], self.wanted[:, at], other[:, at])
            for part, at in self.parts.items()
        }


def figures(fleet: Fleet) -> tuple[dict, float, dict]:
    """Scores by method, the correlation of predicted and true change, and facts."""
    direct, matching = (
        DMDirect(**ESTIMATE),
        DatamodelMatching(models=SUBSETS, lam=ESTIMATE["lam"], **LOOP),
    )
    effects = direct.prepare(fleet.problem, fleet.runtime)
    change = direct.change(effects, fleet.forget)[fleet.forget]
    true = (fleet.logits(fleet.originals) - fleet.logits(fleet.oracles)).mean(0)[fleet.forget]
    # a shift of all logits of a sample means nothing
    pair = torch.stack([(t - t.mean(1, keepdim=True)).flatten() for t in (change, true)])
    tune = {"batch_size": 300, "norm": "frozen"}
    refined = FineTune(epochs=5, lr=0.05, **tune)
    ascents = {
        (lr, steps): fleet.run(GradientAscent(epochs=steps, lr=lr, momentum=0.9, bound=1e3, **tune))
        for lr, steps in ASCENTS
    }
    best = min(
        ascents, key=lambda k: klom(fleet.margins(ascents[k]), fleet.wanted)[fleet.forget].mean()
    )
    made = {
        "do nothing": fleet.originals,
        "other oracles": fleet.others,
        "oracle matching": fleet.run(OracleMatching(**LOOP), recipe=Pool(fleet.others)),
        "DM-Direct": fleet.run(direct, effects),
        "datamodel matching": fleet.run(matching, effects),
        "fine-tuning": fleet.run(FineTune(epochs=20, lr=0.05, **tune)),
        "gradient ascent": ascents[best],
        "ascent, then fine-tuning": fleet.run(refined, models=ascents[best]),
    }
    correlation = float(torch.corrcoef(pair)[0, 1])
    facts = {"ascent": {"lr": best[0], "steps": best[1]}, "loop": LOOP, "originals": MODELS,
             "subsets": SUBSETS, "forget": fleet.forget.tolist()}  # fmt: skip
    return {name: fleet.score(models) for name, models in made.items()}, correlation, facts


@pytest.fixture(scope="module")
def seen():
    torch.set_num_threads(1)
    scores, correlation, facts = figures(Fleet())
    _results.write(
        "dmm", {"klom": scores, "correlation": correlation} | facts, table(scores, correlation)
    )
    return scores, correlation


def mean(scores, name: str, part: str = "forget") -> float:
    return scores[name][part]["mean"]


def orderings(scores) -> dict[str, bool]:
    floor, oracle, matched = (
        mean(scores, n) for n in ("other oracles", "oracle matching", "datamodel matching")
    )
    rest = ("gradient ascent", "fine-tuning", "ascent, then fine-tuning", "do nothing")
    return {
        "floor ≤ OM (forget)": floor <= oracle,
        "OM ≲ DMM (forget; OM at most 0.1 above)": oracle <= matched + 0.1,
        **{f"DMM < {name} (forget)": matched < mean(scores, name) for name in rest},
        **{
            f"DMM within 0.15 of the floor ({part})": mean(scores, "datamodel matching", part)
            <= mean(scores, "other oracles", part) + 0.15
            for part in ("retain", "validation")
        },
    }


def table(scores, correlation: float) -> list[tuple[str, str, bool]]:
    def words(part: str) -> str:
        return ", ".join(
            f"{name} {s[part]['mean']:.2f} ({s[part]['p95']:.2f})" for name, s in scores.items()
        )

    part = {"forget": "forget", "retain": "retain", "validation": "validation"}
    rows = [
        (what, words(next(p for p in part if f"({p}" in what)), holds)
        for what, holds in orderings(scores).items()
    ]
    return [
        *rows,
        ("correlation of predicted and true change > 0.6", f"{correlation:.2f}", correlation > 0.6),
    ]


def test_dmm_orderings_of_the_card(seen):
    scores, _ = seen
    assert [what for what, holds in orderings(scores).items() if not holds] == []


def test_dmm_prediction_correlates(seen):
    assert seen[1] > 0.6


def test_dmm_doing_nothing_is_seen(seen):
    """Without this the orderings would say nothing."""
    scores, _ = seen
    assert mean(scores, "do nothing") > 5 * mean(scores, "other oracles")

"""S3T on the digits: stages, deletions with 1, 2 and 4 slice orders, lifetimes, bits before a slice.

A residual perceptron that only ever saw MNIST, 3 shards of 4 slices, rank-8 LoRA, 15 epochs a stage; three
training seeds. The stages of 1 and 2 orders are among those of 4. Writes benchmarks/results/s3t.json and
.md, and the curves.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean

import numpy as np
import pytest
import torch
from _results import RESULTS, must_be_seen, write

import expunge as xp
from expunge.exact import lifetime
from expunge.exact.manifest import digests_of, stages
from expunge.exact.plan import Shard, plan
from expunge.exact.sequences import cyclic
from expunge.exact.stages import served
from expunge.report.svg import Plot
from expunge.workloads.public_digits import public_digits

pytestmark = pytest.mark.acceptance
SHARDS, SLICES, ORDERS = 3, 4, (1, 2, 4)
SEEDS = (0, 1, 2)
AT = (0, 5, 10, 20, 30)
DRAWS, LIVES = 100, 2000
STYLES = {1: ("one", "#c2410c"), 2: ("two", "#6d28d9"), 4: ("four", "#15803d")}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    torch.set_num_threads(1)
    problem = public_digits()
    runs = [of_seed(problem, seed, tmp_path_factory.mktemp(f"s{seed}")) for seed in SEEDS]
    found = {
        "zero_shot": accuracy(problem, problem.model),
        "stages": [fmean(r["stages"][k] for r in runs) for k in range(SLICES)],
        "ensemble": fmean(r["ensemble"] for r in runs),
        "curves": {b: np.mean([r["curves"][b] for r in runs], axis=0).tolist() for b in ORDERS},
        "lives_of_samples": {b: fmean(r["lives"][b] for r in runs) for b in ORDERS},
        "lives": {b: simulated(b) for b in ORDERS},
        "same_bits": bits(problem, tmp_path_factory.mktemp("bits"), runs[0].pop("digests")),
        "seeds": runs,
    }
    for run in runs[1:]:
        run.pop("digests")
    shown = [
        (sentence, " / ".join(f"{v:.3g}" for v in values), holds)
        for sentence, values, holds in expectations(found)
    ]
    write("s3t", found, shown, more=table(found))
    (RESULTS / "s3t_curves.svg").write_text(picture(found))
    return found


def of_seed(problem, seed, folder):
    """Train with the most orders; accuracy of all prefixes, and many random deletions by 1, 2 and 4 orders."""
    sharded = xp.Sharded.train(
        problem, folder=folder / "m", shards=SHARDS, slices=SLICES, orders=max(ORDERS), seed=seed
    )
    batch = problem.test.fetch(problem.test.ids)
    said = logits(sharded, batch)
    right = {key: float((out.argmax(1) == batch.y).float().mean()) for key, out in said.items()}
    index = sharded._now.index
    places = {i: (int(s), int(j)) for i, s, j in zip(index.ids.tolist(), index.shard, index.piece, strict=True)}  # fmt: skip
    generator = np.random.default_rng(seed)
    curves, lives = {b: [] for b in ORDERS}, {b: [] for b in ORDERS}
    for _ in range(DRAWS):
        drawn = generator.permutation(index.ids).tolist()
        for b in ORDERS:
            curve, life = deletions(sharded, b, drawn, places, said, batch.y)
            curves[b].append(curve)
            lives[b].append(life)
    return {
        "seed": seed,
        "stages": [
            fmean(v for (_, p), v in right.items() if len(p) == k) for k in range(1, SLICES + 1)
        ],
        "ensemble": accuracy(problem, sharded.module()),
        "curves": {b: np.mean(curves[b], axis=0).tolist() for b in ORDERS},
        "lives": {b: fmean(lives[b]) for b in ORDERS},
        "seconds": sum(s["seconds"] for _, _, s in stages(sharded.manifest)),
        "digests": digests_of(sharded.manifest),
    }


@torch.no_grad()
def logits(sharded, batch):
    """What each prefix of each shard says on the test data."""
    known = digests_of(sharded.manifest)
    return {
        (s, p): served(
            sharded._base, sharded.settings, sharded._slots,
            [sharded._folder.get(known[s, p[:k]]) for k in range(1, len(p) + 1)],
        )(batch.x)
        for s, p in known
    }  # fmt: skip


def deletions(sharded, orders, drawn, places, said, labels):
    """Accuracy after 0, 5, … deletions of one order of samples, and how many the model survives."""
    state = tuple(
        Shard(s.sequences[:orders], s.counts, scores=s.scores) for s in sharded._now.state
    )
    curve, life = [], 0
    for number in range(len(drawn) + 1):
        if number in AT:
            alive = [said[k, s.served] for k, s in enumerate(state) if s.served]
            # without a model nothing is answered
            hit = (torch.stack(alive).mean(0).argmax(1) == labels).float().mean() if alive else 0
            curve.append(float(hit))
        if not life and all(s.served is None for s in state):
            life = number
        if life and number >= max(AT):
            return curve, life
        shard, piece = places[drawn[number]]
        _, state = plan(state, {shard: {piece: [drawn[number]]}})
    raise AssertionError


def accuracy(problem, model) -> float:
    batch = problem.test.fetch(problem.test.ids)
    with torch.no_grad():
        return float((model(batch.x).argmax(1) == batch.y).float().mean())


def simulated(orders):
    """Mean lifetime under uniform requests with its standard error, and the theory."""
    lives = lifetime.simulate(cyclic(SLICES, orders), SHARDS, LIVES, np.random.default_rng(orders))
    error = lives.std(ddof=1) / math.sqrt(LIVES)
    return [float(lives.mean()), float(error), lifetime.expected(SHARDS, SLICES, orders)]


def bits(problem, folder, digests):
    """Whether stages are the same to the bit after slice 2 of shard 0 was replaced by garbage."""
    how = {"shards": SHARDS, "slices": SLICES, "orders": 1}
    data = problem.train
    index = xp.Sharded.train(problem, folder=folder / "i", **how | {"epochs": 1})._now.index
    garbage = torch.from_numpy(index.ids[(index.shard == 0) & (index.piece == 2)])
    batch = data.fetch(data.ids)
    x, y = batch.x.clone(), batch.y.clone()
    chosen = torch.isin(data.ids, garbage)
    x[chosen], y[chosen] = torch.rand(int(chosen.sum()), 64), (y[chosen] + 1) % 10
    other = problem.about(problem.model, xp.Data((x, y), ids=data.ids))
    new = digests_of(xp.Sharded.train(other, folder=folder / "g", **how).manifest)
    return {
        s: [digests[s, p] == new[s, p] for p in sorted((p for t, p in new if t == s), key=len)]
        for s in range(SHARDS)
    }


def expectations(found):
    values = found["stages"]
    yield "accuracy rises with the stage", values, all(a < b for a, b in pairwise(values))
    few, some, most = (found["curves"][b] for b in ORDERS)
    for at, *values in list(zip(AT, most, some, few, strict=True))[1:]:
        yield f"after {at} deletions B=4 ≥ B=2 ≥ B=1", values, values[0] >= values[1] >= values[2]
    for b in ORDERS:
        mean, error, theory = found["lives"][b]
        yield f"lifetime of B={b} within 3 standard errors of the theory", (mean, error, theory), abs(mean - theory) <= 3 * error  # fmt: skip
    same = [float(sum(found["same_bits"][s])) for s in range(SHARDS)]
    wanted = {0: [True, True, False, False]} | {s: [True] * SLICES for s in range(1, SHARDS)}
    yield "garbage in a slice changes no bit of what never saw it (equal stages by shard)", same, found["same_bits"] == wanted  # fmt: skip


def table(found) -> str:
    lines = [
        f"Accuracy on 400 test digits, means over {len(SEEDS)} training seeds; backbone alone {found['zero_shot']:.3f}, "
        f"stages 1 … 4 of a chain {' / '.join(f'{v:.3f}' for v in found['stages'])}, "
        f"the whole ensemble {found['ensemble']:.3f}.",
        "",
        f"| orders B | {' | '.join(f'after {a}' for a in AT)} | deletions survived | simulated | theory |",
        "|---|" + "---:|" * (len(AT) + 3),
    ]
    for b in ORDERS:
        mean, error, theory = found["lives"][b]
        cells = " | ".join(f"{v:.3f}" for v in found["curves"][b])
        lines.append(
            f"| {b} | {cells} | {found['lives_of_samples'][b]:.1f} | {mean:.1f} ± {error:.1f} | {theory:.1f} |"
        )
    lines += [
        "",
        f"After so many deletions: means over {DRAWS} random orders of samples a seed; a dead model scores 0. "
        f"*Deletions survived* counts them by those samples, *simulated* by {LIVES} runs of uniform requests "
        "(standard error), *theory* is m·L·H with H of m·min(B, L).",
        "",
        "![accuracy over deletions](s3t_curves.svg)",
    ]
    return "\n".join(lines)


def picture(found) -> str:
    plot = Plot(
        "Accuracy over deletions", "With 1, 2 and 4 slice orders a shard.", (0, max(AT)), (0, 1),
        x_label="deletions", y_label="accuracy",
    )  # fmt: skip
    taken = []
    for b in ORDERS:
        points = list(zip(AT, found["curves"][b], strict=True))
        plot.line(points, STYLES[b][0])
        plot.label(*points[-1], f"B={b}", taken)
    return plot.standalone(dict(STYLES.values()))


test_what_must_be_seen, test_every_expectation_is_tested = must_be_seen(expectations, 9)

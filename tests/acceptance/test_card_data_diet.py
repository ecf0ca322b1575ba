"""DATA-DIET on 4,000 MNIST digits: finding wrong labels, and training on a part of the data.

Writes benchmarks/results/data_diet.json and .md.
"""

from __future__ import annotations

import _results
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.fleet.difficulty import spearman, train_on
from expunge.workloads import mnist

pytestmark = pytest.mark.acceptance
EPOCHS = (0, 1, 3, 8)
SHARES = (0.5, 0.25, 0.1)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )  # fmt: skip


def problem(labels: torch.Tensor) -> xp.Classification:
    splits = mnist.splits()
    ids = splits.train.ids.sort().values
    train = xp.Data((splits.train.fetch(ids).x, labels), ids=ids)
    recipe = xp.ClassifierRecipe(network, train, epochs=9, lr=0.05, batch_size=128)
    return xp.Classification(network(), train, splits.test, recipe=recipe)


def accuracy(found: nn.Module, test: xp.Data) -> float:
    with torch.no_grad():
        right = found(test.fetch(test.ids).x).argmax(1) == test.labels
    return float(right.double().mean())


@pytest.fixture(scope="module")
def seen():
    torch.set_num_threads(1)
    splits, runtime = mnist.splits(), xp.Runtime(threads=1)
    ids = splits.train.ids.sort().values
    true = splits.train.labels_of(ids)
    draw = torch.Generator().manual_seed(0)
    wrong = torch.randperm(len(ids), generator=draw)[: len(ids) // 10]
    labels = true.clone()
    labels[wrong] = (true[wrong] + torch.randint(1, 10, (len(wrong),), generator=draw)) % 10

    noisy = problem(labels)
    found = {
        (score, epoch): xp.difficulty(noisy, score, runs=runs, epoch=epoch, runtime=runtime)
        for score, runs in (("el2n", 6), ("grand", 3))
        for epoch in EPOCHS
    }
    found["forgetting", 9] = xp.difficulty(noisy, "forgetting", runs=6, runtime=runtime)
    noise = {f"{s}@{e}": d.noise(ids[wrong]) for (s, e), d in found.items()}

    clean = problem(true)
    ranked = xp.difficulty(clean, "el2n", runs=6, epoch=8, runtime=runtime)
    choices = {
        "top": lambda k, seed: ranked.keep(k),
        "random": lambda k, seed: ids[
            torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:k]
        ],
        "lowest": lambda k, seed: ranked.keep(k, "keep_min"),
        "top with offset": lambda k, seed: ranked.keep(
            k, "offset", offset=len(ids) - k - len(ids) // 20
        ),
    }

    def trained(choose, share: float) -> float:
        k = round(share * len(ids))
        parts = [
            accuracy(train_on(clean, choose(k, seed), seed, runtime), splits.test)
            for seed in (0, 1)
        ]
        return sum(parts) / len(parts)

    pruned = {
        share: {name: trained(choose, share) for name, choose in choices.items()}
        for share in SHARES
    }
    whole = trained(lambda k, seed: ids, 1.0)
    figures = {
        "noise": noise,
        "el2n_with_grand": {
            e: spearman(found["el2n", e].values, found["grand", e].values) for e in EPOCHS
        },
        "grand_with_input_norm": {e: found["grand", e].input_norm for e in EPOCHS},
        "largest_el2n": float(max(found["el2n", e].values.max() for e in EPOCHS)),
        "test_accuracy": {"all": whole, **{str(s): v for s, v in pruned.items()}},
    }
    write(figures, pruned)
    return figures | {"pruned": pruned}


def write(figures, pruned) -> None:
    auc = {name: one["auc"] for name, one in figures["noise"].items()}
    rows = [
        (f"AUC of wrong labels, {name}: at least 0.95", f"{auc[name]:.3f}", auc[name] >= 0.95)
        for name in auc
        if not name.endswith("@0")
    ]
    rows += [
        (f"AUC, {name}: about 0.5", f"{auc[name]:.3f}", abs(auc[name] - 0.5) < 0.1)
        for name in ("el2n@0", "grand@0")
    ]
    for share in (0.5, 0.25):
        top, middle, low = (pruned[share][n] for n in ("top", "random", "lowest"))
        rows.append((
            f"keep {share:.0%}: top > random > lowest",
            f"{top:.3f} > {middle:.3f} > {low:.3f}",
            top > middle > low,
        ))
    top, middle, offset = (pruned[0.1][n] for n in ("top", "random", "top with offset"))
    rows.append((
        "keep 10%: top collapses below random, an offset repairs it",
        f"{top:.3f} < {middle:.3f}; with offset {offset:.3f}",
        top < middle - 0.03 and offset > top + 0.03,
    ))
    _results.write("data_diet", figures, rows)


@pytest.mark.parametrize("name", ["el2n@1", "el2n@3", "el2n@8", "grand@1", "grand@3", "grand@8", "forgetting@9"])  # fmt: skip
def test_wrong_labels_are_found_from_the_first_epoch_on(seen, name):
    assert seen["noise"][name]["auc"] >= 0.95


@pytest.mark.parametrize("name", ["el2n@0", "grand@0"])
def test_untrained_networks_do_not_find_them(seen, name):
    assert abs(seen["noise"][name]["auc"] - 0.5) < 0.1


def test_grand_of_untrained_networks_is_the_length_of_the_input(seen):
    assert seen["grand_with_input_norm"][0] > 0.8
    assert abs(seen["grand_with_input_norm"][3]) < 0.3


def test_el2n_and_grand_agree_once_trained(seen):
    assert abs(seen["el2n_with_grand"][0]) < 0.4
    assert all(seen["el2n_with_grand"][e] > 0.8 for e in EPOCHS[1:])


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_hard_samples_train_better_than_random_ones_and_easy_ones_worse(seen, share):
    found = seen["pruned"][share]
    assert found["top"] > found["random"] > found["lowest"]


def test_too_few_of_the_hardest_collapse_and_an_offset_repairs_it(seen):
    found = seen["pruned"][0.1]
    assert found["top"] < found["random"] - 0.03
    assert found["top with offset"] > found["top"] + 0.03


def test_largest_error_is_below_its_bound(seen):
    assert seen["largest_el2n"] <= 2**0.5

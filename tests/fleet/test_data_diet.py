"""DATA-DIET: invariants of the card, conventions of the choices, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.data import Batch, Data
from expunge.core.errors import NeedsError, SettingError, UserError
from expunge.core.hashing import hash_model
from expunge.core.runtime import Runtime
from expunge.curvature.norms import gradient_norms
from expunge.fleet.difficulty import Difficulty, difficulty, spearman, train_on
from expunge.fleet.example_scores import ForgettingEvents, el2n, l1, max_margin, sum_margin
from expunge.problems.classification import Classification
from expunge.store import Store
from expunge.train.recipe import ClassifierRecipe

RUNTIME = Runtime(threads=1)


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def problem(order=None, epochs=6, size=60, **recipe):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=draw)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    wrong = torch.randperm(size, generator=draw)[: size // 10]
    y[wrong] = (y[wrong] + 1) % 3
    order = torch.arange(size) if order is None else order
    train = Data((x[order], y[order]), ids=order)
    made = ClassifierRecipe(net, train, epochs=epochs, lr=0.1, batch_size=16, **recipe)
    torch.manual_seed(0)
    return Classification(net(), train, (x, y), recipe=made)


def loss_each(model, batch):
    return nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")


# ------------------------------------------------------------------ invariants of the card


def test_data_diet_invariant_1_el2n_lies_between_its_bounds():
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) * 20
    y = torch.arange(200) % 7
    found = el2n(logits, y)
    assert bool((found >= 0).all()) and bool((found <= math.sqrt(2)).all())
    for classes in (2, 5, 10):
        uniform = el2n(torch.zeros(1, classes), torch.tensor([1]))
        assert float(uniform) == pytest.approx(math.sqrt(1 - 1 / classes))
    sure = torch.tensor([[1e4, 0.0, 0.0]])
    assert float(el2n(sure, torch.tensor([0]))) == 0
    assert float(el2n(sure, torch.tensor([1]))) == pytest.approx(math.sqrt(2))


class Normed(nn.Module):
    """Batch norm and a convolution: what makes per-sample gradients of a train-mode batch wrong."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def test_data_diet_invariant_2_grand_equals_a_loop_with_batches_of_one():
    torch.manual_seed(0)
    model = Normed().double().train()
    x, y = torch.randn(11, 1, 6, 6).double(), torch.arange(11) % 4
    model(x)  # running statistics of its own
    before = hash_model(model)
    found = gradient_norms(model, loss_each, [Batch(x, y, torch.arange(11), 11)], chunk=4)
    assert hash_model(model) == before and model.training
    model.eval()
    one_by_one = []
    for i in range(11):
        loss = loss_each(model, Batch(x[i : i + 1], y[i : i + 1], torch.tensor([i]), 1)).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        one_by_one.append(torch.cat([g.flatten() for g in gradients]).norm())
    torch.testing.assert_close(found, torch.stack(one_by_one), rtol=1e-5, atol=0)
    whole = torch.autograd.grad(
        loss_each(model, Batch(x, y, torch.arange(11), 11)).mean(), list(model.parameters())
    )
    mean = float(torch.cat([g.flatten() for g in whole]).norm())
    assert abs(float(found.mean()) - mean) > 0.05 * mean


@pytest.mark.parametrize("bias", [False, True])
def test_data_diet_invariant_2_closed_form_of_a_linear_model(bias):
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=bias).double()
    x, y = torch.randn(9, 5).double(), torch.arange(9) % 4
    found = gradient_norms(model, loss_each, [Batch(x, y, torch.arange(9), 9)])
    error = el2n(model(x).detach(), y)
    wanted = error * (x.square().sum(1) + float(bias)).sqrt()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


def test_data_diet_grand_of_what_vmap_cannot_do():
    class Branching(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)

    torch.manual_seed(0)
    model = Branching(5, 3)
    x, y = torch.randn(4, 5), torch.arange(4) % 3
    singles = [Batch(x[i : i + 1], y[i : i + 1], torch.tensor([i]), 1) for i in range(4)]
    found = gradient_norms(model, loss_each, [Batch(x, y, torch.arange(4), 4)])
    wanted = torch.cat([gradient_norms(model, loss_each, [one]) for one in singles])
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("score", ["el2n", "grand", "forgetting", "forgetting-clean"])
def test_data_diet_invariant_3_permuting_the_data_permutes_the_scores(score):
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    plain, mixed = (
        difficulty(p, score, runs=2, epoch=2, runtime=RUNTIME) for p in (problem(), problem(order))
    )
    assert torch.equal(plain.ids, mixed.ids)
    assert torch.equal(plain.values, mixed.values)
    assert len(plain.values.unique()) > 1


def test_data_diet_invariant_3_a_duplicate_gets_the_same_score():
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    x, y = torch.cat([x, x[:1]]), torch.cat([torch.arange(10) % 3, torch.tensor([0])])
    recipe = ClassifierRecipe(net, Data((x, y)), epochs=1, batch_size=4)
    found = difficulty(
        Classification(net(), (x, y), recipe=recipe), "el2n", runs=2, runtime=RUNTIME
    )
    assert float(found.of([0])) == pytest.approx(float(found.of([10])), rel=1e-6)
    assert float(found.of([0])) != pytest.approx(float(found.of([1])), rel=1e-3)


def test_data_diet_invariant_4_forgetting_events():
    events = ForgettingEvents(torch.tensor([7, 3, 5, 9]))
    for bit in (0, 1, 0, 1, 1, 0):
        events.see(torch.tensor([3, 7, 5]), torch.tensor([True, bool(bit), False]))
    assert events.counts().tolist() == [2, 0, math.inf, math.inf]
    # a sample that is not looked at keeps its state: right, then wrong some looks later
    events.see(torch.tensor([9]), torch.tensor([True]))
    events.see(torch.tensor([7]), torch.tensor([True]))
    events.see(torch.tensor([9]), torch.tensor([False]))
    assert events.counts().tolist() == [2, 0, math.inf, 1]


def test_data_diet_invariant_4_events_come_from_batches_in_train_mode_before_the_step():
    given = problem(epochs=2)
    looks, modes = [], []

    class Watching(nn.Sequential):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    recipe = dataclasses.replace(given.recipe, build=lambda: Watching(*net()))
    counts = []
    recipe.train(given.train.ids, 3, RUNTIME, watch=lambda b, out: looks.append((b, out.detach())))
    assert len(looks) == 2 * 4 and all(modes) and len(modes) == len(looks)
    first, output = looks[0]
    torch.testing.assert_close(output, recipe.initial(3)(first.x).detach())
    events = ForgettingEvents(given.train.ids)
    for batch, out in looks:
        events.watch(batch, out)
        counts += [out.argmax(1) == batch.y]
    assert torch.equal(torch.cat([b.ids for b, _ in looks[:4]]).sort().values, given.train.ids)
    assert torch.equal(events.counts().isinf(), ~_ever(looks, given.train.ids))


def _ever(looks, ids):
    right = torch.zeros(len(ids), dtype=torch.bool)
    for batch, out in looks:
        right[batch.ids] |= out.argmax(1) == batch.y
    return right


def test_data_diet_invariant_5_a_mean_over_runs_is_a_steadier_rank(digits):
    found = difficulty(digits, "el2n", runs=6, epoch=2, runtime=RUNTIME)
    single = np.mean([spearman(found.runs[i], found.runs[j]) for i in range(6) for j in range(i)])
    triple = spearman(found.runs[:3].mean(0), found.runs[3:].mean(0))
    assert triple > single + 0.02


def test_data_diet_invariant_6_all_samples_train_as_the_recipe_does():
    given = problem()
    whole = given.recipe(given.train.ids, 4, RUNTIME)
    assert hash_model(train_on(given, given.train.ids, 4, RUNTIME)) == hash_model(whole)


@pytest.mark.parametrize("count", [60, 37, 16, 3])
def test_data_diet_invariant_6_steps_do_not_depend_on_the_size(count, monkeypatch):
    from expunge.train import recipe as module

    steps = []
    fit = module.fit

    def counting(*args, **options):
        found = fit(*args, **options)
        steps.append(found.steps)
        return found

    monkeypatch.setattr(module, "fit", counting)
    given = problem()
    seen = []
    ids = given.train.ids[:count]
    train_on(given, ids, 0, RUNTIME)
    assert steps == [6 * 4]
    given.recipe.train(ids, 0, RUNTIME, steps=4, watch=lambda b, _: seen.append(b.ids))
    passes = -(-count // 16)
    for start in range(0, 24 - passes, passes):  # every pass sees each sample once
        assert torch.equal(torch.cat(seen[start : start + passes]).sort().values, ids)
    orders = [torch.cat(seen[at : at + passes]).tolist() for at in range(0, 24 - passes, passes)]
    assert orders.count(orders[0]) < len(orders)  # in an order of its own


# ------------------------------------------------------------------ scores and choices


def test_other_scores_by_hand():
    p = torch.tensor([[0.2, 0.5, 0.3]])
    y = torch.tensor([0])
    assert float(l1(p.log(), y)) == pytest.approx(1.6)
    assert float(max_margin(p.log(), y)) == pytest.approx(0.3)
    assert float(max_margin(p.log(), torch.tensor([1]))) == pytest.approx(-0.2)
    assert float(sum_margin(p.log(), y)) == pytest.approx(0.3 + 0.1)


def scored(values):
    ids = torch.arange(10, 10 + len(values))
    return Difficulty("el2n", 1, ids, torch.tensor([values], dtype=torch.float64), 0.0)


def test_choices_sort_from_the_easiest():
    found = scored([0.3, 0.1, math.inf, 0.2, 0.4])
    assert found.ranked().tolist() == [11, 13, 10, 14, 12]
    assert found.keep(2).tolist() == [12, 14]
    assert found.keep(2, "keep_min").tolist() == [11, 13]
    assert found.keep(2, "offset", offset=2).tolist() == [10, 14]  # the very hardest stays out
    for count, choice, offset in ((6, "keep_max", 0), (0, "keep_min", 0), (3, "offset", 3)):
        with pytest.raises(SettingError):
            found.keep(count, choice, offset)
    with pytest.raises(SettingError, match="keep_max"):
        found.keep(2, "hardest")


def test_requests_of_a_difficulty():
    found = scored([0.3, 0.1, 0.5, 0.2, 0.4, 0.6])
    data = Data(torch.zeros(6, 1), ids=torch.arange(10, 16))

    def ids(*args, **options):
        return found.request(*args, **options).resolve(data).tolist()

    assert ids("low", count=2) == [11, 13]
    assert ids("high", share=1 / 3) == [12, 15]
    assert ids("middle", count=2) == [10, 14]
    assert ids("high", count=2, among=torch.tensor([10, 11, 13])) == [10, 13]
    assert found.request().reason == "high el2n"
    with pytest.raises(SettingError, match="0 of 6"):
        found.request(share=0.01)
    with pytest.raises(SettingError, match="low, middle, high"):
        found.request("hard")


def test_strata_are_ranked_parts_without_a_common_sample():
    parts = scored([0.3, 0.1, 0.5, 0.2, 0.4, 0.6]).strata().parts
    assert {n: p.tolist() for n, p in parts.items()} == {
        "easy": [11, 13],
        "medium": [10, 14],
        "hard": [12, 15],
    }


def test_noise_figures():
    found = scored([0.1, 0.2, 0.3, math.inf])
    assert found.noise([13]) == {"auc": 1.0, "precision": 1.0, "infinite": 0.25, "mislabelled": 1}
    assert found.noise([10, 13])["auc"] == 0.5
    assert found.noise([10, 13])["precision"] == 0.5
    for bad in ([], [10, 11, 12, 13]):
        with pytest.raises(UserError, match="some mislabelled"):
            found.noise(bad)


def test_grand_of_untrained_networks_is_shown_beside_the_length_of_the_input(digits):
    found = difficulty(digits, "grand", runs=1, epoch=0, runtime=RUNTIME)
    assert found.input_norm > 0.5
    assert any("length of the input" in note for note in found.notes)
    assert not difficulty(digits, "el2n", runs=1, epoch=1, runtime=RUNTIME).notes


def test_scores_are_repeated_and_kept():
    given, store = problem(), Store.temporary()
    first = difficulty(given, runs=2, store=store, runtime=RUNTIME)
    assert first.epoch == 1 and first.runs.shape == (2, 60)
    assert not torch.equal(first.runs[0], first.runs[1])
    assert torch.equal(difficulty(given, runs=2, runtime=RUNTIME).runs, first.runs)
    assert len(store.runs(kind="difficulty")) == 1
    assert torch.equal(difficulty(given, runs=2, store=store, runtime=RUNTIME).runs, first.runs)
    difficulty(given, runs=3, store=store, runtime=RUNTIME)
    assert len(store.runs(kind="difficulty")) == 2


def test_what_is_refused():
    given = problem()
    for options in ({"runs": 0}, {"epoch": 7}, {"epoch": -1}, {"score": "forgetting", "epoch": 0}):
        with pytest.raises(SettingError):
            difficulty(given, **options)
    with pytest.raises(SettingError, match="el2n"):
        difficulty(given, "hardness")
    bare = Classification(net(), (torch.randn(8, 6), torch.arange(8) % 3))
    with pytest.raises(NeedsError, match="ClassifierRecipe"):
        xp.difficulty(bare)
    with pytest.raises(UserError, match="no difficulty"):
        scored([0.1, 0.2]).of([11, 12])
    with pytest.raises(UserError, match="no sample"):
        train_on(given, torch.empty(0, dtype=torch.long), 0)


@pytest.mark.filterwarnings("ignore")
def test_scores_that_are_no_numbers_are_refused():
    given = problem()
    given.recipe = dataclasses.replace(given.recipe, lr=1e30, epochs=3)
    with pytest.raises(xp.ExpungeError):
        difficulty(given, runs=1, epoch=3, runtime=RUNTIME)

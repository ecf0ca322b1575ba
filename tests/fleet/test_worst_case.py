"""WORST-CASE-FORGET: invariants 2-6 of the card (1 is in tests/train/test_box_simplex.py), and the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.data import Data
from expunge.core.errors import DataError, NeedsError, RequestError, SettingError
from expunge.core.hashing import hash_model
from expunge.core.runtime import Runtime
from expunge.fleet import worst_case as module
from expunge.fleet.forget_sets import TAILS, forget_set
from expunge.fleet.worst_case import each_loss, gradient, shares, sign_descent, worst_case
from expunge.problems.classification import Classification
from expunge.store import Store

RUNTIME = Runtime(threads=1)


def net():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Normed(nn.Module):
    """Batch norm: what a sample's input does to others in train mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.body(x)


def tensors(size=90):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=draw)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    wrong = torch.randperm(size, generator=draw)[: size // 10]
    y[wrong] = (y[wrong] + 1) % 3
    return x, y


def problem(x=None, y=None, build=net, trained=True):
    given = tensors()
    x, y = given[0] if x is None else x, given[1] if y is None else y
    train = Data((x, y), ids=torch.arange(10, 10 + len(x)))
    recipe = xp.ClassifierRecipe(build, train, epochs=15, lr=0.1, batch_size=16)
    torch.manual_seed(0)
    model = recipe(train.ids, 0) if trained else build()
    return Classification(model, train, tensors(), recipe=recipe)


@pytest.fixture(scope="module")
def trained():
    return problem()


def descended(given, weights, *, lr=1e-3, epochs=2, batch_size=16, scale=1.0, model=None):
    model = copy.deepcopy(given.model) if model is None else model
    ids = given.train.ids.sort().values
    sign_descent(
        model, given, ids, weights * scale, epochs=epochs, lr=lr, batch_size=batch_size,
        order=lambda epoch: torch.Generator().manual_seed(epoch), runtime=RUNTIME,
    )  # fmt: skip
    return model


# ------------------------------------------------------------------ invariants of the card


@pytest.mark.parametrize("balanced", [False, True])
def test_worst_case_forget_invariant_2_without_a_step_nothing_moves(trained, balanced):
    found = worst_case(trained, 15, rate=0, rounds=3, balanced=balanced, runtime=RUNTIME)
    assert torch.equal(found.found, found.start)
    assert torch.equal(found.weights, found.weights[:1].expand(4, -1))
    other = worst_case(trained, 15, rate=0, rounds=1, runtime=Runtime(threads=1, seed=1))
    assert not torch.equal(other.start, found.start)


@pytest.mark.parametrize("reverse", [False, True])
def test_worst_case_forget_invariant_2_an_endless_step_sorts_by_loss(trained, monkeypatch, reverse):
    seen = []
    after = module._after

    def spy(*args):
        seen.append(after(*args))
        return seen[-1]

    monkeypatch.setattr(module, "_after", spy)
    found = worst_case(trained, 15, reverse=reverse, rate=1e12, rounds=1, gamma=0, runtime=RUNTIME)
    order = torch.argsort(seen[0], descending=reverse)[:15]
    assert torch.equal(found.found, found.units[order].sort().values)
    assert not torch.equal(found.found, found.start)


def test_worst_case_forget_invariant_3_every_coordinate_moves_by_eta(trained):
    given = problem(trained=False)
    given.model = given.model.double()
    given.train = Data((tensors()[0].double(), tensors()[1]), ids=given.train.ids)
    weights = torch.rand(90, generator=torch.Generator().manual_seed(2), dtype=torch.double) + 0.1
    one = descended(given, weights, lr=0.01, epochs=1, batch_size=90)
    loss = (weights * given.each_loss(given.model, given.train.fetch(given.train.ids))).sum()
    slopes = torch.autograd.grad(loss, list(given.model.parameters()))
    for before, after, slope in zip(
        given.model.parameters(), one.parameters(), slopes, strict=True
    ):
        torch.testing.assert_close(after - before, -0.01 * slope.sign(), rtol=0, atol=1e-14)
    assert any(bool((s == 0).any()) for s in slopes) or all(bool((s != 0).all()) for s in slopes)
    for scale in (4.0, 1024.0):
        twice = descended(given, weights, lr=0.01, epochs=3, scale=scale)
        assert hash_model(twice) == hash_model(descended(given, weights, lr=0.01, epochs=3))


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_worst_case_forget_invariant_4_gradient_by_finite_differences(gamma):
    x, y = tensors(12)
    given = problem(x, y, trained=False)
    given.model = given.model.double()
    given.train = Data((x.double(), y), ids=given.train.ids)
    ids = given.train.ids
    w = torch.rand(12, generator=torch.Generator().manual_seed(3), dtype=torch.double)

    def losses(at):
        model = descended(given, 1 - at, lr=0.01, epochs=3, batch_size=5)
        return each_loss(model, given, given.train, ids, RUNTIME)

    def f(at):
        return float(at @ losses(at) + gamma * at.square().sum())

    small = 1e-6
    slopes = [(f(w + small * e) - f(w - small * e)) / (2 * small) for e in torch.eye(12).double()]
    wanted = gradient(losses(w), w, gamma)
    torch.testing.assert_close(torch.tensor(slopes).double(), wanted, rtol=1e-6, atol=1e-7)
    assert float(wanted.std()) > 0.05  # samples differ, so that a constant would be seen


@pytest.mark.parametrize("build", [net, Normed])
def test_worst_case_forget_invariant_5_what_is_forgotten_has_no_effect(build):
    x, y = tensors()
    given = problem(build=build)
    gone = torch.zeros(90, dtype=torch.double)
    gone[[3, 40, 41, 88]] = 1
    rest = torch.rand(90, generator=torch.Generator().manual_seed(4), dtype=torch.double) * 0.9
    w = torch.maximum(gone, rest)
    wanted = hash_model(descended(given, 1 - w))
    others = given.about(given.model)
    forgotten = gone.bool()
    others.train = Data(
        (torch.where(forgotten[:, None], 100.0, x), torch.where(forgotten, (y + 1) % 3, y)),
        ids=given.train.ids,
    )
    assert hash_model(descended(others, 1 - w)) == wanted
    counts = torch.where(forgotten, y, (y + 1) % 3)
    others.train = Data((x, counts), ids=given.train.ids)
    assert hash_model(descended(others, 1 - w)) != wanted


def test_worst_case_forget_invariant_5_without_weights_it_is_sign_descent(trained):
    found = descended(trained, torch.ones(90, dtype=torch.double), epochs=2)
    model = copy.deepcopy(trained.model).train()
    ids = trained.train.ids.sort().values
    for epoch in range(2):
        order = torch.randperm(90, generator=torch.Generator().manual_seed(epoch))
        for chunk in ids[order].split(16):
            batch = trained.train.fetch(chunk)
            model.zero_grad()
            nn.functional.cross_entropy(model(batch.x), batch.y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 1e-3 * p.grad.sign()
    for p, q in zip(model.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(p, q)


FINETUNE = {"unlearner": "finetune", "lr": 3e-3, "epochs": 6}
RETRAIN = {"unlearner": "retrain", "lr": 2e-2, "epochs": 20}


@pytest.mark.parametrize("settings", [FINETUNE, RETRAIN])
def test_worst_case_forget_invariant_6_the_objective_falls(trained, settings):
    how = {"rounds": 8, "rate": 3.0, **settings}  # the card: for suitable steps
    found = worst_case(trained, 20, **how, runtime=RUNTIME)
    assert len(found.objective) == 9 and found.weights.shape == (9, 90)
    assert found.objective[-1] < 0.7 * found.objective[0]  # of the random start
    away = worst_case(trained, 20, reverse=True, **how, runtime=RUNTIME)
    assert away.objective[-1] > 1.3 * away.objective[0]
    assert not bool(torch.isin(found.found, away.found).any())
    # each round's weights are in the set, and the ends are whole
    for row in (*found.weights, *away.weights):
        assert 0 <= float(row.min()) <= float(row.max()) <= 1
        assert float(row.sum()) == pytest.approx(20, abs=0.02)
    assert set(found.weights[-1].tolist()) == set(found.weights[0].tolist()) == {0.0, 1.0}


# ------------------------------------------------------------------ the rest


def test_redundant_samples_survive_retraining_and_memorised_ones_do_not(trained):
    def retrained_accuracy(request):
        ids = request.resolve(trained.train)
        model = trained.recipe(trained.train.without(ids), 7)
        batch = trained.train.fetch(ids)
        return float((model(batch.x).argmax(1) == batch.y).double().mean())

    how = {"rounds": 8, "rate": 3.0, "lr": 3e-3, "epochs": 6}
    hard = worst_case(trained, 15, **how, runtime=RUNTIME)
    easy = worst_case(trained, 15, reverse=True, **how, runtime=RUNTIME)
    assert retrained_accuracy(hard.request()) > 0.95
    assert retrained_accuracy(easy.request()) < 0.6
    assert hard.tail == "redundant" and "redundant" in hard.request().reason
    assert easy.tail == "memorised" and "memorised" in easy.request().reason
    assert hard.request("mine").reason == "mine"


def test_the_default_step_follows_the_losses(trained):
    found = worst_case(trained, 15, rounds=1, epochs=1, runtime=RUNTIME)
    scaled = trained.about(trained.model)
    scaled.each_loss = lambda m, b: 1e-4 * Classification.each_loss(scaled, m, b)
    again = worst_case(scaled, 15, rounds=1, epochs=1, gamma=0, runtime=RUNTIME)
    assert again.rate == pytest.approx(1e4 * found.rate, rel=1e-4)
    ten = worst_case(trained, 15, rounds=10, epochs=1, runtime=RUNTIME)
    assert ten.rate == pytest.approx(
        found.rate / 10
    )  # a median loss moves a weight by 1 in all rounds
    assert not torch.equal(again.found, again.start)
    fixed = worst_case(scaled, 15, rounds=1, epochs=1, rate=0.01, runtime=RUNTIME)
    assert torch.equal(fixed.found, fixed.start)  # the released step, on small losses


def test_weights_become_whole_every_few_rounds(trained):
    how = {"rounds": 5, "rate": 1.0, "lr": 5e-3, "runtime": RUNTIME}
    soft = worst_case(trained, 20, binarise=20, **how).weights
    whole = worst_case(trained, 20, binarise=2, **how).weights
    assert [sorted(set(w.tolist())) == [0, 1] for w in whole] == [True, False, True, False, True, True]  # fmt: skip
    assert not any(sorted(set(w.tolist())) == [0, 1] for w in soft[1:-1])


def test_of_each_class_its_share(trained):
    found = worst_case(trained, 20, rounds=2, balanced=True, runtime=RUNTIME)
    labels = trained.train.labels
    counts = trained.train.labels_of(found.found).bincount(minlength=3)
    assert counts.tolist() == list(shares(labels, 20).values())
    assert int(counts.sum()) == 20
    assert shares(torch.tensor([0] * 5 + [2] * 5 + [7] * 1), 4) == {0: 2, 2: 2, 7: 0}
    free = worst_case(trained, 20, rounds=2, runtime=RUNTIME)
    assert trained.train.labels_of(free.found).bincount(minlength=3).tolist() != counts.tolist()


def test_only_some_may_be_chosen(trained):
    some = trained.train.ids[20:60]
    found = worst_case(trained, 10, rounds=2, among=some, runtime=RUNTIME)
    assert bool(torch.isin(found.found, some).all())
    assert bool((found.weights[:, ~torch.isin(found.units, some)] == 0).all())
    with pytest.raises(SettingError, match="41 of 40 samples"):
        worst_case(trained, 41, among=some)
    with pytest.raises(RequestError):
        worst_case(trained, 3, among=torch.tensor([1, 2, 3, 4]))


def test_whole_classes(trained):
    batch = trained.train.fetch(trained.train.ids)
    each = trained.each_loss(trained.model, batch).detach()
    means = torch.stack([each[batch.y == c].mean() for c in range(3)])
    how = {
        "by": "class",
        "rounds": 6,
        "rate": 10.0,
        "lr": 1e-9,
        "runtime": RUNTIME,
    }  # the model stays as it is
    found = worst_case(trained, 1, **how)
    assert found.units.tolist() == [0, 1, 2] and found.weights.shape == (7, 3)
    assert found.request().label == (int(means.argmin()),)
    assert found.objective[-1] == pytest.approx(float(means.min()), rel=1e-4)
    away = worst_case(trained, 1, reverse=True, **how)
    assert away.request().label == (int(means.argmax()),)
    with pytest.raises(SettingError, match="3 of 3 classes"):
        worst_case(trained, 3, by="class")
    barred = trained.train.ids[trained.train.labels != 1]
    only = worst_case(trained, 1, by="class", rounds=1, among=barred, runtime=RUNTIME)
    assert only.found.tolist() != [1]


class Drawn(torch.utils.data.Dataset):
    """Samples that come out different each time they are read."""

    def __init__(self, x, y):
        self.x, self.targets = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        return self.x[at] + torch.randn(6) * 50, self.targets[at]


def test_losses_are_those_of_clean_samples_in_eval_mode():
    x, y = tensors()
    given = problem(build=lambda: nn.Sequential(nn.Dropout(0.5), net()))
    model = copy.deepcopy(given.model).train()
    twice = [each_loss(model, given, given.train, given.train.ids, RUNTIME) for _ in range(2)]
    assert torch.equal(*twice) and not twice[0].requires_grad
    augmented = given.about(given.model, Data(Drawn(x, y), ids=given.train.ids))
    clean = Data((x, y), ids=given.train.ids)
    how = {"rounds": 1, "epochs": 1, "lr": 1e-9, "runtime": RUNTIME}
    found = worst_case(augmented, 15, clean=clean, **how)
    assert found.objective[0] == pytest.approx(
        float(twice[0][found.weights[0].bool()].mean()), rel=1e-4
    )
    assert worst_case(augmented, 15, **how).objective[0] > 3 * found.objective[0]
    with pytest.raises(RequestError):
        worst_case(augmented, 15, clean=Data((x, y)))


def test_the_original_is_left_alone_and_the_search_repeats(trained):
    before, drawn = hash_model(trained.model), torch.get_rng_state()
    first = worst_case(trained, 15, rounds=2, runtime=RUNTIME)
    assert hash_model(trained.model) == before and torch.equal(torch.get_rng_state(), drawn)
    assert not trained.model.training
    again = worst_case(trained, 15, rounds=2, runtime=Runtime(threads=1))
    assert torch.equal(first.weights, again.weights) and first.objective == again.objective
    assert RUNTIME.cost.gradients > 0


def test_pruned_weights_stay_zero():
    from expunge.core.pruned import keep_only

    given = problem()
    kept = {"0.weight": torch.rand(16, 6, generator=torch.Generator().manual_seed(0)) > 0.5}
    model = descended(given, torch.ones(90), model=keep_only(copy.deepcopy(given.model), kept))
    assert bool((model[0].weight[~kept["0.weight"]] == 0).all())
    assert bool((model[0].weight[kept["0.weight"]] != 0).all())


def test_a_single_sample_left_over_is_passed_over_where_there_is_batch_norm():
    given = problem(build=Normed)
    weights = torch.ones(90)
    weights[:9] = 0  # 81 samples: five batches of sixteen and one sample
    descended(given, weights)


def test_a_search_is_kept(trained):
    store = Store.temporary()
    first = worst_case(trained, 15, rounds=2, store=store, runtime=RUNTIME)
    again = worst_case(trained, 15, rounds=2, store=store, runtime=RUNTIME)
    assert len(store.runs(kind="worst-case")) == 1
    assert torch.equal(first.weights, again.weights) and first.objective == again.objective
    assert torch.equal(first.found, again.found) and first.rate == again.rate
    worst_case(trained, 15, rounds=2, reverse=True, store=store, runtime=RUNTIME)
    worst_case(trained, 15, rounds=2, lr=2e-3, store=store, runtime=RUNTIME)
    assert len(store.runs(kind="worst-case")) == 3
    assert {r.record["tail"] for r in store.runs(kind="worst-case")} == {"redundant", "memorised"}


def frozen(given):
    other = given.about(given.model)
    other.model[0].requires_grad_(False)
    return other


def zeros():
    model = net()
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def test_a_search_is_not_that_of_other_weights_that_move_or_another_beginning(trained):
    def of(problem, store, **how):
        return worst_case(problem, 15, rounds=1, epochs=1, store=store, runtime=RUNTIME, **how)

    other = frozen(trained)
    assert other.fingerprint() != trained.fingerprint()
    pairs = [(trained, other, {"lr": 0.1})]
    built = [Classification(trained.model, trained.train, build=b) for b in (net, zeros)]
    pairs.append((*built, {"unlearner": "retrain"}))
    for one, two, how in pairs:
        store = Store.temporary()
        first, second = (of(p, store, **how).objective for p in (one, two))
        assert first != second and second == of(two, None, **how).objective


def test_what_is_refused(trained):
    for options in (
        {"rounds": 0}, {"lr": 0}, {"rate": -1}, {"gamma": -1}, {"unlearner": "ascent"}, {"by": "user"},
        {"by": "class", "balanced": True}, {"steps": 3},
    ):  # fmt: skip
        with pytest.raises(SettingError):
            worst_case(trained, 1, **options)
    for size in (0, 90, 91):
        with pytest.raises(SettingError, match=f"{size} of 90 samples"):
            worst_case(trained, size)
    x, _ = tensors()
    bare = Classification(net(), x)
    with pytest.raises(NeedsError, match="no labels"):
        worst_case(bare, 3)
    with pytest.raises(NeedsError, match="build="):
        worst_case(Classification(net(), tensors()), 3, unlearner="retrain")
    with pytest.raises(xp.ExpungeError, match="lower lr"):
        worst_case(trained, 3, lr=1e38, runtime=RUNTIME)
    with pytest.raises(NeedsError, match="no labels"):
        worst_case(trained, 3, clean=Data(x, ids=trained.train.ids), runtime=RUNTIME)
    numbers = xp.Regression(nn.Linear(6, 1), (x, x[:, 0]))
    for how in ({"by": "class"}, {"balanced": True}):
        with pytest.raises(SettingError, match="no class numbers"):
            worst_case(numbers, 3, **how)
    with pytest.raises(DataError, match="one number a sample"):
        worst_case(xp.Regression(nn.Linear(6, 1), (x, x[:, :1])), 3)
    with pytest.raises(SettingError, match=r"2\.5 of 90"):
        worst_case(trained, 2.5)
    for large in ({"rate": float("inf")}, {"gamma": float("inf")}):
        with pytest.raises(SettingError, match="lower rate"):
            worst_case(trained, 3, rounds=1, epochs=1, **large, runtime=RUNTIME)


# ------------------------------------------------------------------ sets by name


def test_sets_by_name(trained):
    store = Store.temporary()
    how = {"store": store, "runtime": RUNTIME, "search": {"rounds": 8, "lr": 3e-3, "epochs": 6}}
    sets = {name: forget_set(trained, name, 15, **how) for name in TAILS}
    ids = {name: set(r.resolve(trained.train).tolist()) for name, r in sets.items()}
    assert all(len(one) == 15 for one in ids.values())
    assert len({frozenset(one) for one in ids.values()}) == 5
    for name, tail in TAILS.items():
        assert (tail in sets[name].reason) == (tail != "average")
    scored = xp.difficulty(trained, "el2n", runs=10, store=store, runtime=RUNTIME)
    assert ids["low-el2n"] == set(scored.keep(15, "keep_min").tolist())
    assert ids["high-el2n"] == set(scored.keep(15).tolist())
    assert len(ids["easiest"] & ids["high-el2n"]) > 3 * len(ids["easiest"] & ids["low-el2n"])
    other = forget_set(trained, "random", 15, draw=1, **how)
    assert set(other.resolve(trained.train).tolist()) != ids["random"]


@pytest.mark.parametrize("name", list(TAILS))
def test_sets_of_each_class_its_share_and_apart(trained, name):
    some = trained.train.ids[:70]
    request = forget_set(
        trained, name, 14, balanced=True, among=some, search={"rounds": 1}, runtime=RUNTIME
    )
    ids = request.resolve(trained.train)
    assert bool(torch.isin(ids, some).all())
    counts = trained.train.labels_of(ids).bincount(minlength=3).tolist()
    assert counts == list(shares(trained.train.labels_of(some), 14).values())


@pytest.mark.parametrize("name", list(TAILS))
def test_sets_among_some_hold_as_many_as_asked_for(trained, name):
    how = {"search": {"rounds": 1, "epochs": 1}, "runtime": RUNTIME}
    twice = [10, 11, 12, 13, 14, 15, 16, 17] * 2
    ids = forget_set(trained, name, 5, among=twice, **how).resolve(trained.train).tolist()
    assert len(set(ids)) == 5 and set(ids) <= set(twice)
    with pytest.raises(SettingError, match="10 of 8"):
        forget_set(trained, name, 10, among=torch.tensor(twice), **how)
    with pytest.raises(RequestError, match="ids 100"):
        forget_set(trained, name, 5, among=torch.arange(96, 106), **how)


def test_sets_that_are_refused(trained):
    with pytest.raises(SettingError, match=r"2\.5 of 90"):
        forget_set(trained, "random", 2.5)
    with pytest.raises(SettingError, match="high-el2n"):
        forget_set(trained, "hardest", 3)
    with pytest.raises(SettingError, match="90 of 90"):
        forget_set(trained, "random", 90)
    with pytest.raises(SettingError, match="pace"):
        forget_set(trained, "worst-case", 3, search={"pace": 1})

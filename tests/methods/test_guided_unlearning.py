"""GuidedUnlearning: the algorithm of the card comparator, its two traps avoided, invariant 5."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from expunge.core.errors import DataError, NeedsError, SettingError
from expunge.core.method import unlearn
from expunge.core.pruned import keep_only
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.general.guided_unlearning import GuidedUnlearning, last_groups
from expunge.problems.classification import Classification
from expunge.train.groups import layer_groups
from expunge.train.masks import only
from expunge.train.reset import renew
from expunge.workloads.nets import SmallResNet, digits_mlp

THREES = Request(label=(3,))


def run(problem, method, request=THREES):
    return unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1))


def view_of(problem, request=THREES, method=None):
    return View(problem, request, (method or GuidedUnlearning(reset=1)).needs, Runtime(seed=0))


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "request_", [THREES, Request(label=(3, 8)), Request(fraction=0.2, seed=1)], ids=str
)
def test_guided_labels_are_never_the_class_to_forget(digits, request_):
    """The second largest logit of a misclassified image can be its own class: that is no help."""
    problem = copy.copy(digits)
    problem.model = copy.deepcopy(digits.model)
    with torch.no_grad():  # a bad classifier: many are misclassified, often with their class second
        problem.model[-1].weight.add_(
            torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
        )
    view = view_of(problem, request_)
    labels = GuidedUnlearning().best_labels(view, problem.model, Runtime(seed=0))
    batch = digits.train.fetch(view.forget.ids)
    with torch.no_grad():
        logits = problem.model(batch.x)
    second = logits.topk(2).indices[:, 1]
    assert bool((second == batch.y).any())  # the trap is there
    gone = set(request_.label or ())
    for row, y, label in zip(logits.tolist(), batch.y.tolist(), labels.tolist(), strict=True):
        allowed = [c for c in range(10) if c != y and c not in gone]
        assert label == max(allowed, key=lambda c: row[c])


def test_guided_labels_come_from_the_model_before_anything_changes(digits, monkeypatch):
    taught: dict[int, set[int]] = {}
    true = Classification.each_loss
    forgotten = set(THREES.resolve(digits.train).tolist())

    def spy(self, model, batch):
        for i, y in zip(batch.ids.tolist(), batch.y.tolist(), strict=True):
            if i in forgotten and y != 3:
                taught.setdefault(i, set()).add(y)
        return true(self, model, batch)

    view = view_of(digits)
    labels = GuidedUnlearning().best_labels(view, view.model().eval(), Runtime(seed=0))
    monkeypatch.setattr(Classification, "check", lambda self: None)
    monkeypatch.setattr(Classification, "each_loss", spy)
    run(digits, GuidedUnlearning(reset=1, epochs=3, lr=0.1))
    assert taught == {
        i: {y} for i, y in zip(view.forget.ids.tolist(), labels.tolist(), strict=True)
    }


def test_guided_without_another_class_says_so():
    x = torch.rand(8, 4)
    problem = Classification(nn.Sequential(nn.Linear(4, 1)), (x, torch.zeros(8, dtype=torch.long)))
    with pytest.raises(DataError, match="no other class"):
        run(problem, GuidedUnlearning(reset=0), Request(ids=(0,)))


class Jittered(Dataset):
    """Each read of a sample differs, as with random crops."""

    def __init__(self, x, y):
        self.x, self.targets, self.reads = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.reads += 1
        return self.x[i] + self.reads * 1e-7, self.targets[i]


def test_guided_reads_augmented_samples_anew(digits, monkeypatch):
    whole = digits.train.fetch(digits.train.ids[:200])
    problem = Classification(digits.model, Jittered(whole.x, whole.y.tolist()), build=digits_mlp)
    seen: dict[int, list[float]] = {}
    true = Classification.each_loss

    def spy(self, model, batch):
        if model.training:
            for i, x in zip(batch.ids.tolist(), batch.x, strict=True):
                seen.setdefault(i, []).append(float(x.double().sum()))
        return true(self, model, batch)

    monkeypatch.setattr(Classification, "check", lambda self: None)
    monkeypatch.setattr(Classification, "each_loss", spy)
    run(problem, GuidedUnlearning(reset=1, warmup=0, ascent=0, epochs=4))
    assert len(seen) == 200
    assert all(len(v) == 4 and len(set(v)) > 1 for v in seen.values())


# ------------------------------------------------------------------ the passes


def test_guided_passes_visit_what_the_card_says(digits, monkeypatch):
    visits = []
    true = Classification.each_loss
    forgotten = THREES.resolve(digits.train)

    def spy(self, model, batch):
        gone = torch.isin(batch.ids, forgotten)
        visits.append((len(batch), int(gone.sum()), int((batch.y == 3).sum())))
        return true(self, model, batch)

    monkeypatch.setattr(Classification, "check", lambda self: None)
    monkeypatch.setattr(Classification, "each_loss", spy)
    outcome = run(digits, GuidedUnlearning(reset=1, epochs=2, batch_size=100, ascent_batches=8))
    n, f = len(digits.train), len(forgotten)
    warm = -(-(n - f) // 100)
    whole = -(-n // 100)
    assert len(visits) == warm + 2 * (1 + whole)
    assert all(gone == 0 for _, gone, _ in visits[:warm])
    for start in (warm, warm + 1 + whole):
        assert visits[start] == (f, f, f)  # ascent: one batch of true labels
        relearn = visits[start + 1 : start + 1 + whole]
        assert sum(gone for _, gone, _ in relearn) == f
        assert all(threes == 0 for _, _, threes in relearn)
        assert len({gone for _, gone, _ in relearn}) > 1  # shuffled among the rest
    assert outcome.cost.gradients == (n - f) + 2 * (f + n)


def test_guided_learning_rates_fall_to_the_floor_and_ascent_is_smaller(digits):
    outcome = run(
        digits, GuidedUnlearning(reset=1, epochs=4, lr=0.01, batch_size=2000, ascent_batches=1)
    )
    rates = {p["stage"]: p["lr"] for p in outcome.curve}
    assert rates["warm-up"] == 0.01
    falls = [rates[f"relearn {e}"] for e in range(1, 5)]
    assert falls[0] == pytest.approx(0.01) and falls == sorted(falls, reverse=True)
    assert falls[2] == pytest.approx(0.001 + 0.009 / 2) and falls[3] > 0.001
    assert [rates[f"ascent {e}"] for e in range(1, 5)] == pytest.approx([r / 100 for r in falls])


def test_guided_ascent_climbs(digits):
    batch = digits.train.fetch(THREES.resolve(digits.train))
    losses = []
    for ascent in (0.0, 5.0):
        method = GuidedUnlearning(reset=1, warmup=1, epochs=1, lr=1e-3, ascent=ascent)
        model = run(digits, method).model
        with torch.no_grad():
            losses.append(float(digits.each_loss(model, batch).mean()))
    assert losses[1] > losses[0]


def test_guided_passes_have_their_own_optimiser(digits, monkeypatch):
    from expunge.train import fit

    made = []
    true = fit.make_optimizer

    def spy(*args, **kwargs):
        made.append(true(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(fit, "make_optimizer", spy)
    run(digits, GuidedUnlearning(reset=1, epochs=3))
    assert len(made) == 1 + 2 * 3
    run(digits, GuidedUnlearning(reset=0, warmup=0, ascent=0, epochs=3))
    assert len(made) == 7 + 3


def test_guided_is_the_loop_of_its_card_with_clipped_ascent():
    """Whole batches in float64 against a loop written out; the clip decides the ascent's length."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)

    def build():
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    torch.manual_seed(0)
    original = build()
    problem, request = Classification(original, (x, y), build=build), Request(ids=tuple(range(8)))
    method = GuidedUnlearning(epochs=3, lr=0.1, reset=1, ascent=0.5, batch_size=64, clip=0.05)
    outcome = run(problem, method, request)

    model = copy.deepcopy(original)
    model[2].load_state_dict(view_of(problem, request).fresh("reset")[2].state_dict())
    with torch.no_grad():
        labels = original(x[:8]).scatter(1, y[:8, None], -torch.inf).argmax(1)
    better = torch.cat([labels, y[8:]])

    def step(lr, sign, inputs, targets, clip=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        optimizer.zero_grad()
        (sign * nn.functional.cross_entropy(model(inputs), targets)).backward()
        if clip is not None:
            assert float(nn.utils.clip_grad_norm_(model.parameters(), clip)) > 2 * clip
        optimizer.step()

    step(0.1, 1, x[8:], y[8:])
    for epoch in range(3):
        lr = 0.1 * (0.1 + 0.9 * (1 + math.cos(math.pi * epoch / 3)) / 2)
        step(lr * 0.5, -1, x[:8], y[:8], clip=0.05)
        step(lr, 1, x, better)
    for got, wanted in zip(outcome.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)


# ------------------------------------------------------------------ groups and reset


def test_guided_groups_of_a_residual_network_are_its_blocks():
    groups = layer_groups(SmallResNet(width=4))
    heads = [{n.split(".")[0] for n in g} for g in groups]
    assert heads == [{"stem", "norm"}, {"block1"}, {"block2"}, {"block3"}, {"head"}]
    assert list(itertools.chain(*groups)) == list(SmallResNet(width=4).state_dict())
    assert "block2.shortcut.weight" in groups[2]
    assert [g[0] for g in layer_groups(digits_mlp())] == ["0.weight", "2.weight", "4.weight"]


def test_guided_groups_follow_the_role_blocks(digits):
    problem = Classification(digits.model, digits.train, roles={"blocks": ["0"]}, build=digits_mlp)
    view = view_of(problem)
    assert last_groups(view, problem.model, 2) == [
        ["2.weight", "2.bias"],
        ["4.weight", "4.bias"],
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_comparator_invariant_5_reset_leaves_the_first_groups_alone(count):
    torch.manual_seed(0)
    model, fresh = SmallResNet(width=4), SmallResNet(width=4)
    with torch.no_grad():  # running statistics and norm weights as after a training
        for tensor in model.state_dict().values():
            tensor.add_(1)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    groups = layer_groups(model)
    drawn = renew(model, fresh, groups[-count:])
    after, new = model.state_dict(), fresh.state_dict()
    first, last = (list(itertools.chain(*g)) for g in (groups[:-count], groups[-count:]))
    assert all(torch.equal(after[n], before[n]) for n in first)
    assert all(torch.equal(after[n], new[n]) for n in last)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert drawn == sum(sizes.get(n, 0) for n in last)


def test_reset_leaves_frozen_layers_whole():
    torch.manual_seed(0)
    model, fresh = SmallResNet(width=4), SmallResNet(width=4)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    drawn = renew(model, fresh, layer_groups(model)[-2:], only(model, ["head"]))
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert moved == {"head.weight", "head.bias"} and drawn == 17 * 10


def test_reset_keeps_a_pruned_model_pruned(digits):
    kept = {"4.weight": torch.ones(10, 64, dtype=torch.bool)}
    kept["4.weight"][:, ::2] = False
    model = keep_only(copy.deepcopy(digits.model), kept)
    problem = digits.pruned(model, kept, recipe=digits.recipe, name="pruned", source={})
    after = run(problem, GuidedUnlearning(reset=1, epochs=1)).model
    assert not after[4].weight[:, ::2].any()
    assert bool((after[4].weight[:, 1::2] != model[4].weight[:, 1::2]).all())


class Tied(nn.Module):
    """The third layer shares the matrix of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.third, self.last = nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
        self.third.weight = self.first.weight

    def forward(self, x):
        for layer in (self.first, self.middle, self.third):
            x = layer(x).tanh()
        return self.last(x)


def test_reset_takes_a_shared_weight_for_one():
    torch.manual_seed(0)
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    problem = Classification(Tied(), (x, y), build=Tied)
    frozen = run(problem, GuidedUnlearning(epochs=1, reset=2, train="last(1)"), Request(label=(1,)))
    assert torch.equal(frozen.model.first.weight, problem.model.first.weight)
    assert frozen.details["renewed"] == 21
    free = run(problem, GuidedUnlearning(epochs=1, reset=2, lr=1e-9), Request(label=(1,)))
    assert free.details["renewed"] == 36 + 21
    fresh = problem.fresh(Runtime(seed=0).seed_for("fresh", "reset"))
    torch.testing.assert_close(free.model.third.weight, fresh.third.weight, atol=1e-5, rtol=0)
    assert free.model.third.weight is free.model.first.weight


@pytest.mark.parametrize("norm", ["frozen", "recalibrate"])
def test_guided_refuses_statistics_of_an_untrained_model(norm):
    torch.manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10

    def build():
        return SmallResNet(width=4)

    problem = Classification(build(), (x, y), build=build)
    with pytest.raises(SettingError, match=r"running statistics of 'block3.*norm=train or reset=0"):
        run(problem, GuidedUnlearning(reset=2, norm=norm, epochs=1))
    # the head alone has none; what is frozen keeps its own
    for settings in ({"reset": 1}, {"reset": 0}, {"reset": 2, "train": "last(1)"}):
        run(problem, GuidedUnlearning(norm=norm, epochs=1, **settings))


def test_guided_reset_draws_new_weights_and_its_share_is_recorded(digits):
    kept, drawn = (
        run(digits, GuidedUnlearning(reset=r, warmup=0, ascent=0, epochs=1, lr=1e-9))
        for r in (0, 1)
    )
    assert kept.details["renewed"] == 0 and drawn.details["renewed"] == 650
    original = digits.model[4].weight
    torch.testing.assert_close(kept.model[4].weight, original, atol=1e-5, rtol=0)
    fresh = digits.fresh(Runtime(seed=0).seed_for("fresh", "reset"))
    torch.testing.assert_close(drawn.model[4].weight, fresh[4].weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn.model[2].weight, digits.model[2].weight, atol=1e-5, rtol=0)


def test_guided_refuses_to_reset_everything_or_without_an_architecture(digits):
    with pytest.raises(SettingError, match="reset=3 of 3"):
        run(digits, GuidedUnlearning())
    bare = Classification(digits.model, digits.train)
    with pytest.raises(NeedsError, match="build="):
        run(bare, GuidedUnlearning(reset=1))
    assert run(bare, GuidedUnlearning(reset=0, epochs=1)).details["renewed"] == 0

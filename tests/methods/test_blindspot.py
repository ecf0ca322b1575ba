"""Blindspot: the card's invariants on tiny networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.hashing import hash_model
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.regression.blindspot import (
    Blindspot,
    attention_difference,
    attention_gap,
    attention_map,
    imitation,
)
from expunge.train.mixed import mixed

REQUEST = xp.forget(where="y > 4")
LAYERS = ["0", "3"]


def build():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 1),
    )  # fmt: skip


def problem(samples=60, make=build, **more):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(samples) % 7 + 0.5
    x = torch.randn(samples, 1, 6, 6, generator=generator) + y[:, None, None, None] / 3
    torch.manual_seed(0)
    return xp.Regression(make(), (x, y), build=make, **more)


def parts(p, method=None):
    """A view and the loss of imitating another fresh network."""
    method = method or Blindspot()
    view = View(p, REQUEST, method.needs, Runtime())
    torch.manual_seed(5)
    blind = build().eval().requires_grad_(False)
    return view, blind, imitation(view, blind, LAYERS, 50.0)


def test_deep_regression_invariant_1_attention_difference():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(5, 3, 4, 4, generator=generator) for _ in range(2))
    assert torch.equal(attention_difference(a, a), torch.zeros(5))
    torch.testing.assert_close(attention_difference(7.5 * a, b), attention_difference(a, 0.2 * b))
    shuffled = a[:, torch.tensor([2, 0, 1])]
    torch.testing.assert_close(attention_difference(shuffled, b), attention_difference(a, b))
    # unit maps on disjoint places are the furthest apart: 2 / length
    far = torch.zeros(2, 1, 1, 2, 2)
    far[0, ..., 0, 0] = far[1, ..., 1, 1] = 1
    torch.testing.assert_close(attention_difference(far[0], far[1]), torch.tensor([2 / 4]))
    assert bool((attention_difference(a, b) <= 2 / 16).all())


def test_maps_of_sequences_average_over_steps():
    a = torch.randn(2, 5, 8)
    found = attention_map(a)
    assert found.shape == (2, 8)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_deep_regression_invariant_2_only_one_side():
    p = problem()
    view, blind, loss = parts(p)
    model = p.model.eval()
    retain = view.retain.fetch(view.retain.ids[:20])
    assert torch.equal(loss(model, (retain,)), p.each_loss(model, retain).mean())
    forget = view.forget.fetch(view.forget.ids)
    assert forget.y is None  # withheld: no target can have any influence
    with torch.no_grad():
        mine, maps = p.tapped(model, forget, LAYERS)
        theirs, wanted = p.tapped(blind, forget, LAYERS)
    gap = sum(attention_difference(maps[n], wanted[n]) for n in LAYERS)
    wanted_loss = ((mine - theirs).abs() + 50 * gap).mean()
    torch.testing.assert_close(loss(model, (forget,)), wanted_loss)


def test_the_sides_are_weighted_by_their_share_of_the_batch():
    p = problem()
    view, _, loss = parts(p)
    model = p.model.eval()
    retain, forget = (
        view.retain.fetch(view.retain.ids[:30]),
        view.forget.fetch(view.forget.ids[:10]),
    )
    both = loss(model, (forget, retain))
    torch.testing.assert_close(both, 0.25 * loss(model, (forget,)) + 0.75 * loss(model, (retain,)))


def test_deep_regression_invariant_3_blindspot_model_is_frozen(monkeypatch):
    """Its weights and running statistics are the same after its training and after unlearning."""
    p, kept = problem(), []
    original = Blindspot.blindspot_model

    def spy(self, view, runtime):
        blind = original(self, view, runtime)
        kept.append((blind, hash_model(blind)))
        return blind

    monkeypatch.setattr(Blindspot, "blindspot_model", spy)
    xp.unlearn(p, REQUEST, Blindspot(epochs=2, batch_size=16), runtime=Runtime())
    ((blind, before),) = kept
    assert hash_model(blind) == before
    assert not blind.training and all(w.grad is None for w in blind.parameters())


def test_deep_regression_invariant_4_its_own_copy_moves_nothing(monkeypatch):
    """Imitating the original on the forget data alone: the loss is 0 and SGD stands still."""
    p = problem()
    monkeypatch.setattr(
        Blindspot, "blindspot_model", lambda self, view, runtime: view.model().eval()
    )
    monkeypatch.setattr(
        "expunge.methods.regression.blindspot.mixed",
        lambda view, size, order: ((part, None) for part in view.forget.batches(size, order)),
    )
    method = Blindspot(step="sgd", lr=0.5, epochs=2, norm="frozen", batch_size=16)
    view = View(p, REQUEST, method.needs, Runtime())
    outcome = method.run(view, Runtime())
    assert outcome.curve and all(point["loss"] == 0 for point in outcome.curve)
    assert hash_model(outcome.runnable()) == hash_model(p.model)
    monkeypatch.undo()  # and the same loop moves them where it has something else to imitate
    assert hash_model(method.run(view, Runtime()).runnable()) != hash_model(p.model)


def test_a_single_forget_sample_shares_the_statistics_of_its_batch():
    """One forget and 15 retain rows: batch norm in training mode, as in a plain loop."""
    p = problem(samples=48)
    request = xp.forget(ids=[4, 20, 30])
    method = Blindspot(step="sgd", lr=0.01, epochs=2, batch_size=16, beta=2.0)
    runtime = Runtime()
    outcome = xp.unlearn(p, request, method, runtime=runtime)
    view = View(p, request, method.needs, runtime)
    blind, layers = method.blindspot_model(view, runtime), method._layers(view)
    loss = imitation(view, blind, layers, method.beta)
    model = view.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=method.momentum)
    single, before = 0, int(model[1].num_batches_tracked)
    for epoch in range(2):
        for parts in mixed(view, 16, runtime.generator("mixed", epoch)):
            optimizer.zero_grad()
            given = tuple(part for part in parts if part is not None)
            single += min(map(len, given)) == 1
            loss(model, given).backward()
            optimizer.step()
    assert single
    assert int(outcome.model[1].num_batches_tracked) == before + 6
    for name, value in model.state_dict().items():
        torch.testing.assert_close(outcome.model.state_dict()[name], value)


def test_deep_regression_invariant_4_a_better_blindspot_brings_it_closer():
    """With a blindspot model trained as long as a retrained one, W1 falls."""

    def mlp():
        return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

    x = torch.linspace(-2, 2, 200)[:, None]
    y = torch.where(x[:, 0] > 1, -5.0, x[:, 0])
    train = xp.Data((x, y))
    recipe = xp.RegressorRecipe(
        mlp, train, epochs=40, lr=0.01, batch_size=50, step="adam", loss="mse"
    )
    p = xp.Regression(recipe(train.ids, 0), train, recipe=recipe, loss="mse")
    request = xp.forget(where="y <= -5")
    forget = train.fetch(request.resolve(train))
    retrained = p.predict(recipe(train.without(forget.ids), 1), forget).detach()
    before = (p.predict(p.model, forget).detach() - retrained).abs().mean()

    def w1(blind_epochs):
        method = Blindspot(epochs=30, lr=0.01, batch_size=50, blind_epochs=blind_epochs)
        model = xp.unlearn(p, request, method, runtime=Runtime()).model
        mine = p.predict(model, forget).detach()
        return float((mine.sort().values - retrained.sort().values).abs().mean())

    assert w1(40) < 0.1 * float(before)
    assert w1(40) < w1(1)


def test_deep_regression_invariant_7_order_within_a_batch():
    p = problem()
    view, _, loss = parts(p)
    model = p.model.train()
    ids = (view.forget.ids[:9], view.retain.ids[:21])
    straight = loss(model, (view.forget.fetch(ids[0]), view.retain.fetch(ids[1])))
    turned = loss(model, (view.retain.fetch(ids[1].flip(0)), view.forget.fetch(ids[0].flip(0))))
    torch.testing.assert_close(straight, turned)


def test_vectors_have_no_attention_map():
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    assert attention_gap({"linear": a}, {"linear": b}) == 0.0
    maps = {"conv": torch.randn(4, 2, 3, 3), "linear": a}
    others = {"conv": torch.randn(4, 2, 3, 3), "linear": b}
    torch.testing.assert_close(
        attention_gap(maps, others), attention_difference(maps["conv"], others["conv"])
    )


def test_one_pass_moves_batch_statistics_once():
    """Both sides go through one forward pass: batch norm sees the mixed batch, and once."""
    p = problem()
    view, _, loss = parts(p)
    model = p.model.train()
    before = int(model[1].num_batches_tracked)
    loss(model, (view.forget.fetch(view.forget.ids[:5]), view.retain.fetch(view.retain.ids[:7])))
    assert int(model[1].num_batches_tracked) == before + 1


@pytest.mark.parametrize("roles", [{}, {"blocks": ["2"]}])
def test_layers_named_by_a_role_go_first(roles):
    p = problem(roles=roles)
    view, _, _ = parts(p)
    assert Blindspot()._layers(view) == (["2"] if roles else ["0", "3", "7"])
    assert Blindspot(layers=("0",))._layers(view) == ["0"]


def test_in_half_precision():
    p = problem(make=lambda: build().to(torch.bfloat16))
    x = p.train.fetch(p.train.ids).x.to(torch.bfloat16)
    half = xp.Regression(p.model, (x, p.train.labels), build=lambda: build().to(torch.bfloat16))
    model = xp.unlearn(half, REQUEST, Blindspot(batch_size=16), runtime=Runtime()).model
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


def test_a_classifier_is_refused():
    p = xp.Classification(nn.Linear(2, 3), (torch.randn(12, 2), torch.arange(12) % 3), build=lambda: nn.Linear(2, 3))  # fmt: skip
    with pytest.raises(xp.UserError, match="'loss_between'"):
        xp.unlearn(p, xp.forget(label=1), Blindspot())

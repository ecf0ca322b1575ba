"""The invariants of the card unem."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from expunge.analysis.transductive import (
    Knobs,
    assign,
    draw_tasks,
    gaussian_density,
    learn,
    solve_alpha,
)
from expunge.core.errors import DataError


def clouds(sizes=(60, 60, 60, 60), spread=1.0, d=5, seed=0):
    """Samples of classes around centres drawn once."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.2 * torch.randn(len(sizes), d, generator=generator)
    return [
        c + spread * torch.randn(n, d, generator=generator)
        for c, n in zip(centres, sizes, strict=True)
    ]


def tasks(number=3, seed=0, **more):
    settings = {"shots": 3, "queries": 40, "present": 4} | more
    return draw_tasks(clouds(), number, torch.Generator().manual_seed(seed), **settings)


def shares(u):
    return u.exp().mean(1)


def test_unem_invariant_1_is_the_em_of_a_mixture():
    given = tasks()
    given = replace(given, support=given.support.double(), query=given.query.double())

    def likelihood(centres, pi):
        """Of the queries and the labelled supports, up to a constant."""
        asked = (gaussian_density(given.query, centres) + pi.log()[:, None]).logsumexp(-1).sum(1)
        known = gaussian_density(given.support, centres).gather(2, given.labels[..., None])
        return asked + known[..., 0].sum(1)

    y = torch.nn.functional.one_hot(given.labels, 4).double().mT
    found = []
    for layers in range(1, 12):
        u = assign(given, Knobs.of(1.0, 1.0, layers), "gaussian").exp()
        centres = (y @ given.support + u.mT @ given.query) / (y.sum(-1) + u.sum(1))[..., None]
        found.append(likelihood(centres, u.mean(1)))
    rises = torch.stack(found).diff(dim=0)
    assert bool((rises > -1e-4).all()), rises
    assert bool((rises[0] > 1e-3).all()), "the first turn changed nothing"


def test_unem_invariant_2_temperature_and_class_shares():
    given = tasks()
    flat = assign(given, Knobs.of(0.0, 1e6, 3)).exp()
    torch.testing.assert_close(flat, torch.full_like(flat, 0.25), atol=1e-4, rtol=0)
    pools = clouds(sizes=(80, 50, 40, 15), spread=1.6, d=2, seed=3)
    few = draw_tasks(pools, 8, torch.Generator().manual_seed(1), shots=3, queries=120, present=4)
    smallest = [
        float(shares(assign(few, Knobs.of(lam, 1.0, 20))).min(1).values.mean())
        for lam in (0.0, 1.0, 3.0, 10.0)
    ]
    assert smallest == sorted(smallest, reverse=True)
    assert smallest[0] > 0.05
    assert smallest[-1] < 0.01
    alone = shares(assign(few, Knobs.of(60.0, 1.0, 20))).max(1).values
    assert float(alone.mean()) > 0.95


def test_unem_invariant_2_no_preference_is_soft_k_means():
    given = tasks(1)
    y = torch.nn.functional.one_hot(given.labels, 4).float().mT
    centres = (y @ given.support) / y.sum(-1)[..., None]
    for _ in range(5):
        u = (-torch.cdist(given.query, centres).square() / 2).softmax(-1)
        centres = (y @ given.support + u.mT @ given.query) / (y.sum(-1) + u.sum(1))[..., None]
    torch.testing.assert_close(assign(given, Knobs.of(0.0, 1.0, 5)).exp(), u, atol=1e-4, rtol=1e-3)


def test_unem_invariant_3_a_constant_beside_the_shares_changes_nothing(monkeypatch):
    given, knobs, log = tasks(), Knobs.start(4), torch.Tensor.log
    before = assign(given, knobs)
    monkeypatch.setattr(torch.Tensor, "log", lambda x: log(x) + 1)
    torch.testing.assert_close(assign(given, knobs), before, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(torch.Tensor, "log", lambda x: 2 * log(x))
    assert not torch.allclose(assign(given, knobs), before, atol=1e-3)


def dirichlet(alpha, number, seed=0):
    torch.manual_seed(seed)
    return torch.distributions.Dirichlet(alpha).sample((number,))


def residual(alpha, mean):
    return (alpha.digamma() - alpha.sum(-1, keepdim=True).digamma() - mean).abs().max()


def test_unem_invariant_4_the_dirichlet_is_found():
    alpha = torch.tensor([0.4, 2.0, 7.0, 1.0], dtype=torch.float64)
    mean = dirichlet(alpha, 20_000).log().mean(0)
    found = solve_alpha(mean)
    torch.testing.assert_close(found, alpha, rtol=0.03, atol=0)
    assert residual(solve_alpha(mean, steps=200), mean) < 1e-4
    assert residual(solve_alpha(mean, steps=1000), mean) < 1e-6

    def objective(a):
        return a.sum().lgamma() - a.lgamma().sum() + ((a - 1) * mean).sum()

    path = [objective(solve_alpha(mean, steps=n)) for n in range(1, 40)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(path))


def test_alpha_has_the_gradient_of_the_solution():
    mean = torch.tensor([-1.2, -2.5, -1.8], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    (given,) = torch.autograd.grad((solve_alpha(mean, steps=20_000) * weights).sum(), mean)
    for n in range(3):
        h = torch.zeros(3, dtype=torch.float64)
        h[n] = 1e-4
        up, down = (
            (solve_alpha(mean.detach() + sign * h, steps=20_000) * weights).sum()
            for sign in (1, -1)
        )
        assert float(given[n]) == pytest.approx(float(up - down) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("family", ["gaussian", "dirichlet"])
def test_unem_invariant_5_names_of_classes_do_not_matter(family):
    given = tasks()
    if family == "dirichlet":
        given = replace(given, support=given.support.softmax(-1), query=given.query.softmax(-1))
    order = torch.tensor([2, 0, 3, 1])
    renamed = replace(given, labels=order[given.labels])
    knobs = Knobs.of(1.0, 1.2, 3)
    one, other = assign(given, knobs, family), assign(renamed, knobs, family)
    torch.testing.assert_close(one, other[:, :, order], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gaussian", "dirichlet"])
def test_unem_invariant_6_every_layer_has_gradients(family):
    given = tasks(2)
    given = replace(given, support=given.support.double(), query=given.query.double())
    if family == "dirichlet":
        given = replace(given, support=given.support.softmax(-1), query=given.query.softmax(-1))
    knobs = Knobs(*(t.double().requires_grad_() for t in Knobs.start(3).tensors()))

    def loss():
        return cross_entropy(assign(given, knobs, family).flatten(0, 1), given.truth.flatten())

    found = torch.autograd.grad(loss(), [knobs.gamma, knobs.warmth])
    for tensor, gradient in zip((knobs.gamma, knobs.warmth), found, strict=True):
        for n in range(3):
            with torch.no_grad():
                tensor[n] += 1e-4
                up = float(loss())
                tensor[n] -= 2e-4
                down = float(loss())
                tensor[n] += 1e-4
            wanted = (up - down) / 2e-4
            assert float(gradient[n]) == pytest.approx(wanted, rel=2e-2, abs=1e-6)
            if not (n == 0 and tensor is knobs.gamma and family == "gaussian"):
                assert gradient[n] != 0  # the first layer of a Gaussian has no shares yet


def test_unem_invariant_7_without_layers_the_nearest_prototype_wins():
    given = tasks()
    means = torch.stack([given.support[:, given.labels[0] == k].mean(1) for k in range(4)], 1)
    wanted = torch.cdist(given.query, means).argmin(-1)
    assert torch.equal(assign(given, Knobs.of(1.0, 1.0, 0)).argmax(-1), wanted)


def test_learning_makes_answers_better():
    pools = clouds(sizes=(120, 120, 120, 120), spread=2.0)
    generator = torch.Generator().manual_seed(2)

    def draw(n):
        return draw_tasks(pools, n, generator, shots=1, queries=60, present=2)

    def right(knobs, given):
        return float((assign(given, knobs).argmax(-1) == given.truth).float().mean())

    knobs = learn(draw, layers=5, steps=40, tasks=40)
    fresh = draw(60)
    assert right(knobs, fresh) > right(Knobs.of(1.0, 1.0, 0), fresh) + 0.03
    assert not any(t.requires_grad for t in knobs.tensors())


def test_tasks_hold_what_they_must():
    given = draw_tasks(
        clouds(), 5, torch.Generator().manual_seed(0), shots=2, queries=30, present=2, always=(3,)
    )  # fmt: skip
    assert given.support.shape == (5, 8, 5)
    assert given.query.shape == (5, 30, 5)
    for labels, truth in zip(given.labels, given.truth, strict=True):
        assert labels.bincount().tolist() == [2, 2, 2, 2]
        assert 3 in truth
        assert len(truth.unique()) <= 2
    for task in range(5):
        same = torch.cdist(given.query[task], given.support[task]) == 0
        assert not bool(same.any()), "a support is asked about"


def test_a_class_with_too_few_samples_is_said():
    with pytest.raises(DataError, match="smallest class has 2"):
        draw_tasks(
            clouds(sizes=(9, 2)), 1, torch.Generator(), shots=2, queries=5, present=2
        )  # fmt: skip

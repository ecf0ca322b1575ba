"""Invariants of the card iau."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.curvature.fisher import mean_gradient
from expunge.methods.general.iau import IAU, combined, move
from expunge.problems.classification import Classification
from expunge.train.recipe import ClassifierRecipe
from expunge.train.restriction import gradient_norm, restricted

THREES = Request(label=(3,))


def run(problem, method, request=THREES):
    return unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1))


def sides(problem, request=THREES, batch_size=128):
    """Mean gradients of forget and retain data at the original weights."""
    runtime = Runtime(threads=1)
    view = View(problem, request, IAU().needs, runtime)
    return [
        mean_gradient(problem.model, problem.each_loss, s, runtime, batch_size=batch_size).values
        for s in (view.forget, view.retain)
    ]


def mean_loss(problem, model, ids) -> torch.Tensor:
    return problem.each_loss(model.eval(), problem.train.fetch(ids)).mean()


def difference(a, b):
    return {n: p.detach() - dict(b.named_parameters())[n].detach() for n, p in a.named_parameters()}


# ------------------------------------------------------------------ invariant 1


def test_iau_invariant_1_adam1_is_a_sign_step(digits):
    lr = 1e-3
    outcome = run(digits, IAU(lr=lr))
    g = combined(*sides(digits))
    moved = difference(outcome.model, digits.model)
    size = torch.cat([m.abs().flatten() for m in moved.values()])
    clear = torch.cat([g[n].abs().flatten() for n in moved]) > 1e-6
    assert float(size.max()) <= lr * (1 + 1e-4)  # the rest is rounding of the weights themselves
    assert float(((size[clear] - lr).abs() <= 0.01 * lr).float().mean()) >= 0.99
    down = torch.cat([(m * g[n]).flatten() for n, m in moved.items()])[clear]
    assert bool((down <= 0).all())


def test_iau_invariant_1_adam1_is_one_step_of_torch_adam(digits):
    g = combined(*sides(digits))
    by_hand, by_torch = copy.deepcopy(digits.model), copy.deepcopy(digits.model)
    move(by_hand, g, 1e-3, "adam1")
    for n, p in by_torch.named_parameters():
        p.grad = g[n].clone()
    torch.optim.Adam(by_torch.parameters(), lr=1e-3).step()
    for a, b in zip(by_hand.parameters(), by_torch.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_iau_invariant_1_scale_of_the_loss_does_not_matter_to_adam1(digits):
    scaled = copy.copy(digits)
    scaled.each_loss = lambda model, batch: 7.0 * digits.each_loss(model, batch)
    plain, other = (run(p, IAU()).model for p in (digits, scaled))
    g = combined(*sides(digits))
    for (n, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        clear = g[n].abs() > 1e-5  # ε is a thousandth of these
        torch.testing.assert_close(a[clear], b[clear], rtol=0, atol=2e-6)
    a, b = (run(p, IAU(step="sgd")).model for p in (digits, scaled))
    assert any(not torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------ invariant 2


def test_iau_invariant_2_one_empty_side_is_one_ordinary_step(digits):
    forget, retain = sides(digits)
    view = View(digits, THREES, IAU().needs, Runtime())
    for (f, r), source, sign in (
        (({}, retain), view.retain, -1),
        ((forget, {}), view.forget, 1),
    ):
        model = copy.deepcopy(digits.model)
        move(model, combined(f, r), 0.1, "sgd")
        wanted = copy.deepcopy(digits.model)
        mean_loss(digits, wanted, source.ids).backward()
        for p, q in zip(model.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(p, q + sign * 0.1 * q.grad, rtol=1e-4, atol=1e-6)


def test_iau_invariant_2_swapping_the_sides_negates_the_step(digits):
    forget, retain = sides(digits)
    for step in ("sgd", "adam1"):
        there, back = copy.deepcopy(digits.model), copy.deepcopy(digits.model)
        move(there, combined(forget, retain), 0.01, step)
        move(back, combined(retain, forget), 0.01, step)
        for n, delta in difference(there, digits.model).items():
            torch.testing.assert_close(
                delta, -difference(back, digits.model)[n], rtol=1e-3, atol=1e-6
            )


def test_iau_without_retain_gradient_is_plain_ascent(digits):
    forget, _ = sides(digits)
    wanted = copy.deepcopy(digits.model)
    move(wanted, combined(forget, {}), 0.2, "sgd")
    got = run(digits, IAU(step="sgd", lr=0.2, eta_r=0.0)).model
    for p, q in zip(got.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------ invariant 3


def test_iau_invariant_3_means_do_not_depend_on_batches(digits):
    """Unequal batches, and both gradients at the original weights: as one batch for each side."""
    forget, retain = THREES.resolve(digits.train), None
    retain = digits.train.without(forget)
    whole = copy.deepcopy(digits.model)
    (mean_loss(digits, whole, retain) - mean_loss(digits, whole, forget)).backward()
    got = run(digits, IAU(step="sgd", lr=0.5, batch_size=37)).model
    for p, q in zip(got.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.5 * q.grad, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ invariant 4


def test_iau_invariant_4_the_forget_loss_rises_at_the_predicted_rate(digits):
    forget, retain = sides(digits)
    rate = sum(float((forget[n] * (forget[n] - retain[n])).sum()) for n in forget)
    ids = THREES.resolve(digits.train)
    kept = digits.train.without(ids)
    start = [float(mean_loss(digits, digits.model, i).detach()) for i in (ids, kept)]
    seen = []
    for lr in (1e-2, 5e-3):
        model = run(digits, IAU(step="sgd", lr=lr)).model
        after = [float(mean_loss(digits, model, i).detach()) for i in (ids, kept)]
        seen.append([(a - b) / lr for a, b in zip(after, start, strict=True)])
    assert seen[1][0] > 0
    assert seen[1][0] == pytest.approx(rate, rel=0.1)
    slope = sum(float((retain[n] * (forget[n] - retain[n])).sum()) for n in retain)
    assert seen[1][1] == pytest.approx(slope, abs=0.1 * abs(slope) + 1e-3)


# ------------------------------------------------------------------ invariant 5


def small_recipe(digits, epochs=3, **more):
    return ClassifierRecipe(
        lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)),
        digits.train, epochs=epochs, lr=0.1, batch_size=64, **more,
    )  # fmt: skip


def test_iau_invariant_5_restriction_0_is_plain_training(digits):
    plain, zero = small_recipe(digits), small_recipe(digits, restriction=0.0)
    ids = digits.train.ids[:300]
    for a, b in zip(plain(ids, 0).parameters(), zero(ids, 0).parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.settings() == zero.settings()
    assert "restriction" in small_recipe(digits, restriction=0.1).settings()


@pytest.mark.parametrize("norm", ["per_tensor", "global"])
def test_iau_invariant_5_restriction_lowers_the_gradient(digits, norm):
    squares = []
    for alpha in (0.0, 0.2):
        recipe = small_recipe(digits, 15, restriction=alpha, restriction_norm=norm)
        model = recipe(digits.train.ids, 0)
        total = 0.0
        for ids in digits.train.ids.split(64):
            loss = mean_loss(digits, model, ids)
            total += sum(float(g.square().sum()) for g in torch.autograd.grad(loss, [*model.parameters()]))  # fmt: skip
        squares.append(total)
    assert squares[1] < 0.9 * squares[0]


@pytest.mark.parametrize("norm", ["per_tensor", "global"])
def test_iau_invariant_5_the_penalty_has_the_gradient_of_finite_differences(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1, bias=False)).double()
    assert sum(p.numel() for p in model.parameters()) == 10
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def loss(m, batch):
        return (m(batch).squeeze(1) - y).square().mean()

    whole = restricted(loss, 0.3, norm)
    whole(model, x).backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    wanted, h = [], 1e-6
    for p in model.parameters():
        for i in range(p.numel()):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * h
                ends.append(float(whole(model, x).detach()))
                with torch.no_grad():
                    p.view(-1)[i] -= sign * h
            wanted.append((ends[0] - ends[1]) / (2 * h))
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_iau_restriction_is_finite_where_the_gradient_is_zero():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    value = model(torch.ones(1, 2)).square().sum()  # at its minimum
    gradient_norm(value, model, "per_tensor").backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


# ------------------------------------------------------------------ invariants 6 and 7


def logistic(seed=0, l2=0.05, n=60, forgotten=10):
    """L2-regularised logistic regression, its optimum on all data, and a request."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64) > 0).long()

    def each(model, batch):
        size = sum(p.square().sum() for p in model.parameters())
        loss = nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")
        return loss + 0.5 * l2 * size

    model = nn.Linear(4, 2).double()
    data = xp.Data((x, y))
    optimise(model, lambda: each(model, data.fetch(data.ids)).mean())
    problem = xp.Problem.of(model, data, each_loss=each)
    return problem, xp.forget(ids=list(range(forgotten)))


def optimise(model, loss):
    optimizer = torch.optim.LBFGS(
        model.parameters(), lr=1, max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_iau_invariant_6_points_where_exact_influence_points(seed):
    problem, request = logistic(seed)
    step = difference(run(problem, IAU(step="sgd", lr=0.01), request).model, problem.model)
    batch = problem.train.fetch(problem.train.without(request.resolve(problem.train)))
    names = list(step)

    def retain_loss(*values):
        given = dict(zip(names, values, strict=True))
        size = sum(v.square().sum() for v in values)
        logits = torch.func.functional_call(problem.model, given, (batch.x,))
        return nn.functional.cross_entropy(logits, batch.y) + 0.025 * size

    values = tuple(p.detach() for p in problem.model.parameters())
    blocks = torch.autograd.functional.hessian(retain_loss, values)
    hessian = torch.cat([
        torch.cat([b.reshape(v.numel(), -1) for b in row], 1)
        for row, v in zip(blocks, values, strict=True)
    ])
    forget, retain = sides(problem, request)
    v = torch.cat([(forget[n] - retain[n]).flatten() for n in names])
    exact = torch.linalg.solve(hessian, v)
    assert float(exact @ torch.cat([step[n].flatten() for n in names])) > 0


def test_iau_invariant_7_one_pass_and_no_more(digits):
    calls = []
    counting = copy.copy(digits)
    counting.each_loss = lambda model, batch: (
        calls.append(len(batch)),
        digits.each_loss(model, batch),
    )[1]
    method, runtime = IAU(batch_size=100), Runtime(threads=1)
    view = View(counting, THREES, method.needs, runtime)
    method.run(view, runtime)
    assert len(calls) == -(-len(view.forget) // 100) + -(-len(view.retain) // 100)
    assert sum(calls) == runtime.cost.samples == runtime.cost.gradients == len(digits.train)


# ------------------------------------------------------------------ pitfalls


def test_iau_leaves_running_statistics_alone():
    """In training mode a pass over the forget data would leak into them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    problem = Classification(model, (torch.randn(40, 6), torch.arange(40) % 3))
    outcome = run(problem, IAU(), xp.forget(label=1))
    for name, value in outcome.model.named_buffers():
        assert torch.equal(value, dict(problem.model.named_buffers())[name]), name


def test_iau_says_how_far_it_went(digits):
    near, far = (run(digits, IAU(lr=lr)).details["drift"] for lr in (1e-4, 1e-2))
    assert far == pytest.approx(100 * near, rel=0.05)

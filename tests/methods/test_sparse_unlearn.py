"""Invariants of the card sparse-unlearn: masks, the ℓ1 schedule, influence and Fisher forgetting."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import SettingError
from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.curvature import woodfisher
from expunge.curvature.dense import fisher_solve, flat, gradient_matrix
from expunge.methods.general.finetune import FineTune
from expunge.methods.general.fisher_forgetting import FisherForgetting, noise_variance
from expunge.methods.general.gradient_ascent import GradientAscent
from expunge.methods.general.influence import Influence, direction
from expunge.methods.general.l1_sparse import L1Sparse
from expunge.problems.classification import Classification

THREES = Request(label=(3,))


def run(problem, method, request=THREES, seed=0):
    return unlearn(problem, request, method, runtime=Runtime(seed=seed, threads=1))


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def pruned(digits):
    return xp.prune(digits, "omp:0.8", runtime=Runtime(threads=1))


# ------------------------------------------------------------------ invariant 1

HARSH = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "method",
    [
        FineTune(epochs=2, **HARSH),
        GradientAscent(epochs=2, **HARSH),
        L1Sparse(epochs=2, gamma=1e-3, **HARSH),
        FineTune(epochs=2, lr=0.01, step="adamw", weight_decay=0.1),
        xp.methods.SalUn(epochs=2, **HARSH),
        xp.methods.SSD(),
        xp.methods.IAU(),
        Influence(),
        FisherForgetting(samples=50),
        xp.methods.Retrain(),
    ],
    ids=lambda m: f"{m.name}-{getattr(m, 'step', '')}",
)
def test_sparse_unlearn_invariant_1_pruned_weights_stay_zero(pruned, method):
    outcome = run(pruned, method)
    released = outcome.released()
    for model in (outcome.model, released):
        for name, kept in pruned.kept.items():
            values = model.get_parameter(name)[~kept]
            assert torch.equal(values, torch.zeros_like(values)), name
    moved = [n for n, p in released.named_parameters() if not torch.equal(p, pruned.model.get_parameter(n))]  # fmt: skip
    assert moved


# ------------------------------------------------------------------ invariant 3


def test_sparse_unlearn_invariant_3_schedules():
    def weights(**more):
        method = L1Sparse(epochs=10, gamma=0.4, **more)
        return [method.weight(e) for e in range(10)]

    down = weights()
    assert down[0] == 0.4 and down[5] == pytest.approx(0.2)
    assert down == sorted(down, reverse=True) and min(down) > 0
    assert weights(penalty="constant") == [0.4] * 10
    up = weights(penalty="increasing")
    assert up[0] == 0 and up == pytest.approx([0.04 * e for e in range(10)])
    late = weights(plain_epochs=4)
    assert late[3] == pytest.approx(0.2) and late[6:] == [0.0] * 4
    assert all(w >= 0 for w in down + up + late)
    with pytest.raises(SettingError, match="plain_epochs"):
        L1Sparse(epochs=3, plain_epochs=3)


def test_sparse_unlearn_invariant_3_gamma_0_is_finetune(digits):
    shared = {"epochs": 2, "lr": 0.05, "weight_decay": 1e-3}
    assert same(
        run(digits, L1Sparse(gamma=0.0, **shared)).model, run(digits, FineTune(**shared)).model
    )


def test_sparse_unlearn_invariant_3_the_penalty_is_on_every_parameter(digits):
    """One step apart from fine-tuning: each weight moves by η γ towards zero, biases too."""
    shared = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 10_000}
    sparse = run(digits, L1Sparse(gamma=1e-2, **shared)).model
    plain = run(digits, FineTune(**shared)).model
    for (name, p), q in zip(sparse.named_parameters(), plain.parameters(), strict=True):
        wanted = -0.1 * 1e-2 * digits.model.get_parameter(name).sign()
        torch.testing.assert_close(p - q, wanted, rtol=0, atol=1e-6)


def test_sparse_unlearn_weights_shrink_with_gamma(digits):
    shares = []
    for gamma in (0.0, 1e-3, 1e-2):
        model = run(digits, L1Sparse(epochs=3, lr=0.1, gamma=gamma)).model
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        shares.append(float((flat.abs() < 1e-3).float().mean()))
    assert shares[0] < shares[1] < shares[2]


# ------------------------------------------------------------------ invariant 4


def linear_problem(samples=20, l2=0.0):
    """Twelve parameters in float64."""
    torch.manual_seed(0)
    x, y = torch.randn(samples, 3, dtype=torch.float64), torch.arange(samples) % 3

    def each(model, batch):
        loss = nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")
        return loss + 0.5 * l2 * sum(p.square().sum() for p in model.parameters())

    return xp.Problem.of(nn.Linear(3, 3).double(), (x, y), each_loss=each)


def test_sparse_unlearn_invariant_4_no_direction_where_the_means_agree():
    problem = linear_problem()
    batch = problem.train.fetch(problem.train.ids)
    twice = xp.Problem.of(
        problem.model, (torch.cat([batch.x] * 3), torch.cat([batch.y] * 3)),
        each_loss=problem.each_loss,
    )  # fmt: skip
    for data, zero in ((twice, True), (problem, False)):
        request = xp.forget(ids=list(range(20 if zero else 5)))
        runtime = Runtime()
        view = View(data, request, Influence().needs, runtime)
        v = direction(view.model(), view, runtime, batch_size=7)
        assert (float(v.abs().max()) < 1e-15) == zero


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_sparse_unlearn_invariant_4_exact_mode_is_the_dense_solve(damping):
    problem, request = linear_problem(), xp.forget(ids=[1, 5, 7])
    outcome = run(problem, Influence(alpha=0.5, damping=damping, batch_size=6), request)
    split = problem.split(request)
    forget, retain = (
        gradient_matrix(
            problem.model, problem.each_loss, [problem.train.fetch(split[f"{s}-train"])]
        )
        for s in ("forget", "retain")
    )
    v = forget.sum(0) / 20 - 3 / (20 * 17) * retain.sum(0)
    wanted = 0.5 * fisher_solve(retain, v, damping)
    got = flat(problem.model, dict(outcome.model.named_parameters())) - flat(
        problem.model, dict(problem.model.named_parameters())
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_sparse_unlearn_invariant_4_alpha_0_is_the_identity(digits):
    method, runtime = Influence(alpha=0.0), Runtime(threads=1)
    outcome = method.run(View(digits, THREES, method.needs, runtime), runtime)
    assert same(outcome.model, digits.model)
    with pytest.raises(xp.ExpungeError, match="original weights"):
        run(digits, method)


def minimise(model, loss):
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(5):
        optimizer.step(closure)
    return model


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_sparse_unlearn_invariant_4_the_true_hessian_leads_to_the_retrained_optimum(kind):
    torch.manual_seed(1)
    x = torch.randn(300, 4, dtype=torch.float64)
    noise = 0.3 * torch.randn(300, dtype=torch.float64)
    target = x[:, 0] - x[:, 1] + noise
    y = target if kind == "ridge" else (target > 0).double()

    def each_of(value, labels, weights):
        fit = (
            (value - labels).square()
            if kind == "ridge"
            else nn.functional.binary_cross_entropy_with_logits(value, labels, reduction="none")
        )
        return fit + 0.05 * weights.square().sum()

    def each(model, batch):
        return each_of(model(batch.x).squeeze(1), batch.y, model.weight)

    data = xp.Data((x, y))
    model = nn.Linear(4, 1, bias=False).double()
    whole = data.fetch(data.ids)
    minimise(model, lambda: each(model, whole).mean())
    problem = xp.Problem.of(model, data, each_loss=each)
    request = xp.forget(ids=list(range(15)))
    rest = data.fetch(data.without(request.resolve(data)))
    retrained = copy.deepcopy(model)
    minimise(retrained, lambda: each(retrained, rest).mean())
    runtime = Runtime()
    view = View(problem, request, Influence().needs, runtime)
    v = direction(view.model(), view, runtime, batch_size=64)
    hessian = torch.autograd.functional.hessian(
        lambda w: each_of(rest.x @ w, rest.y, w).mean(), model.weight.detach()[0]
    )
    step = torch.linalg.solve(hessian, v)
    wanted = (retrained.weight - model.weight).detach()[0]
    assert float((step - wanted).norm()) * 10 < float(wanted.norm())


def distances(model, problem, request, optimum, damping):
    """Distance to the retrained optimum before and after `Influence` with each damping."""
    moved = [
        run(problem, Influence(samples=1000, damping=d), request).model.eval() for d in damping
    ]
    weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (optimum, model, *moved)]  # fmt: skip
    return [float((w - weights[0]).norm()) for w in weights[1:]]


def test_influence_goes_half_of_the_way_on_logistic_regression():
    """The figures of its page; the empirical Fisher is no more than near the Hessian."""
    torch.manual_seed(0)
    x = torch.randn(300, 5, dtype=torch.float64)
    teacher = torch.randn(5, 3, dtype=torch.float64)
    y = (x @ teacher + torch.randn(300, 3, dtype=torch.float64)).argmax(1)

    def each(model, batch):
        fit = nn.functional.cross_entropy(model(batch.x), batch.y, reduction="none")
        return fit + 5e-3 * sum(p.square().sum() for p in model.parameters())

    data = xp.Data((x, y))
    model = nn.Linear(5, 3).double()
    minimise(model, lambda: each(model, data.fetch(data.ids)).mean())
    problem = xp.Problem.of(model, data, each_loss=each)
    for count, figures in ((6, [0.0967, 0.0644, 0.0378, 0.0449]), (30, [0.1766, 0.1018, 0.0764, 0.0709])):  # fmt: skip
        optimum = copy.deepcopy(model)
        minimise(optimum, lambda o=optimum, n=count: each(o, data.fetch(data.ids[n:])).mean())
        got = distances(model, problem, xp.forget(ids=list(range(count))), optimum, (1e-3, 1e-2, 0.1))  # fmt: skip
        assert got == pytest.approx(figures, rel=0.05)
        assert got[2] < got[0] / 2


def test_influence_on_a_squared_error_hangs_on_its_damping():
    torch.manual_seed(1)
    x = torch.randn(300, 4, dtype=torch.float64)
    y = x[:, 0] - x[:, 1] + 0.3 * torch.randn(300, dtype=torch.float64)

    def each(model, batch):
        return (model(batch.x).squeeze(1) - batch.y).square() + 0.05 * model.weight.square().sum()

    def solution(a, b):
        model = nn.Linear(4, 1, bias=False).double()
        normal = a.T @ a / len(a) + 0.05 * torch.eye(4, dtype=torch.float64)
        model.weight.data = torch.linalg.solve(normal, a.T @ b / len(a))[None]
        return model

    model, optimum = solution(x, y), solution(x[15:], y[15:])
    problem = xp.Problem.of(model, (x, y), each_loss=each)
    got = distances(model, problem, xp.forget(ids=list(range(15))), optimum, (1e-3, 1e-2, 0.1, 1.0))
    assert got == pytest.approx([0.00358, 0.0198, 0.0192, 0.0143, 0.0022], rel=0.05)


def test_sparse_unlearn_invariant_4_official_mode_is_no_inverse(digits):
    """It hardly turns v, and what it takes off is a multiple of the first gradient."""
    official = run(digits, Influence(alpha=20, mode="official", scale=50))
    exact = run(digits, Influence())
    assert official.details["cosine"] > 0.99 > exact.details["cosine"]
    runtime = Runtime()
    view = View(digits, THREES, Influence().needs, runtime)
    v = direction(view.model(), view, runtime, 128)
    moved = woodfisher.flat(digits.model, {
        n: p.detach() - digits.model.get_parameter(n).detach()
        for n, p in official.model.named_parameters()
    })  # fmt: skip
    first = view.retain.fetch(view.retain.ids[:1])
    (row,) = woodfisher.gradient_rows(digits.model, digits.each_loss, [first])
    rest = moved / 20 - v
    rest = rest - (rest @ row[0]) / (row[0] @ row[0]) * row[0]
    assert float(rest.norm()) < 1e-4 * float(v.norm())


def test_sparse_unlearn_influence_draws_its_samples(digits):
    one, same_seed = (run(digits, Influence(samples=20)).record["weights"] for _ in range(2))
    other = run(digits, Influence(samples=20), seed=1).record["weights"]
    assert one == same_seed != other
    method = Influence(mode="official", scale=20)
    assert run(digits, method).record["weights"] == run(digits, method, seed=1).record["weights"]
    assert run(digits, method).details["samples"] == 20


# ------------------------------------------------------------------ Fisher forgetting


def test_sparse_unlearn_fisher_is_the_mean_over_samples_and_own_labels():
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3
    problem = Classification(nn.Linear(3, 3).double(), (x, y))
    method, runtime = FisherForgetting(), Runtime()
    view = View(problem, xp.forget(ids=[0, 1]), method.needs, runtime)
    got = flat(problem.model, method.fisher(view.model(), view, runtime))
    rest = problem.train.fetch(view.retain.ids)
    probabilities = problem.logits(problem.model, rest).softmax(1).detach()
    wanted = torch.zeros(12, dtype=torch.float64)
    for label in range(3):
        labelled = rest.labelled(torch.full((10,), label))
        rows = gradient_matrix(problem.model, problem.each_loss, [labelled])
        wanted += (probabilities[:, label, None] * rows.square()).mean(0)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-12)


def test_sparse_unlearn_fisher_noise_has_the_stated_variance():
    fisher = torch.tensor([[1.0, 3.0], [0.0, 1e-4]])
    got = noise_variance(fisher, 2.0, last=False)
    torch.testing.assert_close(got, torch.tensor([[4 / 3] * 2, [2000.0] * 2]))
    last = noise_variance(fisher, 2.0, last=True)
    torch.testing.assert_close(last, 10 * torch.tensor([[4 / 3] * 2, [200.0] * 2]))
    vector = noise_variance(torch.tensor([1.0, 0.0]), 2.0, last=False)
    torch.testing.assert_close(vector, torch.tensor([20.0, 20_000.0]))


def test_sparse_unlearn_fisher_redraws_the_row_of_a_forgotten_class(digits):
    outcome = run(digits, FisherForgetting(alpha=1e-9, samples=50))
    assert outcome.details["redrawn_classes"] == [3]
    model = outcome.model.requires_grad_(False)
    last = digits.role("last layer")[0]
    row = model.get_submodule(last).weight[3].detach()
    assert 0.5e-2 < float(row.std()) < 2e-2 and abs(float(row.mean())) < 1e-2
    other = model.get_submodule(last).weight[4].detach()
    original = digits.model.get_submodule(last).weight.detach()
    assert float((other - original[4]).abs().max()) < 1e-2
    by_ids = Request(ids=tuple(THREES.resolve(digits.train).tolist()))
    for request in (by_ids, Request(where="label == 3")):  # no label is read, so no class is known
        outcome = run(digits, FisherForgetting(alpha=1e-9, samples=50), request)
        assert outcome.details["redrawn_classes"] == []
        kept = outcome.model.requires_grad_(False)
        assert float((kept.get_submodule(last).weight - original).abs().max()) < 1e-2


def test_sparse_unlearn_fisher_on_a_part_reads_that_part(digits):
    part, whole = run(digits, FisherForgetting(samples=50)), run(digits, FisherForgetting())
    assert part.cost.samples == 10 * 50
    assert whole.cost.samples == 10 * (len(digits.train) - len(THREES.resolve(digits.train)))


# ------------------------------------------------------------------ invariant 6


def test_sparse_unlearn_invariant_6_retrained_looks_like_held_out_and_the_original_does_not(digits):
    """Confidence attack fitted on retain against test samples, applied to random forgotten ones."""
    import numpy as np
    from sklearn.svm import SVC

    request = xp.forget(fraction=0.1, seed=3)
    split = digits.split(request)
    retrained = digits.recipe(split["retain-train"], 1001)

    @torch.no_grad()
    def confidence(model, data, ids):
        batch = data.fetch(ids)
        return digits.logits(model, batch).softmax(1).gather(1, batch.y[:, None]).numpy()

    def called_non_members(model):
        members = confidence(model, digits.train, split["retain-train"][: len(digits.test)])
        others = confidence(model, digits.test, digits.test.ids)
        x = np.concatenate([members, others])
        y = [1] * len(members) + [0] * len(others)
        attack = SVC(C=3, gamma="auto", kernel="rbf").fit(x, y)
        forgotten = confidence(model, digits.train, split["forget-train"])
        return [float((attack.predict(s) == 0).mean()) for s in (forgotten, others)]

    forgotten, held_out = called_non_members(retrained)
    assert abs(forgotten - held_out) < 0.12
    of_original, _ = called_non_members(digits.model)
    assert of_original < 0.08

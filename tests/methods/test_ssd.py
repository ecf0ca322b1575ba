"""SSD and its variants: the card's invariants, on a digits perceptron and a CNN with batch norm."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import expunge as xp
from expunge.core.errors import (
    AccessError,
    ExpungeError,
    NeedsError,
    SettingError,
    UnchangedError,
    UserError,
)
from expunge.core.method import unlearn
from expunge.core.problem import Problem
from expunge.core.request import forget
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.curvature import dense
from expunge.curvature.dampening import adaptive_alpha, adaptive_share, dampen
from expunge.methods.general.ssd import SSD
from expunge.problems.classification import Classification

N = 203  # not a multiple of any batch size used here


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def digits(count=N):
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels[:count] / 16.0), torch.from_numpy(labels[:count]).long()


def train(model, x, y, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def mlp():
    torch.manual_seed(0)
    x, y = digits()
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10)).double()
    return Classification(train(model, x, y), (x, y))


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(1)
    x, y = digits()
    x = x.reshape(-1, 1, 8, 8)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10)
    ).double()
    return Classification(train(model, x, y), (x, y))


@pytest.fixture(params=["mlp", "cnn"])
def problem(request):
    return request.getfixturevalue(request.param)


REQUEST = forget(label=3)


def run(problem, method, request=REQUEST, seed=0, prepared=None):
    """Run on a View without the end-to-end checks, e.g. where nothing is to change."""
    runtime = Runtime(seed=seed)
    outcome = method.run(View(problem, request, method.needs, runtime), runtime, prepared)
    return outcome.model.state_dict(), outcome.details


def matrices(problem, request=REQUEST, each=None):
    """Dense per-sample gradients of the forget set and of everything, by the oracle."""
    each = each or problem.each_loss
    ids = request.resolve(problem.train)
    both = (ids, problem.train.ids)
    return [
        dense.gradient_matrix(problem.model, each, list(problem.train.batches(64, i))) for i in both
    ]


def by_hand(problem, part, whole, alpha, lam):
    """The edit written out on flat vectors."""
    theta = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()]).clone()
    for i in (part > alpha * whole).nonzero()[:, 0].tolist():
        theta[i] *= min(lam * float(whole[i]) / float(part[i]), 1.0)
    return dense.named(problem.model, theta)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in b)


def near(a, b):
    return all(torch.allclose(a[k], b[k], rtol=1e-9, atol=1e-14) for k in b)


# --- invariant 1: the limits of alpha and lambda ------------------------------------------------


def test_ssd_invariant_1_alpha_to_infinity_changes_no_bit(problem):
    for alpha in (1e12, math.inf):
        state, details = run(problem, SSD(alpha=alpha, fisher="batch"))
        assert details["selected"] == 0
        assert same(state, problem.model.state_dict())


def test_ssd_invariant_1_any_alpha_from_the_largest_ratio_on_changes_no_bit(mlp):
    part, whole = (dense.mean_squares(m) for m in matrices(mlp))
    largest = float((part / whole)[whole > 0].max())
    for alpha, selects in ((largest * (1 - 1e-9), True), (largest * (1 + 1e-9), False)):
        model = Classification(mlp.model, mlp.train).model
        dampen(model, dense.named(model, part), dense.named(model, whole), alpha, 0.0)
        assert same(model.state_dict(), mlp.model.state_dict()) is not selects


def test_ssd_invariant_1_an_edit_that_selects_nothing_is_an_error_end_to_end(mlp):
    with pytest.raises(UnchangedError, match="no effect here"):
        unlearn(mlp, REQUEST, SSD(alpha=1e12, fisher="batch"), runtime=Runtime(seed=0))


def test_ssd_invariant_1_lambda_to_infinity_changes_no_bit(problem):
    for lam in (1e30, math.inf):
        state, details = run(problem, SSD(alpha=2.0, lam=lam))
        assert details["selected"] > 0
        assert same(state, problem.model.state_dict())


def test_ssd_invariant_1_lambda_zero_makes_selected_weights_exactly_zero(problem):
    state, details = run(problem, SSD(alpha=2.0, lam=0.0))
    before = problem.model.state_dict()
    zeroed = sum(int(((v == 0) & (before[k] != 0)).sum()) for k, v in state.items())
    kept = sum(int((v == before[k]).sum()) for k, v in state.items())
    assert 0 < zeroed == details["selected"]
    assert zeroed + kept == sum(v.numel() for v in before.values())


def test_corrective_invariant_5_selection_does_not_depend_on_lambda_and_no_weight_grows(problem):
    before, moved = problem.model.state_dict(), []
    for lam in (0.0, 0.5):
        state, details = run(problem, SSD(alpha=2.0, lam=lam))
        assert all(bool((v.abs() <= before[k].abs()).all()) for k, v in state.items())
        moved.append({k: v != before[k] for k, v in state.items()})
        assert details["selected"] == sum(int(m.sum()) for m in moved[-1].values()) > 0
    # a selected weight has a factor below λ/α, so that it moves at both
    assert all(torch.equal(moved[0][k], moved[1][k]) for k in before)


# --- invariant 2: per-sample ratios are bounded -------------------------------------------------


@pytest.mark.parametrize("importance", ["loss", "logits"])
def test_ssd_invariant_2_ratio_is_at_most_total_over_forget(problem, importance):
    request = forget(ids=range(0, 40, 2))
    everything = SSD(importance=importance).prepare(problem, Runtime())
    forgotten = Classification(problem.model, tuple_of(problem, request.resolve(problem.train)))
    part = SSD(importance=importance).prepare(forgotten, Runtime())
    ratio = torch.cat([(part[n] / everything[n]).reshape(-1) for n in part])
    largest = ratio[ratio.isfinite()].max()
    assert 1 < largest <= N / 20 * (1 + 1e-12)


def tuple_of(problem, ids):
    batch = problem.train.fetch(ids)
    return batch.x, batch.y


def test_ssd_invariant_2_the_bound_is_reached_where_the_rest_has_no_importance():
    # input 1 is on only in the forget samples, input 0 only in the others
    x = torch.tensor([[0.0, 1.0]] * 2 + [[1.0, 0.0]] * 8).double()
    problem = Classification(nn.Linear(2, 2).double(), (x, torch.tensor([0, 1] * 5)))
    part, whole = (dense.mean_squares(m) for m in matrices(problem, forget(ids=[0, 1])))
    ratio = dense.named(problem.model, part / whole)["weight"]
    assert torch.allclose(ratio[:, 1], torch.full((2,), 5.0).double(), rtol=1e-14)

    # all that is above the threshold ties with it; the edit still finds it
    state, details = run(problem, SSD(), forget(ids=[0, 1]))
    assert details["selected"] == 2
    assert torch.allclose(state["weight"][:, 1], problem.model.weight[:, 1] / 5, rtol=1e-14)
    assert torch.equal(state["weight"][:, 0], problem.model.weight[:, 0])


def test_ssd_invariant_2_alpha_at_the_bound_is_refused(mlp):
    bound = N / len(REQUEST.resolve(mlp.train))
    for alpha in (bound, 1e6):
        runtime = Runtime(seed=0)
        with pytest.raises(SettingError, match=rf"at most \|D\|/\|D_f\| = {bound:g} times"):
            unlearn(mlp, REQUEST, SSD(alpha=alpha), runtime=runtime)
        assert runtime.cost.samples == 0  # before any compute
    assert issubclass(SettingError, UserError)
    run(mlp, SSD(alpha=bound, fisher="batch"))  # there is no such bound for batches


# --- invariant 3: the two Fisher modes ----------------------------------------------------------


def test_ssd_invariant_3_sample_mode_is_the_mean_of_squares(problem):
    _, matrix = matrices(problem)
    found = dense.flat(problem.model, SSD().prepare(problem, Runtime()))
    assert (found - (matrix**2).mean(0)).abs().max() <= 1e-10
    assert (found - matrix.mean(0) ** 2).abs().max() > 1e-6


def test_ssd_invariant_3_one_sample_a_batch_is_sample_mode(problem):
    one = SSD(fisher="batch", batch_size=1).prepare(problem, Runtime())
    sample = SSD(fisher="sample").prepare(problem, Runtime())
    for name, value in sample.items():
        assert (one[name] - value).abs().max() <= 1e-12


def test_ssd_invariant_3_one_batch_is_the_square_of_the_mean(problem):
    _, matrix = matrices(problem)
    found = SSD(fisher="batch", batch_size=N).prepare(problem, Runtime())
    assert (dense.flat(problem.model, found) - matrix.mean(0) ** 2).abs().max() <= 1e-12


@pytest.mark.parametrize("importance", ["loss", "logits"])
def test_ssd_edit_equals_the_one_written_out_on_the_oracle(problem, importance):
    each = None if importance == "loss" else (lambda m, b: m(b.x).square().sum(1))
    matrix_f, matrix_d = matrices(problem, each=each)
    mean = dense.mean_squares if importance == "loss" else dense.mean_magnitudes
    part, whole = mean(matrix_f), mean(matrix_d)

    for alpha, lam in ((1.5, 1.0), (2.0, 0.3)):
        method = SSD(alpha=alpha, lam=lam, importance=importance)
        outcome = unlearn(problem, REQUEST, method, runtime=Runtime(seed=0))
        want = by_hand(problem, part, whole, alpha, lam)
        assert near(outcome.model.state_dict(), want)
        assert outcome.details["selected"] == int((part > alpha * whole).sum()) > 0


# --- invariant 4: what may happen to a weight, and to a buffer ----------------------------------


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_ssd_invariant_4_weights_shrink_keep_their_sign_and_the_rest_every_bit(problem, fisher):
    state, details = run(problem, SSD(alpha=1.5, fisher=fisher))
    changed = 0
    for name, before in problem.model.named_parameters():
        after = state[name]
        assert (after.abs() <= before.abs()).all()
        assert ((after.sign() == before.sign()) | (after == 0)).all()
        changed += int((after != before).sum())
    assert 0 < changed <= details["selected"]


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_ssd_invariant_4_running_statistics_are_untouched_and_norm_weights_take_part(cnn, fisher):
    outcome = unlearn(cnn, REQUEST, SSD(alpha=0.5, fisher=fisher), runtime=Runtime(seed=0))
    after, before = outcome.model.state_dict(), cnn.model.state_dict()
    for buffer in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(after[buffer], before[buffer])
    by_tensor = outcome.details["selected_by_tensor"]
    assert set(by_tensor) == {n for n, _ in cnn.model.named_parameters()}
    assert by_tensor["1.weight"] + by_tensor["1.bias"] > 0
    assert outcome.details["norm"] == "frozen"


def test_ssd_frozen_parameters_keep_every_bit(mlp):
    model = nn.Sequential(*mlp.model).requires_grad_(True)
    problem = Classification(model, mlp.train)
    problem.model[0].requires_grad_(False)
    outcome = unlearn(problem, REQUEST, SSD(alpha=1.1), runtime=Runtime(seed=0))
    assert set(outcome.change.tensors) <= {"2.weight", "2.bias"}
    problem.model[2].requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of this model requires a gradient"):
        unlearn(problem, REQUEST, SSD(), runtime=Runtime(seed=0))


# --- invariant 5: ASSD's share, and the scale of the loss ---------------------------------------


@pytest.mark.parametrize("fisher", ["sample", "batch"])
@pytest.mark.parametrize("request_", [REQUEST, forget(ids=[5, 17])], ids=["class", "two"])
def test_ssd_invariant_5_auto_selects_a_fixed_share(problem, request_, fisher):
    count = len(request_.resolve(problem.train))
    outcome = unlearn(problem, request_, SSD(fisher=fisher), runtime=Runtime(seed=0))
    finite = finite_ratios(problem, SSD(fisher=fisher), request_)
    percentile = 100 - math.log(1 + 100 * count / N)
    assert abs(outcome.details["selected"] - finite * (100 - percentile) / 100) <= 1.5
    assert outcome.details["wanted_share"] == pytest.approx((100 - percentile) / 100)
    assert 0 < outcome.details["alpha"] < math.inf


def finite_ratios(problem, method, request):
    """How many weights have importance at all: inputs that are always 0 have none."""
    whole = method.prepare(problem, Runtime())
    return sum(int((v > 0).sum()) for v in whole.values())


def test_ssd_invariant_5_share_in_numbers_of_the_paper():
    assert adaptive_share(400, 4000) == pytest.approx(0.0240, abs=5e-5)
    assert adaptive_share(40, 4000) == pytest.approx(0.0069, abs=5e-5)


def test_ssd_adaptive_alpha_is_an_order_statistic_of_the_finite_ratios():
    part = {"a": torch.arange(1.0, 101.0), "b": torch.tensor([0.0, 1.0])}
    whole = {"a": torch.ones(100), "b": torch.tensor([0.0, 0.0])}
    assert adaptive_alpha(part, whole, 0.05) == 95.0  # 96 … 100 exceed it; 0/0 and 1/0 do not count
    assert adaptive_alpha(part, whole, 0.0001) == 99.0  # at least one
    assert adaptive_alpha({"a": torch.tensor([1.0, 2, 7, 7, 7])}, {"a": torch.ones(5)}, 0.2) == 2.0
    with pytest.raises(ExpungeError, match="nothing is important"):
        adaptive_alpha({"a": torch.zeros(3)}, {"a": torch.zeros(3)}, 0.1)


def test_ssd_adaptive_alpha_works_beyond_the_limit_of_torch_quantile():
    ratios = torch.arange(2**24 + 1000, dtype=torch.float32).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        ratios.quantile(0.99)
    alpha = adaptive_alpha({"a": ratios}, {"a": torch.ones(1)}, 0.01)
    assert abs(int((ratios > alpha).sum()) - 0.01 * len(ratios)) <= 1


@pytest.mark.parametrize("fisher", ["sample", "batch"])
@pytest.mark.parametrize("alpha", ["auto", 2.0])
def test_ssd_invariant_5_scaling_the_loss_changes_nothing(problem, fisher, alpha):
    def scaled(model, batch):
        return 0.125 * F.cross_entropy(model(batch.x), batch.y, reduction="none")

    other = Problem.of(problem.model, problem.train, each_loss=scaled)
    a, details = run(problem, SSD(alpha=alpha, fisher=fisher))
    b, details_scaled = run(other, SSD(alpha=alpha, fisher=fisher))
    assert details["selected_by_tensor"] == details_scaled["selected_by_tensor"]
    assert same(a, b)  # a power of two scales without rounding


# --- invariant 6: importances of all data may be computed before the request --------------------


@pytest.mark.parametrize(
    "method",
    [
        SSD(),
        SSD(fisher="batch", batch_size=32),
        SSD(fisher="batch", order="sorted"),
        SSD(importance="logits"),
        SSD(importance="logits", fisher="batch"),
    ],
    ids=["sample", "batch", "sorted", "logits", "logits-batch"],
)
def test_ssd_invariant_6_prepared_equals_recomputed(problem, method):
    prepared = method.prepare(problem, Runtime(seed=3))
    for request in (REQUEST, forget(label=7)):
        a, _ = run(problem, method, request, seed=3)
        b, _ = run(problem, method, request, seed=3, prepared=prepared)
        assert same(a, b)


def test_ssd_prepared_importance_spares_the_retain_data(mlp):
    method = SSD()
    prepared = method.prepare(mlp, Runtime())
    runtime = Runtime()
    method.run(View(mlp, REQUEST, method.needs, runtime), runtime, prepared)
    assert runtime.cost.samples == len(REQUEST.resolve(mlp.train))


# --- the rest -----------------------------------------------------------------------------------


def test_ssd_selection_is_monotone_in_alpha(problem):
    kept = None
    counts = []
    for alpha in (1.0, 1.5, 2.0, 4.0):
        state, details = run(problem, SSD(alpha=alpha, lam=0.0))
        zeros = torch.cat([state[n].reshape(-1) == 0 for n, _ in problem.model.named_parameters()])
        if kept is not None:
            assert not (zeros & ~kept).any()  # a larger threshold selects a subset
        kept = zeros
        counts.append(details["selected"])
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)


def test_ssd_batch_mode_depends_on_the_order(mlp):
    shuffled = SSD(fisher="batch", batch_size=16, order="shuffled")
    in_order = SSD(fisher="batch", batch_size=16, order="sorted")
    random, by_class = (m.prepare(mlp, Runtime(seed=0)) for m in (shuffled, in_order))
    # samples of one class pull the same way, so their batch means are longer
    assert all(by_class[n].sum() > 1.5 * random[n].sum() for n in random)

    order = torch.argsort(mlp.train.labels, stable=True)
    matrix = dense.gradient_matrix(
        mlp.model, mlp.each_loss, list(mlp.train.batches(16, mlp.train.ids[order]))
    )
    means = torch.stack([rows.mean(0) for rows in matrix.split(16)])
    assert (dense.flat(mlp.model, by_class) - (means**2).mean(0)).abs().max() <= 1e-10


def test_ssd_batches_of_one_class_exceed_the_bound_of_samples(mlp):
    bound = N / len(REQUEST.resolve(mlp.train))
    with pytest.raises(SettingError):
        run(mlp, SSD(alpha=bound))
    _, details = run(mlp, SSD(alpha=bound, fisher="batch", batch_size=16))
    assert details["selected"] > 0


def test_ssd_label_free_importance_is_the_mean_magnitude(problem):
    _, matrix = matrices(problem, each=lambda m, b: m(b.x).square().sum(1))
    sample = SSD(importance="logits").prepare(problem, Runtime())
    assert (dense.flat(problem.model, sample) - matrix.abs().mean(0)).abs().max() <= 1e-10
    whole = SSD(importance="logits", fisher="batch", batch_size=N).prepare(problem, Runtime())
    assert (dense.flat(problem.model, whole) - matrix.mean(0).abs()).abs().max() <= 1e-10


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_ssd_label_free_variant_never_sees_labels(mlp, fisher):
    method = SSD(importance="logits", fisher=fisher)
    assert method.needs.labels == "none"
    unlabelled = Classification(mlp.model, (mlp.train.fetch(mlp.train.ids).x, None))
    request = forget(ids=REQUEST.resolve(mlp.train))
    a = unlearn(unlabelled, request, method, runtime=Runtime(seed=0))
    b = unlearn(mlp, request, method, runtime=Runtime(seed=0))
    assert same(a.model.state_dict(), b.model.state_dict())
    with pytest.raises(NeedsError, match="needs labels"):
        unlearn(unlabelled, request, SSD(fisher=fisher), runtime=Runtime(seed=0))
    with pytest.raises(AccessError):
        _ = View(mlp, request, method.needs, Runtime()).forget.labels()


def test_ssd_label_free_needs_logits(mlp):
    problem = Problem.of(mlp.model, mlp.train, each_loss=mlp.each_loss)
    with pytest.raises(NeedsError, match="logits"):
        unlearn(problem, REQUEST, SSD(importance="logits"), runtime=Runtime(seed=0))


def test_ssd_contradicting_settings_are_refused():
    with pytest.raises(SettingError, match="reads labels"):
        SSD(fisher="batch", order="sorted", importance="logits")
    for wrong in ({"alpha": -1}, {"alpha": "none"}, {"lam": -0.1}, {"batch_size": 0}):
        with pytest.raises(SettingError):
            SSD(**wrong)
    assert SSD.create({"alpha": "10"}).alpha == 10.0
    assert SSD.create({"alpha": "auto"}).alpha == "auto"


def test_ssd_importances_that_overflow_are_an_error(mlp):
    def huge(model, batch):
        return 1e200 * F.cross_entropy(model(batch.x), batch.y, reduction="none")

    problem = Problem.of(mlp.model, mlp.train, each_loss=huge)
    with pytest.raises(ExpungeError, match="NaN or infinite"):
        run(problem, SSD())


def test_ssd_same_seed_same_result_and_costs_are_counted(mlp):
    method = SSD(fisher="batch", batch_size=32)
    a = unlearn(mlp, REQUEST, method, runtime=Runtime(seed=5))
    b = unlearn(mlp, REQUEST, method, runtime=Runtime(seed=5))
    c = unlearn(mlp, REQUEST, method, runtime=Runtime(seed=6))
    assert a.record["weights"] == b.record["weights"] != c.record["weights"]
    touched = N + len(REQUEST.resolve(mlp.train))
    assert a.cost.samples == a.cost.gradients == touched
    assert a.details["estimator"] == "squared_batch_means"
    assert (a.details["batch_size"], a.details["order"]) == (32, "shuffled")
    sample = unlearn(mlp, REQUEST, SSD(), runtime=Runtime(seed=5))
    assert sample.cost.samples == touched
    assert sample.cost.gradients >= touched
    assert sample.details["estimator"] == "per_sample_squares"
    assert sample.details["batch_size"] is None


def test_ssd_default_forgets_a_class_and_keeps_the_others():
    torch.manual_seed(2)
    x, y = digits(1000)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    model = train(nn.Sequential(*model, nn.Linear(64, 10)).double(), x, y, steps=80)
    problem = Classification(model, (x, y))
    after = unlearn(problem, REQUEST, SSD(), runtime=Runtime(seed=0)).model

    def accuracy(m, on):
        return float((m(x[on]).argmax(1) == y[on]).double().mean())

    of_class = y == 3
    assert accuracy(problem.model, of_class) > 0.97
    assert accuracy(after, of_class) < 0.5
    assert accuracy(after, ~of_class) > accuracy(problem.model, ~of_class) - 0.05


def test_ssd_deviations_name_tests_that_exist():
    for deviation in SSD.card.deviations:
        path, _, name = deviation.test.partition("::")
        assert path == "tests/methods/test_ssd.py"
        assert callable(globals()[name])


def test_ssd_prepared_through_unlearn_gives_the_same_model(mlp):
    ready = xp.prepare(mlp, SSD())
    with_it = xp.unlearn(mlp, REQUEST, SSD(lam=0.5), prepared=ready)
    without = xp.unlearn(mlp, REQUEST, SSD(lam=0.5))
    assert with_it.record["weights"] == without.record["weights"]
    assert with_it.cost.samples < without.cost.samples
    assert with_it.details["preparation"]["gradients"] == len(mlp.train) + 6  # 3 twice, as a check


def test_ssd_refuses_what_was_prepared_for_another_model(mlp):
    ready = xp.prepare(mlp, SSD())
    other = copy.copy(mlp)
    other._hashes, other.model = {}, copy.deepcopy(mlp.model)
    next(other.model.parameters()).data.add_(1.0)
    with pytest.raises(xp.UserError, match="prepare again"):
        xp.unlearn(other, REQUEST, SSD(), prepared=ready)
    with pytest.raises(xp.UserError, match="prepare again"):
        xp.unlearn(mlp, REQUEST, SSD(importance="logits"), prepared=ready)

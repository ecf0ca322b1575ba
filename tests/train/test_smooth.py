"""The `smooth=` choice: invariants of the card unlearn-smooth, and what `fit` promises besides."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import expunge as xp
from expunge.core.data import Batch
from expunge.core.errors import Interrupted, NeedsError, SettingError, UserError
from expunge.core.runtime import Budget, Runtime
from expunge.methods import registry
from expunge.methods.text.npo import NPO
from expunge.suite import checks
from expunge.train.fit import Fit, fit
from expunge.train.parts import Apart
from expunge.train.smooth import parse_smooth
from expunge.train.stages import Stages
from expunge.workloads.tinyfacts import tiny_llama

CHOICES = ["sam(0.05)", "rs(0.01, 2)", "gp(0.1)", "cr(2.0)", "swa(2, 2)"]
GRADIENT_CHOICES = CHOICES[:-1]
NOTHING = ["sam(0)", "rs(0)", "gp(0)", "cr(0)", "swa(1000)"]
SO_LITTLE = ["sam(1e-30)", "rs(1e-30, 1)", "gp(1e-30)", "cr(1e-30, 1e-30)"]

# ------------------------------------------------------------------ quadratics in float64

DIMENSIONS, RATE = 5, 0.125
START = torch.randn(DIMENSIONS, generator=torch.Generator().manual_seed(3)).double()


def curvature(seed):
    root = torch.randn(DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    product = (root @ root.T / DIMENSIONS + 0.1 * torch.eye(DIMENSIONS)).double()
    return (product + product.T) / 2


A, R = curvature(1), curvature(2)


class Point(nn.Module):
    """θ in two tensors, so that a norm of each would show."""

    def __init__(self, start=START):
        super().__init__()
        self.a, self.b = nn.Parameter(start[:2].clone()), nn.Parameter(start[2:].clone())

    def forward(self):
        return torch.cat([self.a, self.b])


def quadratic(matrix):
    return lambda model, batch: 0.5 * model() @ matrix @ model()


def rows(*ids):
    return Batch(torch.zeros(len(ids)), None, torch.tensor(ids), len(ids))


def step_of(loss, smooth, *, model=None, batch=None, runtime=None, **options):
    """The gradient that one step of plain descent took, and what the curve says was minimised."""
    model = model or Point()
    before = [p.detach().clone() for p in model.parameters()]
    result = fit(
        model, lambda epoch: [(loss, batch or rows(0))], runtime=runtime or Runtime(), epochs=1,
        lr=RATE, smooth=smooth, every=1, **options,
    )  # fmt: skip
    moved = zip(before, model.parameters(), strict=True)
    taken = torch.cat([((b - p.detach()) / RATE).flatten() for b, p in moved])
    return taken, result.curve[0]["loss"]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_unlearn_smooth_invariant_3_sam_on_a_quadratic():
    rho, g = 0.3, A @ START
    there = START + rho * g / g.norm()
    taken, loss = step_of(quadratic(A), f"sam({rho})")
    close(taken, A @ there)
    assert loss == pytest.approx(float(0.5 * there @ A @ there))


def test_unlearn_smooth_invariant_3_gp_on_a_quadratic():
    strength, g = 0.7, A @ START
    taken, loss = step_of(quadratic(A), f"gp({strength})")
    close(taken, g + strength * A @ g / g.norm())
    assert loss == pytest.approx(float(0.5 * START @ g + strength * g.norm()))


@pytest.mark.parametrize("distance", [0.01, 0.5])
def test_unlearn_smooth_invariant_3_cr_on_a_quadratic(distance):
    strength, g = 10.0, A @ START

    def penalty(theta):
        return strength * distance * (A @ A @ theta).norm() / (A @ theta).norm()

    taken, loss = step_of(quadratic(A), f"cr({strength}, {distance})")
    assert loss == pytest.approx(float(0.5 * START @ g + penalty(START)))
    theta = START.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(penalty(theta), theta)
    assert float(wanted.norm()) > 1e-3
    close(taken - g, wanted, 1e-7)


# ------------------------------------------------------------------ a network, by hand


def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(5)).double()
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(6))


def some(*ids):
    ids = torch.tensor(ids)
    return Batch(X[ids], Y[ids], ids, len(ids))


def fitting(model, batch):
    return batch.mean(cross_entropy(model(batch.x), batch.y, reduction="none"))


def leaving(model, batch):
    return -0.5 * fitting(model, batch)


def by_hand(model, loss, batch, kind, values):
    """Gradient of the smoothed loss as written, all differentiated by autograd at once."""
    shapes = {n: p.shape for n, p in model.named_parameters()}
    start = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()

    def at(theta):
        sizes = [s.numel() for s in shapes.values()]
        parts = dict(zip(shapes, theta.split(sizes), strict=True))
        values = {n: part.view(shapes[n]) for n, part in parts.items()}
        return loss(lambda x: torch.func.functional_call(model, values, (x,)), batch)

    def slope(theta):
        return torch.autograd.grad(at(theta), theta, create_graph=True)[0]

    g = slope(start)
    if kind == "sam":
        away = (start + values[0] * g / g.norm()).detach().requires_grad_()
        return slope(away)
    if kind == "gp":
        return torch.autograd.grad(at(start) + values[0] * g.norm(), start)[0]
    shifted = slope(start + values[1] * g / g.norm())
    return torch.autograd.grad(at(start) + values[0] * (shifted - g).norm(), start)[0]


@pytest.mark.parametrize("loss", [fitting, leaving])
@pytest.mark.parametrize("smooth", ["sam(0.5)", "gp(0.7)", "cr(3.0, 0.2)"])
def test_a_network_steps_along_the_formula(smooth, loss):
    wanted = by_hand(deep(), loss, some(*range(7)), *parse_smooth(smooth))
    taken, _ = step_of(loss, smooth, model=deep(), batch=some(*range(7)))
    close(taken, wanted.detach())


@pytest.mark.parametrize("smooth", ["gp(0.7)", "cr(3.0, 0.2)"])
def test_unlearn_smooth_invariant_5_the_penalty_turns_the_step(smooth):
    plain, _ = step_of(fitting, "none", model=deep(), batch=some(*range(7)))
    taken, _ = step_of(fitting, smooth, model=deep(), batch=some(*range(7)))
    assert float(torch.cosine_similarity(plain, taken, dim=0)) < 0.999


# ------------------------------------------------------------------ two parts


def apart(first, rest):
    return Apart({"first": lambda m, b: first(m, b[0]), "rest": lambda m, b: rest(m, b[1])})


def test_unlearn_smooth_invariant_4_the_second_part_is_taken_at_the_weights():
    rho, g = 0.3, A @ START
    taken, loss = step_of(
        apart(quadratic(A), quadratic(R)), f"sam({rho})", batch=(rows(0), rows(1))
    )
    there = START + rho * g / g.norm()
    close(taken, A @ there + R @ START)
    assert loss == pytest.approx(float(0.5 * (there @ A @ there + START @ R @ START)))


@pytest.mark.parametrize("smooth", GRADIENT_CHOICES)
@pytest.mark.parametrize(
    "nothing", [lambda m, b: torch.zeros(()).double(), lambda m, b: 0.0 * fitting(m, b)]
)
def test_unlearn_smooth_invariant_4_without_a_first_part_it_is_training_on_the_second(
    smooth, nothing
):
    both = {"model": deep(), "batch": (some(0, 1, 2), some(3, 4))}
    alone, _ = step_of(apart(nothing, fitting), smooth, **both)
    plain, _ = step_of(fitting, "none", model=deep(), batch=some(3, 4))
    assert torch.equal(alone, plain)


@pytest.mark.parametrize(
    ("smooth", "forget", "retain"), [("sam(0.1)", 2, 1), ("gp(0.1)", 3, 1), ("cr(1)", 6, 1)]
)
def test_only_the_first_part_costs_more(smooth, forget, retain):
    runtime = Runtime()
    step_of(
        apart(leaving, fitting), smooth, model=deep(), batch=(some(0, 1, 2), some(3, 4)),
        runtime=runtime,
    )  # fmt: skip
    assert runtime.cost.gradients == 3 * forget + 2 * retain


@pytest.mark.parametrize(
    ("smooth", "times"),
    [("none", 1), ("sam(0.1)", 2), ("rs(0.1)", 4), ("gp(0.1)", 3), ("cr(1)", 6), ("swa(1)", 1)],
)
def test_the_cost_is_counted(smooth, times):
    runtime = Runtime()
    step_of(fitting, smooth, model=deep(), batch=some(0, 1, 2), runtime=runtime)
    assert runtime.cost.gradients == 3 * times


# ------------------------------------------------------------------ noise and means


def test_unlearn_smooth_invariant_6_noise_leaves_the_slope_of_a_line():
    slope = torch.arange(1.0, 6).double()
    taken, _ = step_of(lambda m, b: slope @ m(), "rs(0.5, 7)")
    close(taken, slope)


def test_noise_has_the_standard_deviation_it_was_given():
    r"""\(\mathbb E\,(\theta + \sigma z)^2 = \theta^2 + \sigma^2\), the slope of a cubic."""
    taken, _ = step_of(lambda m, b: (m() ** 3).sum() / 3, "rs(0.5, 1000)")
    torch.testing.assert_close(taken, START**2 + 0.25, rtol=0, atol=0.15)


def test_noise_is_fresh_in_every_step_and_draw_and_repeats_with_the_seed():
    def seen(seed):
        at = []

        def loss(model, batch):
            at.append(model().detach().clone())
            return model().sum() * 0

        fit(
            Point(), lambda epoch: [(loss, rows(0))] * 2, runtime=Runtime(seed=seed), epochs=1,
            lr=RATE, smooth="rs(0.1, 2)",
        )  # fmt: skip
        return at

    first = seen(0)  # each step begins at the weights themselves
    assert torch.equal(first[0], START) and torch.equal(first[3], START)
    noisy = [first[n] for n in (1, 2, 4, 5)]
    assert len({tuple(t.tolist()) for t in noisy}) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, seen(0), strict=True))
    assert not torch.equal(first[1], seen(1)[1])


def test_unlearn_smooth_invariant_6_the_mean_of_constant_weights_is_the_constant():
    start = torch.rand(5) / 3  # no binary fractions
    model = Point(start)
    fit(
        model, lambda epoch: [(quadratic(A.float()), rows(0))] * 7, runtime=Runtime(), epochs=1,
        lr=0.0, smooth="swa(1)",
    )  # fmt: skip
    assert torch.equal(model(), start)


@pytest.mark.parametrize(("start", "every"), [(1, 1), (3, 2), (6, 5)])
def test_the_mean_is_that_of_the_steps_it_names(start, every):
    theta, after = START, []
    for _ in range(8):
        theta = theta - RATE * A @ theta
        after.append(theta)
    model = Point()
    fit(
        model, lambda epoch: [(quadratic(A), rows(0))] * 4, runtime=Runtime(), epochs=2, lr=RATE,
        smooth=f"swa({start}, {every})",
    )  # fmt: skip
    close(model().detach(), torch.stack(after[start - 1 :: every]).mean(0))


def test_snapshots_are_what_a_shorter_training_ends_with():
    def train(epochs):
        model = normed()
        found = fit(
            model, lambda epoch: [(noisy_fit, small(range(4))), (noisy_fit, small(range(4, 9)))],
            runtime=Runtime(), epochs=epochs, lr=RATE, smooth="swa(3)", snapshots=True,
        )  # fmt: skip
        return model.state_dict(), found.snapshots

    torch.manual_seed(0)
    _, snapshots = train(3)
    for epochs, snapshot in enumerate(snapshots, start=1):
        torch.manual_seed(0)
        state, _ = train(epochs)
        assert all(torch.equal(snapshot[k], v) for k, v in state.items())


# ------------------------------------------------------------------ dropout and running statistics


def normed():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)
    )


def small(ids):
    ids = torch.tensor(list(ids))
    return Batch(X[ids].float(), Y[ids], ids, len(ids))


def noisy_fit(model, batch):
    return batch.mean(cross_entropy(model(batch.x).float(), batch.y, reduction="none"))


BATCHES = [small([0, 1, 2, 3]), small([4, 5, 6]), small([7]), small([8, 9, 10, 11])]


def trained(smooth, *, model=None, runtime=None, loss=noisy_fit, batches=BATCHES, **options):
    model = model or normed()
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "epochs": 2, "every": 1}
    torch.manual_seed(9)
    result = fit(
        model, lambda epoch: [(loss, batch) for batch in batches], runtime=runtime or Runtime(),
        smooth=smooth, **(settings | options),
    )  # fmt: skip
    return model.state_dict(), result


def assert_same(left, right):
    assert all(torch.equal(v, right[0][k]) for k, v in left[0].items())
    assert left[1].curve == right[1].curve


@pytest.mark.parametrize("step", ["sgd", "adamw"])
@pytest.mark.parametrize("smooth", NOTHING)
def test_unlearn_smooth_invariant_1_a_strength_of_zero_changes_no_bit(smooth, step):
    runtime, plain = Runtime(), Runtime()
    with_it = trained(smooth, step=step, runtime=runtime)
    assert_same(with_it, trained("none", step=step, runtime=plain))
    assert runtime.cost.gradients == plain.cost.gradients


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("smooth", SO_LITTLE)
def test_unlearn_smooth_invariant_1_a_strength_below_rounding_changes_no_bit(smooth, accumulate):
    """The same dropout in each pass; running statistics move once and only at the weights."""
    options = {"accumulate": accumulate, "clip": 0.5}
    left, right = trained(smooth, **options), trained("none", **options)
    if accumulate > 1:  # a smoothed step reports the mean over its batches, a plain one its last
        left[1].curve = right[1].curve
    assert_same(left, right)


def test_the_default_is_a_plain_loop_to_the_bit():
    model = normed().train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, fused=True
    )
    torch.manual_seed(9)
    for _ in range(2):
        for batch in (BATCHES[0], BATCHES[1], BATCHES[3]):
            optimizer.zero_grad()
            noisy_fit(model, batch).backward()
            optimizer.step()
    found, _ = trained("none", batches=[BATCHES[0], BATCHES[1], BATCHES[3]])
    assert all(torch.equal(v, found[k]) for k, v in model.state_dict().items())


# ------------------------------------------------------------------ what may move, and for how long


def half_mask(model):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}


@pytest.mark.parametrize("smooth", ["sam(0.3)", "rs(0.3, 1)", "cr(1, 0.3)"])
@pytest.mark.parametrize("masked", [False, True])
def test_unlearn_smooth_invariant_2_the_weights_are_moved_by_rho_and_put_back(masked, smooth):
    model = normed()
    before = copy.deepcopy(model.state_dict())
    mask = half_mask(model) if masked else None
    away = []

    def loss(model, batch):
        moved = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        away.append(torch.stack([m.square().sum() for m in moved.values()]).sum().sqrt())
        if mask is not None:
            assert all(bool((m[~mask[n]] == 0).all()) for n, m in moved.items())
        return noisy_fit(model, batch)

    fit(
        model, lambda epoch: [(loss, BATCHES[0])], runtime=Runtime(), epochs=1, lr=0.0,
        smooth=smooth, mask=mask,
    )  # fmt: skip
    if "rs" in smooth:  # the norm of the noise is not given
        assert away[0] == 0 and away[1] > 0.1
    else:
        assert [round(float(a), 6) for a in away[:2]] == [0.0, 0.3]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("smooth", GRADIENT_CHOICES)
def test_an_error_in_a_later_pass_leaves_the_weights_where_they_were(smooth):
    model = normed()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("stopped on purpose")
        return noisy_fit(model, batch)

    with pytest.raises(Interrupted):
        trained(smooth, model=model, loss=loss)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("step", ["sgd", "adamw"])
@pytest.mark.parametrize("smooth", CHOICES)
def test_frozen_coordinates_keep_every_bit(smooth, step):
    model = normed()
    mask, before = half_mask(model), copy.deepcopy(model.state_dict())
    found, _ = trained(smooth, model=model, mask=mask, step=step, weight_decay=0.1)
    for name, may in mask.items():
        assert torch.equal(found[name][~may], before[name][~may])
        assert not torch.equal(found[name][may], before[name][may])


def test_what_is_frozen_has_no_part_in_the_norm():
    """SAM on two of five coordinates is SAM on the problem of these two."""
    mask = {"a": torch.ones(2, dtype=torch.bool), "b": torch.zeros(3, dtype=torch.bool)}
    taken, _ = step_of(quadratic(A), "sam(0.3)", mask=mask)
    g = (A @ START)[:2]
    there = START.clone()
    there[:2] += 0.3 * g / g.norm()
    close(taken[:2], (A @ there)[:2])
    assert not taken[2:].any()


@pytest.mark.parametrize("smooth", GRADIENT_CHOICES)
def test_clipping_is_of_the_smoothed_gradient(smooth):
    free, _ = step_of(fitting, smooth, model=deep(), batch=some(0, 1))
    taken, _ = step_of(fitting, smooth, model=deep(), batch=some(0, 1), clip=0.01)
    close(taken, 0.01 * free / free.norm(), 1e-5)


@pytest.mark.parametrize("smooth", ["sam(0.5)", "rs(0.3, 2)", "gp(0.7)", "cr(3.0, 0.2)"])
def test_unlearn_smooth_invariant_7_two_half_batches_are_one_whole(smooth):
    def weights(batches, accumulate):
        model = deep()
        fit(
            model, lambda epoch: [(leaving, batch) for batch in batches], runtime=Runtime(),
            epochs=2, lr=RATE, smooth=smooth, accumulate=accumulate,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = weights([some(*range(6)), some(*range(6, 12))], 1)
    halves = [some(*range(n, n + 3)) for n in (0, 3, 6, 9)]
    close(weights(halves, 2), whole)
    left_over = weights([*halves, some(0)], 2)  # belongs to no step, and to none of the next pass
    close(left_over, whole)


# ------------------------------------------------------------------ interruptions and ruin


def interrupted(folder, smooth, at, **options):
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == at:
            raise Interrupted("stopped on purpose")
        return noisy_fit(model, batch)

    runtime = Runtime(checkpoint=folder, checkpoint_every=1)
    return trained(smooth, runtime=runtime, loss=loss, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smooth", CHOICES)
def test_it_resumes_to_the_same_bits(smooth, dtype, tmp_path):
    def loss(model, batch):
        return noisy_fit(model, Batch(batch.x.to(dtype), batch.y, batch.ids, batch.total))

    options = {"batches": [BATCHES[0], BATCHES[1], BATCHES[3]], "epochs": 3, "snapshots": True}
    whole = trained(smooth, loss=loss, model=normed().to(dtype), **options)
    for steps in (1, 4, 7):
        runtime = {"checkpoint": tmp_path / str(steps), "checkpoint_every": 1}
        part = Runtime(**runtime, budget=Budget(steps=steps))
        trained(smooth, loss=loss, model=normed().to(dtype), runtime=part, **options)
        torch.rand(3)  # the world does not stand still
        again = trained(
            smooth, loss=loss, model=normed().to(dtype), runtime=Runtime(**runtime), **options
        )
        assert again[1].steps == 9
        assert_same(whole, again)
        for a, b in zip(whole[1].snapshots, again[1].snapshots, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)


def test_it_resumes_after_an_error_in_the_middle_of_a_step(tmp_path):
    whole = trained("sam(0.05)")
    with pytest.raises(Interrupted):
        interrupted(tmp_path, "sam(0.05)", 8)  # the perturbed pass of the fourth step
    assert_same(whole, interrupted(tmp_path, "sam(0.05)", None))


@pytest.mark.parametrize("smooth", CHOICES)
def test_ruined_weights_are_put_back(smooth):
    def ruin(epoch):
        return 0.05 if epoch == 0 else 1e38

    options = {"loss": noisy_fit, "schedule": ruin, "epochs": 3, "snapshots": [1]}
    state, result = trained(smooth if "swa" not in smooth else "swa(6)", **options)
    assert "were put back" in result.stopped
    assert all(torch.equal(result.snapshots[0][k], v) for k, v in state.items())


def test_a_training_that_was_ruined_ends_without_its_mean():
    def train(smooth):
        calls = []

        def loss(model, batch):
            calls.append(1)
            return noisy_fit(model, batch) * (torch.nan if len(calls) == 7 else 1.0)

        return trained(smooth, loss=loss)

    (state, result), (plain, _) = train("swa(1)"), train("none")
    assert result.steps == 6 and "the loss was nan" in result.stopped
    assert all(torch.equal(v, plain[k]) for k, v in state.items())


# ------------------------------------------------------------------ half precision and adapters


def test_half_precision_is_averaged_in_float32():
    model = normed().bfloat16()

    def loss(model, batch):
        return noisy_fit(model, Batch(batch.x.bfloat16(), batch.y, batch.ids, batch.total))

    state, result = trained("swa(1)", model=model, loss=loss, lr=1e-3)
    for name, p in model.named_parameters():
        assert result.average[name].dtype == torch.float32
        assert torch.equal(state[name], result.average[name].bfloat16()) and p.shape
    assert not torch.equal(result.average["0.weight"], state["0.weight"].float())


def test_half_precision_is_put_back_to_the_bit():
    model = normed().bfloat16()
    before = copy.deepcopy(dict(model.named_parameters()))

    def loss(model, batch):
        return noisy_fit(model, Batch(batch.x.bfloat16(), batch.y, batch.ids, batch.total))

    trained("sam(0.7)", model=model, loss=loss, lr=0.0, momentum=0.0, weight_decay=0.0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_only_adapters_are_moved():
    adapters, rest = [], []

    class Watching(NPO):
        name = "watching"

        def forget_loss(self, model, batch, text):
            of = {True: adapters, False: rest}
            for kind, found in of.items():
                sums = [p.detach().double().sum() for n, p in model.named_parameters() if (".lora_" in n) == kind]  # fmt: skip
                found.append(float(torch.stack(sums).sum()))
            return super().forget_loss(model, batch, text)

    problem, request = checks.problem_for("causal-lm"), checks.request_for("causal-lm")
    method = Watching(train="lora(2)", epochs=2, batch_size=5, lr=1e-3, smooth="sam(0.05)")
    xp.unlearn(problem, request, method)
    assert len(adapters) == 2 * 2 * 2 and len(set(rest)) == 1
    assert all(adapters[n] != adapters[n + 1] for n in range(len(adapters) - 1))


# ------------------------------------------------------------------ language models


def test_only_the_forget_term_is_asked_again(monkeypatch):
    problem, request = checks.problem_for("causal-lm"), checks.request_for("causal-lm")
    calls = {"forget_loss": 0, "retain_loss": 0}
    for name in calls:
        old = getattr(NPO, name)

        def counted(self, *args, old=old, name=name):
            calls[name] += 1
            args[-1].log(**{name: 1.0})
            return old(self, *args)

        monkeypatch.setattr(NPO, name, counted)
    outcome = xp.unlearn(problem, request, NPO(epochs=1, batch_size=5, smooth="sam(0.01)"))
    assert calls == {"forget_loss": 4, "retain_loss": 2}
    assert {len(v) for v in outcome.details["losses"].values()} == {2}  # one entry a step


@pytest.mark.parametrize("smooth", ["gp(0.1)", "cr(1.0)"])
def test_fused_attention_is_differentiated_twice(smooth):
    def weights(attention):
        torch.manual_seed(0)
        model = tiny_llama(16, 1)
        model.set_attn_implementation(attention)
        tokens = torch.randint(4, 90, (3, 8), generator=torch.Generator().manual_seed(1))

        def loss(model, batch):
            return model(input_ids=tokens, labels=tokens).loss

        taken, _ = step_of(loss, smooth, model=model, batch=rows(0, 1, 2))
        return taken

    torch.testing.assert_close(weights("sdpa"), weights("eager"), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------ methods


def settings_of(name):
    cls = registry.get(name)
    return cls, dict(checks.problem_for(cls.domain).tuned.get(name, {}))


@pytest.mark.parametrize("smooth", ["none", *CHOICES])
@pytest.mark.parametrize("name", ["finetune", "salun", "npo", "grad-diff"])
def test_methods_run_with_each_choice(name, smooth):
    cls, settings = settings_of(name)
    method = cls.create({**settings, "smooth": smooth})
    outcome = checks.run(method)
    assert all(bool(p.isfinite().all()) for p in outcome.runnable().parameters())
    plain = checks.run(cls.create(settings))
    assert outcome.details["steps"] == plain.details["steps"] > 2
    assert (outcome.record["weights"] == plain.record["weights"]) == (smooth == "none")


def test_stages_smooth_the_model_and_no_helper(monkeypatch):
    given = []

    def record(model, passes, *, smooth, **options):
        given.append(smooth)
        return Fit()

    monkeypatch.setattr("expunge.train.stages.fit", record)
    stages = Stages(xp.methods.UNSIR(smooth="sam(0.1)"), Point(), None, Runtime())
    stages.run("impair", list, epochs=1)
    stages.run("helper", list, epochs=1, model=Point())
    assert given == ["sam(0.1)", "none"]


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("spec", ["", "sharp(1)", "none(1)", "sam", "sam(0.1", "swa(1)(2)"])
def test_what_is_no_choice_is_refused(spec):
    with pytest.raises(SettingError, match="is not a choice; use none, sam"):
        xp.methods.FineTune(smooth=spec)


@pytest.mark.parametrize(
    "spec",
    [
        "sam()", "sam(a)", "sam(-1)", "sam(nan)", "sam(inf)", "sam(1, 2)", "rs(0.1, 0)",
        "rs(0.1, 1.5)", "rs(1,2,3)", "gp(1, 2)", "cr(1, 0)", "swa(0)", "swa(1.5)", "swa(1, 0)",
        "swa(inf)", "cr(1, nan)", "rs(1, inf)",
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(spec):
    with pytest.raises(SettingError, match="K, START and EVERY counts from 1"):
        xp.methods.FineTune(smooth=spec)


def test_defaults_of_second_numbers():
    assert parse_smooth("none") == ("none", ())
    assert parse_smooth(" rs(1e-4) ") == ("rs", (1e-4, 3))
    assert parse_smooth("cr(10)") == ("cr", (10, 0.01))
    assert parse_smooth("swa(100)") == ("swa", (100, 1))


@pytest.mark.parametrize("smooth", ["gp(1)", "cr(1)"])
def test_scaled_losses_are_refused(smooth):
    with pytest.raises(NeedsError, match="scaled losses of fp16"):
        step_of(quadratic(A), smooth, runtime=Runtime(precision="fp16"))


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2


@pytest.mark.parametrize("smooth", ["gp(1)", "cr(1)"])
def test_a_model_without_a_second_derivative_is_refused(smooth):
    def loss(model, batch):
        return OnlyOnce.apply(model()).square().sum()

    with pytest.raises(
        NeedsError, match=r"which a layer of this model does not allow .* smooth=sam"
    ):
        step_of(loss, smooth)
    step_of(loss, "sam(0.1)")


@pytest.mark.parametrize("smooth", CHOICES)
def test_the_checkpoint_of_another_choice_is_refused(smooth, tmp_path):
    with pytest.raises(Interrupted):
        interrupted(tmp_path, "none", 5)
    with pytest.raises(UserError, match="belongs to another training"):
        interrupted(tmp_path, smooth, None)


# ------------------------------------------------------------------ two processes

SCRIPT = """
import json, sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn
from torch.nn.functional import cross_entropy

state = PartialState(cpu=True)
torch.set_num_threads(1)

from expunge.core.data import Data
from expunge.core.runtime import Runtime
from expunge.core.view import Source
from expunge.train.fit import fit
from expunge.train.parts import Apart

generator = torch.Generator().manual_seed(0)
data = Data((torch.randn(23, 4, generator=generator).double(), torch.randint(3, (23,), generator=generator)))


def fitting(model, batch):
    return batch.mean(cross_entropy(model(batch.x), batch.y, reduction="none"))


def leaving(model, batch):
    return -0.5 * fitting(model, batch)


both = Apart({"leaving": lambda m, b: leaving(m, b[0]), "fitting": lambda m, b: fitting(m, b[1])})
found = {"processes": Runtime().processes}
for smooth in sys.argv[2:]:
    for name, loss in (("whole", fitting), ("apart", both)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        runtime = Runtime(seed=3)
        forget, retain = (Source(data, ids, True, runtime) for ids in (data.ids[:7], data.ids[7:]))

        def passes(epoch):
            pairs = zip(forget.batches(3), retain.batches(5))
            for f, r in pairs:  # uneven shares, and an empty one
                yield loss, ((f, r) if name == "apart" else r)

        result = fit(model, passes, runtime=runtime, epochs=3, lr=0.1, smooth=smooth, every=1, clip=0.5)
        found[smooth + " " + name] = {
            "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
            "losses": [p["loss"] for p in result.curve],
            "gradients": int(runtime.sum(torch.tensor(runtime.cost.gradients))),
        }
if state.is_main_process:
    Path(sys.argv[1]).write_text(json.dumps(found))
state.wait_for_everyone()
if state.num_processes > 1:
    torch.distributed.destroy_process_group()
"""
SHARED = ["sam(0.3)", "rs(0.1, 2)", "gp(0.3)", "cr(2.0, 0.2)", "swa(2)"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "script.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    two += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    found = []
    for count, launch in ((1, []), (2, two)):
        out = folder / f"{count}.json"
        done = subprocess.run(
            [sys.executable, *launch, str(folder / "script.py"), str(out), *SHARED],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    assert [f.pop("processes") for f in found] == [1, 2]
    return found


@pytest.mark.parametrize("parts", ["whole", "apart"])
@pytest.mark.parametrize("smooth", SHARED)
def test_two_processes_take_the_steps_of_one(shared, smooth, parts):
    one, two = (f[f"{smooth} {parts}"] for f in shared)
    assert two["weights"] == pytest.approx(one["weights"], abs=1e-9)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-9)
    assert two["gradients"] == one["gradients"]

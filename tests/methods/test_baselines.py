"""Invariants of the card baselines-vision for the methods built so far."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.core.errors import SettingError, UnchangedError
from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Budget, Runtime
from expunge.core.view import View
from expunge.methods.general.finetune import FineTune
from expunge.methods.general.gradient_ascent import GradientAscent
from expunge.methods.general.neggrad_plus import NegGradPlus, cycled
from expunge.methods.general.random_label import RandomLabel, draw_labels
from expunge.methods.general.retrain import Retrain
from expunge.methods.general.salun import SalUn
from expunge.methods.general.scrub import SCRUB
from expunge.problems.classification import Classification
from expunge.train.steps import make_optimizer
from expunge.workloads.nets import SmallResNet

THREES = Request(label=(3,))


def run(problem, method, request=THREES, seed=0):
    return unlearn(problem, request, method, runtime=Runtime(seed=seed, threads=1))


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[k], right[k]) for k in left)


def forget_loss(problem, model, request=THREES) -> float:
    batch = problem.train.fetch(request.resolve(problem.train))
    with torch.no_grad():
        return float(problem.each_loss(model.eval(), batch).mean())


@pytest.fixture(scope="module")
def resnet_problem() -> Classification:
    """A small ResNet with batch norm on 120 upscaled digits: running statistics matter."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images[:120] / 16.0).float().reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels[:120]).long()
    torch.manual_seed(0)
    return Classification(
        SmallResNet(width=4), (x, y), (x[:20], y[:20]), build=lambda: SmallResNet(width=4)
    )


def test_finetune_has_the_weight_decay_of_its_card(digits):
    shared = {"epochs": 1, "lr": 0.05}
    default = run(digits, FineTune(**shared)).model
    assert states_equal(default, run(digits, FineTune(weight_decay=5e-4, **shared)).model)


def test_a_budget_without_a_step_says_so(digits):
    with pytest.raises(UnchangedError, match="original weights; budget of 0 steps used"):
        unlearn(digits, THREES, FineTune(), runtime=Runtime(budget=Budget(steps=0)))
    with pytest.raises(UnchangedError, match="original weights; its settings have no effect here"):
        run(digits, SCRUB(alpha=0.0, gamma=0.0, weight_decay=0.0, max_epochs=0))


# ------------------------------------------------------------------ invariant 1


def test_baselines_vision_invariant_1_ascent_raises_the_forget_loss(digits):
    before = forget_loss(digits, digits.model)
    after = run(digits, GradientAscent(epochs=1, lr=1e-3, batch_size=10_000)).model
    assert forget_loss(digits, after) > before


def test_baselines_vision_invariant_1_neggrad_with_a_1_is_finetune(resnet_problem):
    shared = {"epochs": 2, "lr": 0.05, "batch_size": 32, "momentum": 0.0, "weight_decay": 1e-3}
    negative = run(resnet_problem, NegGradPlus(a=1.0, **shared))
    tuned = run(resnet_problem, FineTune(**shared))
    assert states_equal(negative.model, tuned.model)
    assert [p["loss"] for p in negative.curve] == [p["loss"] for p in tuned.curve]


def test_baselines_vision_invariant_1_neggrad_with_a_0_is_ascent_with_cycling(digits):
    method = NegGradPlus(a=0.0, epochs=2, lr=1e-3, batch_size=64)
    outcome = run(digits, method)

    runtime = Runtime(seed=0)
    view = View(digits, THREES, method.needs, runtime)
    model = copy.deepcopy(digits.model).train()
    optimizer = make_optimizer("sgd", model.parameters(), lr=1e-3)
    for epoch in range(2):
        batches = cycled(view.forget, 64, runtime, epoch)
        for _ in range(-(-len(view.retain) // 64)):
            optimizer.zero_grad()
            batch = next(batches)
            (-digits.each_loss(model, batch).mean()).backward()
            optimizer.step()
    for got, wanted in zip(outcome.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_ascent_stops_at_its_bound(digits):
    outcome = run(digits, GradientAscent(epochs=20, lr=0.05, bound=2.0))
    assert "passed the bound" in outcome.details["stopped"]
    free = run(digits, GradientAscent(epochs=20, lr=0.05))
    assert outcome.details["steps"] < free.details["steps"]
    assert 2.0 < forget_loss(digits, outcome.model) < forget_loss(digits, free.model)


# ------------------------------------------------------------------ invariant 2


def test_baselines_vision_invariant_2_random_labels_are_uniform_with_the_true_class(digits):
    from scipy.stats import chisquare

    view = View(digits, THREES, RandomLabel().needs, Runtime(seed=0))
    draws = [draw_labels(view, Runtime(seed=0), epoch) for epoch in range(40)]
    ids, _ = draws[0]
    assert ids.tolist() == THREES.resolve(digits.train).tolist()
    counts = torch.stack([labels for _, labels in draws]).flatten().bincount(minlength=10)
    assert chisquare(counts.numpy()).pvalue > 1e-3
    share = float(counts[3]) / int(counts.sum())
    assert abs(share - 0.1) < 4 * (0.09 / int(counts.sum())) ** 0.5  # the true class, at 1/C


def test_random_labels_are_drawn_anew_each_epoch(digits):
    view = View(digits, THREES, RandomLabel().needs, Runtime(seed=0))
    first, second = (draw_labels(view, Runtime(seed=0), e)[1] for e in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_labels(view, Runtime(seed=0), 0)[1])


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_random_label_shows_both_sides_once_an_epoch_with_the_right_labels(
    digits, order, monkeypatch
):
    seen: list[tuple[int, int]] = []
    true = Classification.each_loss

    def spy(self, model, batch):
        seen.extend(zip(batch.ids.tolist(), batch.y.tolist(), strict=True))
        return true(self, model, batch)

    monkeypatch.setattr(Classification, "check", lambda self: None)
    monkeypatch.setattr(Classification, "each_loss", spy)
    run(digits, RandomLabel(epochs=2, order=order))
    assert len(seen) == 2 * len(digits.train)
    view = View(digits, THREES, RandomLabel().needs, Runtime(seed=0))
    labels = dict(zip(digits.train.ids.tolist(), digits.train.labels.tolist(), strict=True))
    forgotten = set(view.forget.ids.tolist())
    for epoch, part in enumerate((seen[: len(digits.train)], seen[len(digits.train) :])):
        drawn = dict(
            zip(*(t.tolist() for t in draw_labels(view, Runtime(seed=0), epoch)), strict=True)
        )
        assert dict(part) == {i: drawn[i] if i in forgotten else y for i, y in labels.items()}
        first = {i for i, _ in part[: len(forgotten)]}
        assert (first == forgotten) == (order == "sequential")


# ------------------------------------------------------------------ invariant 3


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_baselines_vision_invariant_3_salun_with_q_1_is_random_label(resnet_problem, order):
    shared = {"epochs": 2, "lr": 0.05, "weight_decay": 1e-3, "order": order, "batch_size": 32}
    masked = run(resnet_problem, SalUn(train="saliency(1.0)", **shared))
    plain = run(resnet_problem, RandomLabel(**shared))
    assert states_equal(masked.model, plain.model)


@pytest.mark.parametrize(("step", "momentum"), [("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)])
def test_baselines_vision_invariant_3_salun(resnet_problem, step, momentum):
    from expunge.train.masks import saliency

    problem = resnet_problem
    method = SalUn(
        train="saliency(0.3)", epochs=3, lr=0.05, step=step, momentum=momentum, weight_decay=0.1
    )
    outcome = run(problem, method)
    runtime = Runtime(seed=0)
    view = View(problem, THREES, method.needs, runtime)
    mask = saliency(view.model(), view, runtime, share=0.3)
    total = sum(m.numel() for m in mask.values())
    assert sum(int(m.sum()) for m in mask.values()) == int(0.3 * total)
    original = dict(problem.model.named_parameters())
    moved = 0
    for name, value in outcome.model.named_parameters():
        frozen = ~mask[name]
        assert torch.equal(value[frozen], original[name][frozen]), name
        moved += int((value[mask[name]] != original[name][mask[name]]).sum())
    assert moved > 0.9 * int(0.3 * total)


# ------------------------------------------------------------------ invariant 5


@pytest.mark.parametrize(("epochs", "max_epochs"), [(3, 2), (2, 5), (2, 0)])
def test_baselines_vision_invariant_5_scrub_visits(digits, epochs, max_epochs):
    outcome = run(digits, SCRUB(epochs=epochs, max_epochs=max_epochs))
    forget = len(THREES.resolve(digits.train))
    wanted = epochs * (len(digits.train) - forget) + min(max_epochs, epochs) * forget
    assert outcome.cost.samples == outcome.cost.gradients == wanted


def test_baselines_vision_invariant_5_scrub_without_max_and_distillation_is_finetune(
    resnet_problem,
):
    shared = {"epochs": 3, "lr": 0.02, "batch_size": 32, "weight_decay": 5e-4}
    scrubbed = run(
        resnet_problem, SCRUB(max_epochs=0, alpha=0.0, gamma=1.0, decay_epochs=(), **shared)
    )
    tuned = run(resnet_problem, FineTune(**shared))
    assert states_equal(scrubbed.model, tuned.model)


def test_baselines_vision_invariant_5_scrub_moves_the_student_only(digits, monkeypatch):
    teachers = []
    original = View.original

    def keep(self):
        teachers.append(original(self))
        return teachers[-1]

    monkeypatch.setattr(View, "original", keep)
    outcome = run(digits, SCRUB(lr=0.01, alpha=0.5))
    (teacher,) = teachers
    assert states_equal(teacher, digits.model)
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not states_equal(outcome.model, digits.model)


def test_scrub_first_max_pass_does_nothing_without_batch_norm(digits):
    """At θ₀ the divergence is at its minimum, so its gradient is zero up to rounding."""
    outcome = run(
        digits, SCRUB(epochs=1, max_epochs=1, gamma=0.0, alpha=0.0, weight_decay=0.0, lr=0.01)
    )
    moved = max(
        float((a - b).detach().abs().max())
        for a, b in zip(outcome.model.parameters(), digits.model.parameters(), strict=True)
    )
    assert moved < 1e-5


def test_scrub_max_pass_leaves_the_teacher_on_the_forget_data(digits):
    """With the sign of the max pass turned round the divergence would shrink instead."""
    from expunge.train.losses import kl_each

    shared = {"epochs": 3, "lr": 0.02, "alpha": 0.5, "gamma": 1.0, "temperature": 2.0}
    batch = digits.train.fetch(THREES.resolve(digits.train))
    apart = {}
    for max_epochs in (0, 2):
        model = run(digits, SCRUB(max_epochs=max_epochs, **shared)).model
        with torch.no_grad():
            teacher, student = digits.logits(digits.model, batch), digits.logits(model, batch)
        apart[max_epochs] = float(kl_each(teacher, student).mean())
    assert apart[2] > 3 * apart[0]


def test_scrub_cannot_rewind_past_a_recalibration_or_without_the_class(digits):
    from expunge.core.errors import DataError

    with pytest.raises(SettingError, match="recalibration"):
        SCRUB(rewind=True, norm="recalibrate")
    other = copy.copy(digits)
    keep = digits.valid.ids[digits.valid.labels != 3]
    part = digits.valid.fetch(keep)
    other.valid = type(digits.valid)((part.x, part.y), ids=keep)
    with pytest.raises(DataError, match="validation samples"):
        run(other, SCRUB(rewind=True, epochs=1))


def test_frozen_layers_keep_their_running_statistics(resnet_problem):
    outcome = run(resnet_problem, FineTune(epochs=1, train="last(1)"))
    original = resnet_problem.model.state_dict()
    moved = {n for n, v in outcome.model.state_dict().items() if not torch.equal(v, original[n])}
    assert moved == {"head.weight", "head.bias"}


def test_eu_k_draws_the_last_layers_anew_and_trains_them(resnet_problem):
    shared = {"epochs": 1, "train": "last(1)", "weight_decay": 0.0}
    outcome = run(resnet_problem, FineTune(reset=True, lr=1e-9, **shared))
    fresh = resnet_problem.fresh(Runtime(seed=0).seed_for("fresh", "reset")).state_dict()
    original = resnet_problem.model.state_dict()
    for name, value in outcome.model.state_dict().items():
        torch.testing.assert_close(value, (fresh if "head" in name else original)[name])
    assert outcome.details["renewed"] == 17 * 10
    trained = run(resnet_problem, FineTune(reset=True, lr=1.0, **shared)).model
    assert float((trained.head.weight.detach() - fresh["head.weight"]).abs().max()) > 1e-3


def test_eu_k_over_all_layers_is_training_from_scratch(resnet_problem):
    fresh = resnet_problem.fresh(Runtime(seed=0).seed_for("fresh", "reset"))
    shared = {"epochs": 2, "lr": 0.05}
    scratch = run(Classification(fresh, resnet_problem.train), FineTune(**shared)).model
    assert states_equal(run(resnet_problem, FineTune(reset=True, **shared)).model, scratch)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": "saliency(0.5)"}, r"draws whole layers anew; use train=last\(K\)"),
        (
            {"norm": "frozen"},
            r"running statistics of 'norm' too, which norm=frozen.*use norm=train",
        ),
    ],
)
def test_eu_k_refuses_what_would_be_half_a_reset(resnet_problem, settings, words):
    with pytest.raises(SettingError, match=words):
        run(resnet_problem, FineTune(reset=True, **settings))


def test_scrub_learning_rate_falls_after_the_decay_epochs(digits):
    outcome = run(digits, SCRUB(epochs=5, max_epochs=0, decay_epochs=(1, 3), lr=0.1))
    rates = {point["epoch"]: point["lr"] for point in outcome.curve}
    assert [round(rates[e], 6) for e in range(5)] == [0.1, 0.01, 0.01, 0.001, 0.001]


def test_scrub_rewinds_to_the_epoch_closest_to_the_validation_error(digits):
    settings = {
        "epochs": 4,
        "max_epochs": 2,
        "lr": 0.03,
        "alpha": 0.5,
        "gamma": 1.0,
        "temperature": 2.0,
    }
    outcome = run(digits, SCRUB(rewind=True, **settings))
    errors, wanted = outcome.details["forget_errors"], outcome.details["validation_error"]
    best = outcome.details["rewound_to_epoch"]
    assert abs(errors[best - 1] - wanted) == min(abs(e - wanted) for e in errors)
    batch = digits.train.fetch(THREES.resolve(digits.train))
    with torch.no_grad():
        error = float((digits.logits(outcome.model, batch).argmax(1) != batch.y).float().mean())
    assert error == pytest.approx(errors[best - 1], abs=1e-6)


def test_scrub_is_the_loop_of_its_paper_with_its_temperature_and_signs():
    """Whole batches in float64 against a loop written out, with all weights away from the defaults."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    student = copy.deepcopy(teacher)
    method = SCRUB(
        epochs=5, max_epochs=2, alpha=0.3, gamma=0.9, temperature=4.0, lr=0.1, decay_epochs=(2, 3)
    )
    outcome = run(Classification(teacher, (x, y)), method, Request(ids=tuple(range(8))))

    def divergence(rows):
        p = (teacher(rows).detach() / 4).softmax(1)
        q = (student(rows) / 4).softmax(1)
        return 16 * (p * (p.log() - q.log())).sum(1).mean()

    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(1, 6):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.1 ** sum(epoch > e for e in (2, 3))
        losses = [lambda: -divergence(x[:8])] if epoch <= 2 else []
        losses.append(
            lambda: (
                0.9 * nn.functional.cross_entropy(student(x[8:]), y[8:]) + 0.3 * divergence(x[8:])
            )
        )
        for loss in losses:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    for got, wanted in zip(outcome.model.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_scrub_never_rewinds_to_weights_that_are_not_finite():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=generator)
    y = torch.randint(3, (60,), generator=generator)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    problem = Classification(net, (x, y), valid=(x, y))
    seen = []
    for lr in (1e8, 1e10, 1e12, 1e20, 1e38):
        for epochs in (1, 2, 3, 4):
            method = SCRUB(epochs=epochs, max_epochs=2, lr=lr, rewind=True, decay_epochs=())
            runtime = Runtime(seed=0, threads=1)
            view = View(problem, Request(label=(1,)), method.needs, runtime)
            outcome = method.run(view, runtime)
            assert all(bool(p.isfinite().all()) for p in outcome.runnable().parameters())
            errors, chosen = outcome.details["forget_errors"], outcome.details["rewound_to_epoch"]
            assert chosen is None if set(errors) == {None} else errors[chosen - 1] is not None
            seen += errors
    assert None in seen


# ------------------------------------------------------------------ retrain


def test_retrain_rebuilds_every_module_and_never_sees_the_forget_samples(digits):
    outcome = run(digits, Retrain())
    for (name, a), b in zip(
        outcome.model.named_parameters(), digits.model.parameters(), strict=True
    ):
        assert not torch.equal(a, b), name
    recipe = copy.copy(digits.recipe)
    spoiled = digits.train.fetch(digits.train.ids)
    forget = torch.isin(digits.train.ids, THREES.resolve(digits.train))
    spoiled.x[forget] = 9e9
    object.__setattr__(
        recipe, "data", type(digits.train)((spoiled.x, spoiled.y), ids=digits.train.ids)
    )
    again = recipe(digits.train.ids[~forget], Runtime(seed=0).seed_for("retrain"))
    assert states_equal(again, outcome.model)

"""BadTeacher: invariant 4 of the card baselines-vision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.general import bad_teacher
from expunge.methods.general.bad_teacher import BadTeacher, two_teachers
from expunge.problems.classification import Classification
from expunge.train.losses import kl_each

THREES = Request(label=(3,))


def run(problem, method, request=THREES):
    return unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1))


@pytest.fixture
def view(digits):
    return View(digits, THREES, BadTeacher().needs, Runtime(seed=0))


@pytest.fixture
def teachers(view):
    return view.original(), view.fresh("teacher").requires_grad_(False)


def test_baselines_vision_invariant_4_without_forget_data_nothing_happens(view, teachers):
    loss, student = two_teachers(view, *teachers, 1.0), view.model()
    batch = next(view.retain.batches(64))
    value = loss(student, batch)
    assert float(value.detach()) == 0
    value.backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-6


def test_baselines_vision_invariant_4_each_side_has_its_teacher(view, teachers):
    good, bad = teachers
    loss = two_teachers(view, good, bad, 2.0)
    forget, retain = next(view.forget.batches(5)), next(view.retain.batches(7))
    student = view.fresh("student")
    with torch.no_grad():
        wanted = [
            kl_each(view.logits(t, b), view.logits(student, b), 2.0) / 4
            for t, b in ((bad, forget), (good, retain))
        ]
        got = loss(student, forget.joined(retain))
    torch.testing.assert_close(got, torch.cat(wanted).mean())
    assert float((wanted[0].mean() - wanted[1].mean()).abs()) > 1e-3


def test_baselines_vision_invariant_4_teachers_get_no_gradients(digits, monkeypatch):
    kept = []
    true = bad_teacher.two_teachers

    def spy(view, good, bad, temperature):
        kept.extend([good, bad])
        return true(view, good, bad, temperature)

    monkeypatch.setattr(bad_teacher, "two_teachers", spy)
    outcome = run(digits, BadTeacher(lr=1e-3, epochs=2))
    good, bad = kept
    assert all(p.grad is None and not p.requires_grad for m in kept for p in m.parameters())
    assert not good.training and not bad.training
    fresh = digits.fresh(Runtime(seed=0).seed_for("fresh", "teacher"))
    for teacher, source in ((good, digits.model), (bad, fresh)):
        for a, b in zip(teacher.parameters(), source.parameters(), strict=True):
            assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(outcome.model.parameters(), good.parameters(), strict=True)
    )


def test_baselines_vision_invariant_4_at_a_high_temperature_targets_are_uniform(view, teachers):
    """All targets are then 1/C: which teacher speaks makes no difference, nor does the student."""
    forget, retain = next(view.forget.batches(20)), next(view.retain.batches(20))
    student = view.fresh("student")
    values = [
        float(two_teachers(view, *teachers, t)(student, forget.joined(retain)).detach())
        for t in (1.0, 100.0, 1e4)
    ]
    assert values[0] > 1 and values[1] < 1e-2 and values[2] < 1e-6
    for teacher in teachers:
        share = (view.logits(teacher, forget) / 1e4).softmax(1)
        assert float((share - 0.1).abs().max()) < 1e-3


def test_bad_teacher_averages_over_samples(view, teachers):
    """`reduction="mean"` of the official code would divide by the ten classes too."""
    batch = next(view.forget.batches(16))
    good, bad = teachers
    with torch.no_grad():
        got = two_teachers(view, good, bad, 1.0)(good, batch)
        p, q = view.logits(bad, batch).log_softmax(1), view.logits(good, batch).log_softmax(1)
    torch.testing.assert_close(got, (p.exp() * (p - q)).sum() / 16)


def test_bad_teacher_trains_the_student_in_training_mode():
    modes = set()

    class Watched(nn.Linear):
        def forward(self, x):
            if self.weight.requires_grad and torch.is_grad_enabled():
                modes.add(self.training)
            return super().forward(x)

    torch.manual_seed(0)
    x, y = torch.rand(30, 5), torch.arange(30) % 3
    problem = Classification(Watched(5, 3).eval(), (x, y), build=lambda: Watched(5, 3))
    run(problem, BadTeacher(lr=0.1), Request(label=(1,)))
    assert modes == {True}


def test_bad_teacher_moves_running_statistics_with_one_forgotten_sample_in_a_batch():
    def build():
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    torch.manual_seed(0)
    problem = Classification(build().eval(), (torch.rand(32, 5), torch.arange(32) % 3), build=build)
    method = BadTeacher(lr=0.1, share=1.0, batch_size=8, epochs=2)
    outcome = run(problem, method, Request(ids=(7,)))
    assert int(outcome.model[1].num_batches_tracked) == 2 * 4


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_bad_teacher_rehearses_a_share_of_the_rest(digits, share):
    outcome = run(digits, BadTeacher(share=share, epochs=2))
    forget = len(THREES.resolve(digits.train))
    count = round(share * (len(digits.train) - forget))
    assert outcome.details["rehearsed"] == count
    assert outcome.cost.samples == outcome.cost.gradients == 2 * (forget + count)


def test_bad_teacher_on_one_sample_and_without_any_labels(digits):
    bare = copy.copy(digits)
    whole = digits.train.fetch(digits.train.ids)
    bare.train = type(digits.train)((whole.x, None), ids=digits.train.ids)
    bare._hashes = {}
    one = Request(ids=(int(digits.train.ids[0]),))
    with_labels, without = run(digits, BadTeacher(), one), run(bare, BadTeacher(), one)
    assert with_labels.record["weights"] == without.record["weights"]

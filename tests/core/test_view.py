"""The View lets through what was declared, and counts it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.core.data import Data
from expunge.core.errors import AccessError, NeedsError, RequestError
from expunge.core.needs import Needs
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.problems.classification import Classification

ALL = Needs(
    forget=True,
    retain=True,
    labels="all",
    validation=True,
    original=True,
    recipe=True,
    capabilities=frozenset({"logits", "features"}),
)


@pytest.fixture
def problem() -> Classification:
    torch.manual_seed(0)
    x = torch.randn(10, 4)
    retrained = []

    def recipe(keep_ids, seed):
        retrained.append((keep_ids.tolist(), seed))
        return nn.Linear(4, 2)

    recipe.seen = retrained
    recipe.epochs = 3
    return Classification(
        nn.Linear(4, 2),
        Data((x, [0, 1] * 5), ids=range(9, -1, -1)),
        valid=(x[:3], [0, 1, 0]),
        recipe=recipe,
    )


FORGOTTEN = Request(ids=(7, 2, 4))


def view(problem, runtime=None, **needs) -> View:
    return View(problem, FORGOTTEN, Needs(**needs), runtime or Runtime())


# each use of the view, and the needs without which it must be refused
USES = {
    "forget": (lambda v: v.forget, {"forget": False}),
    "retain": (lambda v: v.retain, {"retain": False}),
    "everything, no forget": (lambda v: v.everything, {"forget": False}),
    "everything, no retain": (lambda v: v.everything, {"retain": False}),
    "validation": (lambda v: v.validation, {"validation": False}),
    "original": (lambda v: v.original(), {"original": False}),
    "recipe": (lambda v: v.retrain(1), {"recipe": False}),
    "capability": (lambda v: v.capability("logits"), {"capabilities": frozenset({"features"})}),
    "logits": (
        lambda v: v.logits(v.model(), next(v.forget.batches(2))),
        {"capabilities": frozenset()},
    ),
    "labels of forget": (lambda v: v.forget.labels(), {"labels": "retain"}),
    "labels of retain": (lambda v: v.retain.labels(), {"labels": "forget"}),
    "labels of everything": (lambda v: v.everything.labels(), {"labels": "retain"}),
    "no labels": (lambda v: v.forget.labels(), {"labels": "none"}),
    "labelled loss": (
        lambda v: v.each_loss(v.model(), next(v.forget.batches(2))),
        {"labels": "retain"},
    ),
}


@pytest.mark.parametrize("use", USES)
def test_what_was_not_declared_is_refused(problem, use):
    from dataclasses import replace

    act, missing = USES[use]
    act(View(problem, FORGOTTEN, ALL, Runtime()))
    with pytest.raises(AccessError):
        act(View(problem, FORGOTTEN, replace(ALL, **missing), Runtime()))


def test_the_sides_hold_the_right_samples(problem):
    seen = View(problem, FORGOTTEN, ALL, Runtime())
    assert seen.forget.ids.tolist() == [2, 4, 7]
    assert seen.retain.ids.tolist() == [0, 1, 3, 5, 6, 8, 9]
    assert seen.everything.ids.tolist() == list(range(10))
    assert (seen.forget_count, seen.total_count) == (3, 10)
    assert len(seen.validation) == 3
    labels = dict(zip(problem.train.ids.tolist(), problem.train.labels.tolist(), strict=True))
    assert seen.forget.labels().tolist() == [labels[i] for i in (2, 4, 7)]


def test_labels_are_withheld_from_batches(problem):
    quiet = view(problem, forget=True, retain=True, labels="retain")
    assert all(b.y is None for b in quiet.forget.batches(2))
    assert all(b.y is not None for b in quiet.retain.batches(2))
    assert next(quiet.everything.batches(4)).y is None
    loud = view(problem, forget=True, retain=True, labels="all")
    assert next(loud.everything.batches(4)).y is not None


def test_every_sample_read_is_counted(problem):
    runtime = Runtime()
    seen = View(problem, FORGOTTEN, ALL, runtime)
    assert runtime.cost.samples == 0
    list(seen.forget.batches(2))
    assert runtime.cost.samples == 3
    batches = seen.retain.batches(4)
    next(batches)
    assert runtime.cost.samples == 3 + 4
    next(batches)
    assert runtime.cost.samples == 3 + 7
    seen.validation.fetch(torch.tensor([0, 0]))
    assert runtime.cost.samples == 3 + 7 + 2


def test_ids_of_the_other_side_are_refused(problem):
    runtime = Runtime()
    seen = View(problem, FORGOTTEN, ALL, runtime)
    for source, ids in ((seen.forget, [2, 3]), (seen.retain, [7]), (seen.validation, [9])):
        with pytest.raises(AccessError, match="not on this side"):
            source.fetch(torch.tensor(ids))
    assert runtime.cost.samples == 0


def test_the_recipe_is_given_the_retain_side_and_counted(problem):
    runtime = Runtime()
    View(problem, FORGOTTEN, Needs(recipe=True), runtime).retrain(5)
    assert problem.recipe.seen == [([0, 1, 3, 5, 6, 8, 9], 5)]
    assert runtime.cost.samples == runtime.cost.gradients == 3 * 7


def test_models_are_copies_and_the_teacher_is_frozen(problem):
    seen = View(problem, FORGOTTEN, ALL, Runtime())
    model, teacher = seen.model(), seen.original()
    with torch.no_grad():
        model.weight += 1
        assert torch.equal(teacher.weight, problem.model.weight)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_shuffled_passes_repeat_with_the_seed(problem):
    seen = View(problem, FORGOTTEN, ALL, Runtime(seed=2))

    def order(epoch):
        passes = seen.retain.batches(3, Runtime(seed=2).generator("retain", epoch))
        return [b.ids.tolist() for b in passes]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(i for ids in order(0) for i in ids) == seen.retain.ids.tolist()


def test_a_request_that_does_not_fit_fails_at_once(problem):
    with pytest.raises(RequestError):
        View(problem, Request(ids=(99,)), ALL, Runtime())


def test_classes_are_known_or_said_to_be_missing(problem):
    assert view(problem).classes == 2
    other = Problem.of(nn.Linear(1, 1), torch.zeros(12, 1), each_loss=lambda m, b: m(b.x)[:, 0])
    with pytest.raises(NeedsError, match="no classes"):
        _ = View(other, FORGOTTEN, Needs(), Runtime()).classes


def test_needs_in_words():
    words = ALL.words()
    assert words[:4] == ["forget data", "retain data", "validation data", "labels"]
    assert words[-2:] == ["features", "logits"]
    assert Needs(labels="forget", per_sample_grad=True, models=2).words() == [
        "forget labels",
        "per-sample gradients",
        "2 references",
    ]

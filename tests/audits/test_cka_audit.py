from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audits.cka import CKA, gram, groups, jackknife, linear_cka
from expunge.core.audit import Subject
from expunge.core.errors import ModelError
from expunge.core.method import unlearn
from expunge.core.problem import Problem
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.methods.general.finetune import FineTune
from expunge.problems.classification import Classification
from expunge.workloads.nets import SmallResNet

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(200, 12, generator=GENERATOR)


def cka(a, b):
    return linear_cka(gram(a), gram(b))


def by_feature_spaces(x, y):
    """Kornblith's formula as printed, in double precision, from cross-covariances."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_gram_form_equals_the_feature_form():
    y = X @ torch.randn(12, 40, generator=GENERATOR) + 0.5 * torch.randn(
        200, 40, generator=GENERATOR
    )
    assert cka(X, y) == pytest.approx(by_feature_spaces(X, y), abs=1e-6)


def test_identical_rotated_scaled_and_shifted_are_the_same():
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=GENERATOR))
    for other in (X, X @ rotation, 7.5 * X, X + 3.0):
        assert cka(X, other) == pytest.approx(1.0, abs=1e-5)
    stretched = X * torch.tensor([10.0] + [1.0] * 11)
    assert cka(X, stretched) < 0.7  # not invariant to any linear map


def test_independent_features_are_low_and_constant_ones_zero():
    assert cka(X, torch.randn(200, 12, generator=GENERATOR)) < 0.15
    assert cka(X, torch.ones(200, 3)) == 0.0


def test_jackknife_is_near_the_spread_over_fresh_samples():
    rng = torch.Generator().manual_seed(3)
    mix = torch.randn(6, 6, generator=rng)

    def draw():
        x = torch.randn(100, 6, generator=rng)
        return x, x @ mix + 2 * torch.randn(100, 6, generator=rng)

    pairs = [draw() for _ in range(60)]
    spread = np.std([cka(x, y) for x, y in pairs], ddof=1)
    errors = [jackknife([gram(x)], [[gram(y)]]) for x, y in pairs]
    assert np.mean(errors) == pytest.approx(spread, rel=0.4)


def test_layers_are_read_in_runs_of_bounded_width():
    assert groups({"a": 5, "b": 5, "c": 5, "d": 100, "e": 1}, 10) == [
        ["a", "b"],
        ["c"],
        ["d"],
        ["e"],
    ]
    assert groups({"a": 5}, 1) == [["a"]]


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def subjects():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(160, 8, generator=generator), torch.arange(160) % 3
    problem = Classification(net(0), (x, y))
    models = [problem.model, net(1), net(2), net(3)]
    return [Subject(m, problem, Request(label=1), Runtime()) for m in models]


def test_findings_by_hand(subjects, by_name):
    released, first, second = subjects[1], subjects[2], subjects[3]
    found = by_name(CKA().run(released, [first, second], Runtime()))
    assert list(found) == [
        "cka/original",
        "cka/reference",
        "cka/original-retain",
        "cka/reference-retain",
    ]
    problem = released.problem
    x = problem.train.fetch(released.splits["forget-train"]).x

    def layers(model):
        hidden = model[0](x)
        return hidden, model[2](hidden.relu())

    def compare(a, b):
        return [
            by_feature_spaces(p, q) for p, q in zip(layers(a.model), layers(b.model), strict=True)
        ]

    original = subjects[0]
    f = found["cka/original"]
    assert f.detail["layers"] == ["0", "2"]
    assert f.detail["values"] == pytest.approx(compare(released, original), abs=1e-5)
    theirs = np.array([compare(first, original), compare(second, original)])
    assert f.detail["reference_values"] == pytest.approx(theirs.mean(0), abs=1e-5)
    assert f.reference == pytest.approx(theirs.mean(), abs=1e-5)
    assert f.floor == pytest.approx(np.ptp(theirs.mean(1)), abs=1e-5)
    assert f.original == 1.0
    f = found["cka/reference"]
    mine = np.mean([compare(released, first), compare(released, second)], axis=0)
    assert f.detail["values"] == pytest.approx(mine, abs=1e-5)
    assert f.value == pytest.approx(mine.mean(), abs=1e-5)
    assert f.detail["reference_values"] == pytest.approx(compare(first, second), abs=1e-5)
    assert f.direction == "up"
    assert f.low < f.value < f.high


def test_the_original_is_itself(subjects, by_name):
    found = by_name(CKA().run(subjects[0], subjects[2:], Runtime()))
    assert found["cka/original"].value == pytest.approx(1.0)
    assert found["cka/reference"].value == pytest.approx(found["cka/reference"].original)


def test_comparator_invariant_5_what_is_frozen_stays_similar_after_training(by_name):
    """Running statistics are frozen with their layer; the published code lets them follow."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand(60, 1, 8, 8, generator=generator), torch.arange(60) % 3
    torch.manual_seed(0)
    problem = Classification(SmallResNet(classes=3, width=4), (x, y))
    shared = {"epochs": 3, "lr": 0.1, "batch_size": 20}
    similar = {}
    for train in ("last(1)", "full"):
        model = unlearn(problem, Request(label=1), FineTune(train=train, **shared)).runnable()
        subject = Subject(model, problem, Request(label=1), Runtime())
        found = by_name(CKA().run(subject, [], Runtime()))["cka/original"].detail
        similar[train] = dict(zip(found["layers"], found["values"], strict=True))
    head = similar["last(1)"].pop("head")
    frozen = list(similar["last(1)"].values())
    assert len(frozen) > 6 and frozen == pytest.approx([1.0] * len(frozen), abs=1e-6)
    assert head < 0.999
    assert min(similar["full"].values()) < 0.99


def test_splitting_the_layers_changes_nothing(subjects, monkeypatch):
    whole = CKA().run(subjects[1], subjects[2:], Runtime())
    for s in [*subjects, subjects[1].original()]:
        s.__dict__.pop("_grams", None)
    monkeypatch.setattr("expunge.audits.cka.HELD", 1)
    assert CKA().run(subjects[1], subjects[2:], Runtime()) == whole


def test_layers_and_samples_are_settings(subjects, by_name):
    found = by_name(CKA(layers=("2",), samples=20).run(subjects[1], subjects[2:], Runtime()))
    assert found["cka/original"].detail["layers"] == ["2"]
    with pytest.raises(ModelError, match="no layer 'nine'"):
        CKA(layers=("nine",)).run(subjects[1], [], Runtime())


def test_hooks_are_removed(subjects):
    CKA().run(subjects[1], subjects[2:], Runtime())
    with pytest.raises(ModelError):
        CKA(layers=("0", "nine")).run(subjects[1], subjects[2:], Runtime())
    for s in [*subjects, subjects[1].original()]:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in s.model.modules())


def test_reasons(subjects, by_name):
    found = by_name(CKA().run(subjects[1], [], Runtime()))
    assert found["cka/original"].value is not None
    assert found["cka/original"].reference is None
    assert found["cka/reference"].reason == "no retrained reference to compare with"
    one = by_name(CKA().run(subjects[1], subjects[2:3], Runtime()))["cka/reference"]
    assert one.value is not None
    assert one.reason == "one reference: the similarity among references is unknown"
    few = Subject(subjects[1].model, subjects[0].problem, Request(ids=(1, 2)), Runtime())
    found = by_name(CKA().run(few, [], Runtime()))
    assert "only 2 samples" in found["cka/original"].reason
    assert found["cka/original-retain"].value is not None
    broken = copy.deepcopy(subjects[1].model)
    broken[0].weight.data[0, 0] = torch.nan
    subject = Subject(broken, subjects[0].problem, Request(label=1), Runtime())
    found = by_name(CKA().run(subject, subjects[2:], Runtime()))
    assert {f.reason for f in found.values()} == {"a model gives NaN or infinite features"}


def test_features_may_come_as_functions(by_name):
    model = net(0)
    problem = Problem.of(
        model, (torch.randn(40, 8), torch.arange(40) % 2),
        each_loss=lambda m, b: m(b.x).square().sum(1),
        features=lambda m, b, layers: {"first": m[0](b.x)}, layers=lambda: ["first"],
    )  # fmt: skip
    subject = Subject(net(1), problem, Request(label=0), Runtime())
    found = by_name(CKA().run(subject, [], Runtime()))
    assert found["cka/original"].detail["layers"] == ["first"]

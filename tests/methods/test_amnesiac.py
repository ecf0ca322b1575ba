"""Amnesiac relabelling: invariant 2 of the card baselines-vision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge.core.errors import DataError
from expunge.core.method import unlearn
from expunge.core.request import Request
from expunge.core.runtime import Runtime
from expunge.core.view import View
from expunge.methods.general.amnesiac import Amnesiac, wrong_labels
from expunge.problems.classification import Classification

THREES = Request(label=(3,))


def view_of(problem, request, seed=0):
    return View(problem, request, Amnesiac().needs, Runtime(seed=seed))


def run(problem, method, request=THREES):
    return unlearn(problem, request, method, runtime=Runtime(seed=0, threads=1))


@pytest.mark.parametrize("request_", [THREES, Request(fraction=0.1, seed=3)], ids=str)
def test_baselines_vision_invariant_2_amnesiac_labels_are_wrong_and_stay(
    digits, request_, monkeypatch
):
    seen: list[tuple[int, int]] = []
    true = Classification.each_loss

    def spy(self, model, batch):
        seen.extend(zip(batch.ids.tolist(), batch.y.tolist(), strict=True))
        return true(self, model, batch)

    monkeypatch.setattr(Classification, "check", lambda self: None)
    monkeypatch.setattr(Classification, "each_loss", spy)
    run(digits, Amnesiac(epochs=3), request_)
    size = len(digits.train)
    assert len(seen) == 3 * size
    first, *rest = (dict(seen[k * size : (k + 1) * size]) for k in range(3))
    assert all(other == first for other in rest)
    labels = dict(zip(digits.train.ids.tolist(), digits.train.labels.tolist(), strict=True))
    forgotten = set(request_.resolve(digits.train).tolist())
    assert all((first[i] == y) == (i not in forgotten) for i, y in labels.items())
    together = {i for i, _ in seen[: len(forgotten)]}
    assert 0 < len(together & forgotten) < len(forgotten)  # shuffled among the rest


def test_baselines_vision_invariant_2_amnesiac_labels_are_uniform_on_the_wrong_ones(digits):
    from scipy.stats import chisquare

    for request in (THREES, Request(fraction=0.3, seed=5)):
        view = view_of(digits, request)
        away = []
        for seed in range(20):
            _, labels = wrong_labels(view, Runtime(seed=seed))
            away.append((labels - view.forget.labels()) % 10)
        counts = torch.cat(away).bincount(minlength=10)
        assert counts[0] == 0
        assert chisquare(counts[1:].numpy()).pvalue > 1e-3


def test_amnesiac_never_teaches_a_class_that_goes(digits):
    both = Request(label=(3, 5))
    _, labels = wrong_labels(view_of(digits, both), Runtime(seed=0))
    assert set(labels.tolist()) == set(range(10)) - {3, 5}
    mixed = Request(where="label == 3 or (label == 5 and id < 600)")
    view = view_of(digits, mixed)
    ids, labels = wrong_labels(view, Runtime(seed=0))
    true = view.forget.labels()
    assert set(true.tolist()) == {3, 5} and ids.tolist() == view.forget.ids.tolist()
    assert set(labels[true == 3].tolist()) == set(range(10)) - {3}  # fives stay a class
    assert set(labels[true == 5].tolist()) == set(range(10)) - {3, 5}


def test_amnesiac_keeps_no_training_history(digits):
    bare = copy.copy(digits)
    bare.recipe = None
    assert not Amnesiac().needs.recipe
    assert run(bare, Amnesiac()).record["weights"] == run(digits, Amnesiac()).record["weights"]


def test_amnesiac_on_a_single_sample_and_on_a_single_class(digits):
    one = Request(ids=(int(digits.train.ids[0]),))
    assert run(digits, Amnesiac(epochs=1), one).record["forgotten"] == 1
    x = torch.rand(6, 4)
    lone = Classification(nn.Linear(4, 1), (x, torch.zeros(6, dtype=torch.long)))
    with pytest.raises(DataError, match="only one class"):
        run(lone, Amnesiac(), Request(ids=(0, 1)))

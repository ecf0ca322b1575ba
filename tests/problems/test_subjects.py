"""problems/subjects.py: people on one side only, households that are divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge.core.data import Data
from expunge.core.errors import DataError, SettingError
from expunge.core.request import Request
from expunge.problems.subjects import CutWarning, disjoint, split_subjects

WHO = [f"p{i % 12}" for i in range(60)]


def data(**columns):
    random = torch.Generator().manual_seed(0)
    x = torch.rand(60, 2, generator=random)
    order = torch.randperm(60, generator=random)
    return Data((x, torch.arange(60) % 3), ids=100 + order, columns={"identity": WHO} | columns)


def people(part, ids=None):
    rows = slice(None) if ids is None else part.positions(ids).numpy()
    return set(part.columns["identity"][rows].tolist())


def sides(splits):
    forget = splits.request.resolve(splits.train)
    unseen = torch.from_numpy(splits.test.columns["unseen"] == 1)
    return [
        people(splits.train, forget), people(splits.train, splits.train.without(forget)),
        people(splits.test, splits.test.ids[~unseen]), people(splits.test, splits.test.ids[unseen]),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_everybody_is_on_one_side(seed):
    whole = data()
    splits = split_subjects(whole, forget=3, test=2, unseen=2, seed=seed)
    parts = sides(splits)
    assert [len(p) for p in parts] == [3, 5, 2, 2]
    assert set.union(*parts) == set(WHO) and sum(map(len, parts)) == 12
    assert splits.sizes() == {"forget": 15, "retain": 25, "test": 10, "unseen": 10}
    again = split_subjects(whole, forget=3, test=2, unseen=2, seed=seed)
    assert sides(again) == parts
    for part in (splits.train, splits.test):  # samples keep ids, labels and columns
        assert torch.equal(part.labels, whole.labels_of(part.ids))
        assert (part.columns["identity"] == whole.columns["identity"][whole.positions(part.ids)]).all()  # fmt: skip


def test_the_draw_depends_on_the_seed():
    found = {tuple(map(frozenset, sides(split_subjects(data(), forget=3, test=2, unseen=2, seed=s)))) for s in range(6)}  # fmt: skip
    assert len(found) == 6


def test_people_may_be_named():
    splits = split_subjects(data(), forget=["p3", "p11"], test=["p0"], unseen=3)
    assert sides(splits)[0] == {"p3", "p11"} and sides(splits)[2] == {"p0"}
    assert splits.request == Request(identity=("p11", "p3"))
    other = split_subjects(data(town=[int(w[1:]) % 6 for w in WHO]), column="town", forget=[2], test=1, unseen=1)  # fmt: skip
    assert other.request.where == "town in [2]"
    assert sides(other)[0] == {"p2", "p8"}
    used = split_subjects(data(user=[int(w[1:]) for w in WHO]), column="user", forget=[2], test=1, unseen=1)  # fmt: skip
    assert used.request == Request(user=2)


def test_a_divided_household_is_said():
    houses = [f"h{int(w[1:]) // 2}" for w in WHO]
    with pytest.warns(CutWarning, match=r"household \(h1\) is divided between forget and retain"):
        split_subjects(
            data(household=houses), forget=["p2"], test=["p4", "p5"], unseen=["p6", "p7"],
            group="household",
        )  # fmt: skip
    # whole households, and so no warning, which would be an error here
    split_subjects(data(household=houses), column="household", group="household", forget=1, test=1, unseen=1)  # fmt: skip


def test_what_cannot_be_split_is_said():
    def refused(match, error=SettingError, **sides):
        with pytest.raises(error, match=match):
            split_subjects(data(), **({"forget": 1, "test": 1, "unseen": 1} | sides))

    refused("nobody is left to retain", DataError, forget=10)
    refused("cannot be drawn", forget=13)
    refused("cannot be drawn", forget=-1)
    refused("at least one value", test=0)
    refused("nobody in the data has identity 'p77'", forget=["p77"])
    refused("'p1' is on two sides", forget=["p1"], test=["p1", "p2"])
    refused("no column 'person'", DataError, column="person")


def test_disjoint_names_who_is_on_two_sides():
    disjoint({"train": np.array(["a", "b"]), "test": np.array(["c"])}, "household")
    with pytest.raises(DataError, match="household b is in both train and unseen"):
        disjoint({"train": np.array(["a", "b"]), "test": np.array(["c"]), "unseen": np.array(["b"])}, "household")  # fmt: skip

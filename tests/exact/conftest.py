"""A sharded model that is trained once, and copies of it to delete from."""

from __future__ import annotations

import pytest
from sharded_world import problem_of, train

import expunge as xp


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Two shards of three slices in three orders; copy it with `save`, do not delete from it."""
    return train(tmp_path_factory.mktemp("trained") / "m", shards=2, slices=3, orders=3, epochs=2)


@pytest.fixture
def sharded(trained, tmp_path):
    return xp.Sharded.load(trained.save(tmp_path / "model"), problem_of())

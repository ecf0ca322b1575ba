"""A service with a fake model, in a folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

pytest.importorskip("dbos")

from expunge.service.service import Service

POLICY = """
[service]
database = "service.db"
poll_seconds = 0.05
per_second = 100000
burst = 100000
[models.fake]
kind = "custom"
deleter = "fakes:make"
[models.held]
kind = "custom"
deleter = "fakes:make"
hold = true
"""


@pytest.fixture
def policy(tmp_path):
    file = tmp_path / "service.toml"
    file.write_text(POLICY)
    return file


@pytest.fixture
def service(policy):
    made = Service(policy, patience=5)
    yield made
    made.close()

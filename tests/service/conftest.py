"""A service with a fake model, in a folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from policy_text import POLICY

sys.path.insert(0, str(Path(__file__).resolve().parent))

pytest.importorskip("dbos")

from expunge.service.service import Service


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

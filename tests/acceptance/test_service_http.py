"""The service over HTTP: load of 50 submitters, and a fuzzer with many examples. Needs an idle machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).resolve().parents[2]


def test_two_hundred_states_a_second_with_fifty_submitters():
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "service_load.py")], check=True)
    found = json.loads((ROOT / "benchmarks" / "results" / "service_load.json").read_text())
    assert found["clients"] == 50 and found["submitted"] >= 50
    assert found["errors"] == []
    assert found["status_per_second"] >= 200, found["load_before"]


def test_a_fuzzer_with_many_examples_finds_no_server_error():
    command = [sys.executable, "-m", "pytest", "-q", "tests/service/test_openapi.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"EXPUNGE_FUZZ": "200"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]

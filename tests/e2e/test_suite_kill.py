"""A suite killed in the middle goes on: nothing finished is run again, the table is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

SUITE = """
name = "kill me"
seeds = [0, 1]
references = 2
audits = ["accuracy", "divergence", "weight-distance"]
methods = ["finetune", "random-label", { name = "scrub", epochs = 4 }, "ssd"]

[[problem]]
workload = "digits-class"
requests = [{ label = 3 }, { label = 8 }]
"""


def command(*words: str, folder, **options):
    return [sys.executable, "-m", "expunge", *words], {"cwd": folder, "text": True, **options}


def run_json(*words: str, folder) -> dict:
    words, options = command(*words, "--json", folder=folder)
    done = subprocess.run(words, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def table(comparison: dict) -> list:
    """Everything but what depends on the clock, the memory, and where runs are stored."""
    rows = []
    for one in comparison["comparisons"]:
        for row in one["rows"]:
            findings = {k: v for k, v in row["findings"].items() if not k.startswith("cost/")}
            rows.append((
                one["request"],
                row["method"],
                row["seed"],
                row["cost"]["samples"],
                findings,
            ))
    return rows


@pytest.mark.parametrize("kill_after", [4, 9])
def test_killed_suite_resumes(tmp_path, kill_after):
    (tmp_path / "suite.toml").write_text(SUITE)
    words, options = command(
        "suite", "run", "suite.toml", "--store", "broken", "--threads", "1", folder=tmp_path
    )
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options
    )
    done: list[dict] = []
    deadline = time.monotonic() + 120
    while len(done) < kill_after and time.monotonic() < deadline:
        time.sleep(0.2)
        assert process.poll() is None, "the suite ended before it could be killed"
        done = finished(tmp_path / "broken")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(tmp_path / "broken")
    assert len(before) >= kill_after

    resumed = run_json("suite", "resume", "--store", "broken", "--threads", "1", folder=tmp_path)
    jobs = run_json("suite", "status", resumed["suite"], "--store", "broken", folder=tmp_path)
    ran = [job["run"] for job in jobs if job["status"] == "done"]
    assert len(ran) == len(set(ran)), "a job was run twice"
    first = {job["run"] for job in before}
    reused = {job["run"] for job in jobs if job["status"] == "reused"}
    assert first <= reused, "a finished job was not taken from the store"

    whole = run_json(
        "suite", "run", "suite.toml", "--store", "whole", "--threads", "1", folder=tmp_path
    )
    assert table(resumed) == table(whole)


def finished(store) -> list[dict]:
    from expunge.store import Store

    if not (store / "store.sqlite").exists():
        return []
    opened = Store.open(store)
    suites = opened.suites()
    return [j for j in opened.jobs(suites[0]["id"]) if j["status"] == "done"] if suites else []

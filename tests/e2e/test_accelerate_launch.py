"""The command line under `accelerate launch`: two processes give the model that one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

import expunge as xp

WORK = (
    "unlearn",
    "--workload",
    "digits-class",
    "--method",
    "scrub",
    "--label",
    "3",
    "--threads",
    "1",
)


def run(words, folder) -> str:
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", "")))
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "PATH": path}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_release_the_model_of_one(tmp_path):
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "expunge",
    ]  # fmt: skip
    out = run([*launch, *WORK, "--out", "two", "--store", "s2", "--json"], tmp_path)
    shown = json.loads(out)  # one document: the second process prints nothing
    one = run(
        [sys.executable, "-m", "expunge", *WORK, "--out", "one", "--store", "s1", "--json"],
        tmp_path,
    )
    cost = json.loads(one)["cost"]
    assert shown["cost"]["samples"] == cost["samples"]  # counted over both

    problem = xp.workloads.registry.get("digits-class").problem(0)
    two, single = (xp.load(tmp_path / name, model=problem.model) for name in ("two", "one"))
    assert two.record["runtime"]["processes"] == 2
    assert two.record["fingerprint"] == single.record["fingerprint"]  # the same original
    for a, b in zip(two.runnable().parameters(), single.runnable().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert two.record["weights"] != problem.model_hash()

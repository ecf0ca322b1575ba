"""`expunge forget-sets`, and `expunge tune` on such sets."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import expunge as xp
from expunge.cli.__main__ import app
from expunge.core.errors import UserError
from expunge.problems.forget_file import read_forget_file

BASE = ["forget-sets", "--workload", "digits-class", "--threads", "1", "--share", "0.05"]


def invoke(*words, store):
    return CliRunner().invoke(app, [*words, "--store", str(store)])


def test_table_files_and_json(tmp_path):
    words = [*BASE, "--methods", "finetune", "--draws", "1", "--search", "rounds=2", "--out", str(tmp_path / "out")]  # fmt: skip
    done = invoke(*words, store=tmp_path / "s")
    assert done.exit_code == 0, done.output
    assert "redundant" in done.stdout and "memorised" in done.stdout and "finetune:" in done.stdout
    again = invoke(*words, "--json", store=tmp_path / "s")
    found = json.loads(again.stdout)
    assert set(found) == {"sets", "summary", "sentences", "rows", "report", "requests"}
    assert {r["set"] for r in found["summary"]} == {"worst-case", "random", "high-el2n"}
    assert json.loads((tmp_path / "out" / "forget_sets.json").read_text()) == found
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"report.html", "forget_sets.svg", "forget_sets.md", "worst-case.csv", "random.csv", "high-el2n.csv"} <= names  # fmt: skip
    train = xp.workloads.registry.get("digits-class").data().train
    request = read_forget_file(tmp_path / "out" / "worst-case.csv")
    assert request.resolve(train).tolist() == found["requests"]["worst-case"][0]["ids"]
    assert len(request.ids) == 60


@pytest.mark.parametrize(
    "words",
    [
        ["--sets", "hardest"],
        ["--sets", "random,random"],
        ["--methods", "forgive"],
        ["--search", "pace=1"],
        ["--search", "lr=0"],
        ["--label", "3"],
        ["--share", "1.5"],
        ["--seeds", "one"],
    ],
)
def test_mistakes_are_the_users(words, tmp_path):
    assert isinstance(invoke(*BASE, *words, store=tmp_path / "s").exception, UserError)
    assert not (tmp_path / "s" / "blobs").exists() or words == ["--sets", "random,random"]


@pytest.mark.parametrize("name", ["worst-case", "high-el2n"])
def test_tuning_on_a_tail_keeps_apart_from_what_is_reported(name, tmp_path):
    done = invoke(
        "tune", "--workload", "digits-class", "--method", "finetune", "--forget-tuning", f"{name}=0.05",
        "--trials", "1", "--references", "1", "--threads", "1", "--json", store=tmp_path,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    tuned = json.loads(done.stdout)["tuning"][0]
    train = xp.workloads.registry.get("digits-class").data().train
    ids = xp.Request.from_dict(tuned).resolve(train)
    assert len(ids) == 60 and not bool((train.labels_of(ids) == 3).any())
    assert "tail" in tuned["reason"]


@pytest.mark.parametrize("words", ["worst-case=much", "worst-case=0.95", "hardest=0.1"])
def test_bad_tails_to_tune_on(words, tmp_path):
    done = invoke(
        "tune", "--workload", "digits-class", "--method", "finetune", "--forget-tuning", words,
        "--trials", "1", "--threads", "1", store=tmp_path,
    )  # fmt: skip
    assert isinstance(done.exception, UserError)

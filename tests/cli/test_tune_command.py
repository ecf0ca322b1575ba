"""`expunge tune`: words into requests and ranges, output, and complaints."""

from __future__ import annotations

import json
import tomllib

import pytest
from typer.testing import CliRunner

from expunge.cli.__main__ import app
from expunge.cli.tune import _range
from expunge.core.errors import SettingError, UserError

BASE = ["tune", "--workload", "digits-class", "--method", "finetune"]


def invoke(*words, store):
    return CliRunner().invoke(app, [*BASE, *words, "--store", str(store), "--threads", "1"])


def test_json_and_toml(tmp_path):
    words = ["--forget-tuning", "label=7,1", "--trials", "2", "--references", "1", "--space", "lr=0.05..0.5:log"]  # fmt: skip
    done = invoke(*words, "--json", store=tmp_path)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"run", "method", "value", "began_with", "tuning", "reported", "unseen", "budget", "space", "trials"}  # fmt: skip
    assert found["tuning"][0]["label"] == [7, 1] and found["reported"]["label"] == [3]
    assert found["method"]["name"] == "finetune" and len(found["trials"]) == 2
    assert found["space"]["lr"] == {"low": 0.05, "high": 0.5, "log": True, "whole": False}
    again = invoke(*words, "--out", str(tmp_path / "t.toml"), store=tmp_path)
    assert again.exit_code == 0 and "distance" in again.stdout
    methods = tomllib.loads((tmp_path / "t.toml").read_text())["methods"]
    assert methods == [found["method"]]


@pytest.mark.parametrize(
    "words",
    [
        ["--forget-tuning", "label=3", "--trials", "1"],  # what is reported
        ["--forget-tuning", "label=7", "--trials", "1", "--label", "7"],
        ["--forget-tuning", "label=7"],  # no budget
        ["--forget-tuning", "7", "--trials", "1"],
        ["--forget-tuning", "label=seven", "--trials", "1"],
        ["--forget-tuning", "label=7", "--trials", "1", "--space", "lr"],
        ["--forget-tuning", "label=7", "--trials", "1", "--space", "rate=1,2"],
        ["--forget-tuning", "label=7", "--trials", "1", "--out", "tuned.yaml"],
    ],
)
def test_mistakes_are_the_users(words, tmp_path):
    assert isinstance(invoke(*words, store=tmp_path / "s").exception, UserError)


def test_ranges_and_choices():
    assert _range("lr=1e-4..0.1:log") == ("lr", (1e-4, 0.1, "log"))
    assert _range("max-epochs=1..9") == ("max_epochs", (1, 9))
    assert _range("alpha=1,2.5,auto") == ("alpha", [1, 2.5, "auto"])
    for bad in ("lr=", "lr=a..b", "lr=1..2:up", "=1"):
        with pytest.raises(SettingError):
            _range(bad)

"""`expunge audit MODEL --against PROBLEM`."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors.torch import save_file

from expunge.cli.__main__ import main
from expunge.workloads.nets import digits_mlp


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


@pytest.fixture
def asked(tmp_path):
    save_file(digits_mlp().state_dict(), tmp_path / "w.safetensors")
    return [
        "audit", str(tmp_path / "w.safetensors"), "--audits", "accuracy", "--references", "0",
        "--store", str(tmp_path / "store"), "--json",
    ]  # fmt: skip


def test_a_file_against_a_workload(asked, monkeypatch, capsys):
    assert run(monkeypatch, *asked, "--against", "digits-class", "--label", "3") == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert found["accuracy/retain-test"]["value"] < 0.4  # untrained
    assert found["accuracy/retain-test"]["original"] > 0.9


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--workload", "digits-class"], "--against"),
        (["--against", "digits-class", "--workload", "digits-class"], "leave --workload"),
        (["--against", "no-such-model", "--label", "1"], "--data"),
        ([], "no run"),
    ],
)
def test_bad_questions_are_one_line(asked, more, why, monkeypatch, capsys):
    assert run(monkeypatch, *asked, *more) == 2
    said = capsys.readouterr().err
    assert why in said and "Traceback" not in said

"""`--strata` of compare and audit: findings by difficulty, and complaints before any work."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import expunge as xp
from expunge.cli.__main__ import app
from expunge.core.errors import NeedsError, SettingError

PARTS = {f"accuracy/forget-train@{part}" for part in ("easy", "medium", "hard")}


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def test_compare_then_audit_with_another_score(tmp_path):
    common = ["--references", "1", "--audits", "accuracy", "--store", str(tmp_path / "s"), "--threads", "1", "--json"]  # fmt: skip
    words = ["--workload", "digits-class", "--methods", "finetune", "--fraction", "0.2"]
    done = invoke("compare", *words, "--strata", "el2n", "--out", str(tmp_path / "out"), *common)
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)["comparisons"]
    assert "el2n" in one["strata"]["about"]
    rows = {row["method"]: row for row in one["rows"]}
    assert all(set(row["findings"]) >= PARTS for row in rows.values())

    run = rows["finetune"]["run"]
    plain = invoke("audit", run, *common)
    assert not PARTS & set(json.loads(plain.stdout)["findings"])
    same, other = (invoke("audit", run, "--strata", s, *common) for s in ("el2n", "grand"))
    assert other.exit_code == 0, other.output
    same, other = (json.loads(found.stdout)["findings"] for found in (same, other))
    name = "accuracy/forget-train@hard"
    assert same[name]["value"] == rows["finetune"]["findings"][name]["value"]
    assert set(other) == set(same) and any(other[n] != same[n] for n in PARTS)
    assert len(xp.Store.open(tmp_path / "s").runs(kind="difficulty")) == 2


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["compare", "--workload", "digits-class", "--methods", "ssd", "--strata", "hard"], SettingError, "el2n|grand|forgetting"),
        (["compare", "--workload", "diabetes-range", "--methods", "finetune", "--strata", "el2n"], NeedsError, "use grand"),
        (["audit", "01", "--strata", "hard"], SettingError, "el2n|grand|forgetting"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_loaded(tmp_path, words, error, says):
    done = invoke(*words, "--store", str(tmp_path / "s"))
    assert isinstance(done.exception, error)
    assert says in str(done.exception)
    assert not (tmp_path / "s").exists()

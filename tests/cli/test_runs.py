import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from expunge.cli.runs import app
from expunge.core.audit import Finding
from expunge.core.errors import StoreError, UserError
from expunge.store import Store


def record(alpha):
    return {
        "problem": "[bold]digits",
        "request": {"label": [3], "time": str(alpha)},
        "method": {"name": "ssd", "passed": {"alpha": alpha}, "in_force": {"alpha": alpha}},
        "runtime": {"seed": 4},
        "weights": "ab" * 32,
        "curve": [{"loss": 0.5}],
    }


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "s")


@pytest.fixture
def ids(store):
    original = store.put_run(
        kind="original", key="o", record={"problem": "[bold]digits"}, tensors={"w": torch.zeros(3)}
    )
    a, b = (
        store.put_run(kind="unlearn", key=str(x), record=record(x), parents=[original])
        for x in (10.0, 20.0)
    )
    finding = Finding("mia/auc", 0.625, low=0.5, high=0.75, reference=0.5, per_sample={"s": np.ones(2)})  # fmt: skip
    audit = store.put_findings(a, [finding], key="f")
    return {"original": original, "a": a, "b": b, "audit": audit}


@pytest.fixture
def run(store):
    def call(*words):
        result = CliRunner().invoke(app, [*words, "--store", str(store.folder)])
        if result.exception is not None:
            raise result.exception
        return result.stdout

    return call


def test_list_shows_whole_ids_newest_first_and_narrows(run, ids):
    lines = run("list").splitlines()
    order = [next(n for n, i in ids.items() if i in line) for line in lines if "01" in line[:2]]
    assert order == ["audit", "b", "a", "original"]
    assert "[bold]digits" in run("list", "--kind", "original")
    assert ids["a"] not in run("list", "--kind", "original")
    assert ids["a"] not in run("list", "--method", "ssd", "--limit", "1")


def test_list_as_json(run, ids):
    listed = json.loads(run("list", "--json", "--kind", "unlearn"))
    assert [r["id"] for r in listed] == [ids["b"], ids["a"]]
    assert listed[0]["parents"] == [ids["original"]]
    assert (listed[0]["method"], listed[0]["seed"], listed[0]["problem"]) == ("ssd", 4, "[bold]digits")  # fmt: skip


def test_an_empty_store_lists_nothing(run, store):
    assert run("list").strip() == "no runs"
    assert json.loads(run("list", "--json")) == []
    assert run("gc").strip() == "nothing to remove"
    assert not store.folder.exists()


def test_show_prints_record_parents_and_findings(run, ids):
    text = run("show", ids["a"])
    for part in (ids["a"], '"alpha": 10.0', ids["original"], ids["audit"], "mia/auc", "0.625"):
        assert part in text
    assert "findings of audit" not in run("show", ids["b"])
    assert "mia/auc" in run("show", ids["audit"])
    shown = json.loads(run("show", ids["a"], "--json"))
    assert shown["record"] == record(10.0)
    (finding,) = shown["findings"][ids["audit"]]
    assert (finding["value"], finding["high"], finding["arrays"]) == (0.625, 0.75, ["s"])


def test_diff_names_the_one_setting(run, ids):
    assert json.loads(run("diff", ids["a"], ids["b"], "--json")) == [
        {"path": "method.alpha", "a": 10.0, "b": 20.0}
    ]
    text = run("diff", ids["a"], ids["b"])
    assert "method.alpha" in text
    assert "request" not in text
    assert run("diff", ids["a"], ids["a"], "--results").strip() == "no difference"


def test_export_and_import_move_runs_to_another_store(run, ids, store, tmp_path):
    file = tmp_path / "x.tar"
    assert str(file) in run("export", ids["audit"], "-o", str(file))
    with pytest.raises(UserError, match="--force"):
        run("export", ids["audit"], "-o", str(file))
    run("export", ids["audit"], "-o", str(file), "--force")

    def other(*words):
        return CliRunner().invoke(app, [*words, "--store", str(tmp_path / "t")]).stdout

    added = json.loads(other("import", str(file), "--json"))
    assert set(added) == {ids["audit"], ids["a"], ids["original"]}
    assert "nothing new" in other("import", str(file))
    assert Store.open(tmp_path / "t").findings(ids["audit"]) == store.findings(ids["audit"])


def test_gc_says_what_it_removes(run, ids, store):
    orphan = store._blobs.put({"w": torch.ones(7)})
    assert orphan in run("gc", "--dry-run")
    assert orphan in json.loads(run("gc", "--json"))[0]
    assert run("gc").strip() == "nothing to remove"
    assert torch.equal(store.tensors(ids["original"])["w"], torch.zeros(3))


def test_an_unknown_run_is_an_error_for_the_main_entry(run, ids):
    with pytest.raises(StoreError, match="begins with 'zzz'"):
        run("show", "zzz")


def test_the_program_itself_says_it_in_one_line_with_exit_code_2(store):
    command = [sys.executable, "-m", "expunge.cli", "runs", "show", "zzz", "--store"]
    done = subprocess.run([*command, str(store.folder)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "zzz" in done.stderr

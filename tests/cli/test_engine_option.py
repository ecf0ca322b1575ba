"""`--engine`, and what `runs show` says of a fleet."""

from __future__ import annotations

import json
import sys

import pytest

import expunge as xp
from expunge.cli.__main__ import main
from expunge.fleet.jobs import random_halves
from expunge.fleet.train import train_fleet
from expunge.store import Store

COMPARE = ["compare", "--workload", "digits-class", "--methods", "original", "--audits", "accuracy"]


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["expunge", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def test_references_are_trained_by_the_engine(tmp_path, monkeypatch):
    store = str(tmp_path / "store")
    words = [
        *COMPARE,
        "--references",
        "2",
        "--store",
        store,
        "--out",
        str(tmp_path / "r"),
        "--json",
    ]
    assert run(monkeypatch, *words, "--engine", "together") == 0
    found = Store.open(store).runs(kind="reference")
    assert [r.record["engine"] for r in found] == ["together", "together"]
    assert run(monkeypatch, *words) == 0  # the engine is in no key
    assert len(Store.open(store).runs(kind="reference")) == 2


@pytest.mark.parametrize(
    ("engine", "says"), [("loop", "is not a choice"), ("ray", "expunge[ray]")], ids=str
)
def test_an_engine_that_is_not_there_is_said_before_any_work(
    tmp_path, monkeypatch, capsys, engine, says
):
    monkeypatch.setitem(sys.modules, "ray", None)
    store = tmp_path / "store"
    assert run(monkeypatch, *COMPARE, "--store", str(store), "--engine", engine) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and not store.exists()


def test_a_fleet_is_shown_with_its_jobs(tmp_path, monkeypatch, capsys, digits):
    store = Store.open(tmp_path / "store")
    jobs = random_halves(digits, 3)
    fleet = train_fleet(digits, jobs, store, xp.Runtime(engine="together"))
    words = ["runs", "show", fleet.run, "--store", str(store.folder)]
    assert run(monkeypatch, *words) == 0
    assert "jobs (3 of 3 done)" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [job["run"] for job in shown["jobs"]] == list(fleet.runs)

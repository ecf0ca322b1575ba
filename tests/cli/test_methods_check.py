"""`expunge methods check pkg.Class` on somebody else's class: a good one passes, bad ones are caught."""

from __future__ import annotations

import json
import sys

import pytest

from expunge.cli.__main__ import main

THEIRS = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

import expunge as xp


@dataclass(frozen=True)
class Push(xp.Method):
    """Push the logits of the classes to forget down."""

    name: ClassVar[str] = "push"
    card: ClassVar[xp.Card] = xp.Card(
        title="Pushing", authors="A. Nother", year=2026, link="https://example.org", idea="push logits down"
    )
    by: float = xp.setting(30.0, "what is taken off the bias")

    @property
    def needs(self) -> xp.Needs:
        return xp.Needs(forget=True, labels="forget")

    def run(self, view, runtime):
        model = view.model()
        classes = {c for b in view.forget.batches(64) for c in b.y.tolist()}
        last = model.get_submodule(view.role("last layer")[0])
        with torch.no_grad():
            for c in classes:
                last.bias[c] -= self.by
        return xp.Outcome(model)


@dataclass(frozen=True)
class Idle(Push):
    """Do nothing and say so to nobody."""

    name: ClassVar[str] = "idle"

    def run(self, view, runtime):
        return xp.Outcome(view.model())


@dataclass(frozen=True)
class Peek(Push):
    """Read retain data without declaring it."""

    name: ClassVar[str] = "peek"

    def run(self, view, runtime):
        for _ in view.retain.batches(64):
            pass
        return super().run(view, runtime)


@dataclass(frozen=True)
class Dice(Push):
    """Draw from a source that no seed reaches."""

    name: ClassVar[str] = "dice"

    def run(self, view, runtime):
        import os

        outcome = super().run(view, runtime)
        with torch.no_grad():
            next(outcome.model.parameters()).view(-1)[0] += int.from_bytes(os.urandom(2), "big") / 1e4
        return outcome


@dataclass(frozen=True)
class Vandal(Push):
    """Change the original."""

    name: ClassVar[str] = "vandal"

    def run(self, view, runtime):
        with torch.no_grad():
            next(view._problem.model.parameters()).view(-1)[0] += 1e-3
        return super().run(view, runtime)
'''


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("theirs", None)


def check(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["expunge", "methods", "check", name, "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    results = {r["name"]: (r["state"], r["note"]) for r in json.loads(out)} if out else {}
    return stop.value.code, results, err


def test_a_good_third_party_method_passes(capsys, monkeypatch):
    code, results, err = check("theirs.Push", capsys, monkeypatch)
    assert code == 0, (results, err)
    assert {s for s, _ in results.values()} <= {"pass", "skip"}
    assert sum(s == "pass" for s, _ in results.values()) >= 8


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("theirs.Idle", "changes weights"),
        ("theirs.Peek", "changes weights"),
        ("theirs.Dice", "repeats with the seed"),
        ("theirs.Vandal", "leaves the problem alone"),
    ],
)
def test_a_bad_one_is_caught(name, fails, capsys, monkeypatch):
    from expunge.suite import checks

    code, results, err = check(name, capsys, monkeypatch)
    checks.problem_for.cache_clear()  # the vandal changed it
    assert code == 1
    assert results[fails][0] == "fail", results
    assert fails in err


def test_what_is_not_there_is_exit_2(capsys, monkeypatch):
    code, _, err = check("theirs.Nothing", capsys, monkeypatch)
    assert code == 2
    assert "cannot be imported" in err

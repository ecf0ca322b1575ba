"""The block of options that commands on a problem and a request share."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import expunge as xp
from expunge.cli.__main__ import app
from expunge.cli.options import Inputs, with_inputs
from expunge.cli.reference import commands
from expunge.core.errors import NeedsError, RequestError, SettingError, UserError

SHARING = ("unlearn", "compare", "suggest", "tune")
ENOUGH = {
    "unlearn": ["--method", "finetune"],
    "compare": ["--methods", "finetune"],
    "suggest": [],
    "tune": ["--method", "finetune", "--forget-tuning", "label=7", "--trials", "1"],
}


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize("name", SHARING)
def test_every_command_has_every_shared_option_once_with_its_help(name):
    parameters = commands()[f"expunge {name}"].params
    names = [p.name for p in parameters]
    assert len(set(names)) == len(names)
    shared = [p for p in parameters if p.name in {f.name for f in fields(Inputs)}]
    assert [p.name for p in shared] == [f.name for f in fields(Inputs)]
    assert all(p.help for p in shared) and not any(p.required for p in shared)
    assert "inputs" not in names


def test_options_arrive_with_those_of_the_command():
    seen = []

    @with_inputs
    def look(
        first: str,
        second: Annotated[int, typer.Option("--second")] = 2,
        *,
        inputs: Inputs,
        third: Annotated[int, typer.Option("--third")] = 3,
    ) -> None:
        """Look."""
        seen.append((first, second, third, inputs))

    look("a", workload="w", third=4)
    assert seen.pop() == ("a", 2, 4, Inputs(workload="w"))
    one = typer.Typer()
    one.command()(look)
    words = ["b", "--second", "5", "--label", "1", "--label", "8", "--prune", "omp:0.5", "--json"]
    assert CliRunner().invoke(one, words).exit_code == 0
    first, second, third, inputs = seen.pop()
    assert (first, second, third) == ("b", 5, 3)
    assert inputs.label == [1, 8] and inputs.prune == "omp:0.5" and inputs.as_json
    assert look.__doc__ == "Look."
    with pytest.raises(TypeError):
        look("a", nonsense=1)


def test_a_command_must_leave_room_for_them():
    def without(method: str) -> None: ...

    def twice(model: str, *, inputs: Inputs) -> None: ...

    with pytest.raises(TypeError, match="without takes no inputs"):
        with_inputs(without)
    with pytest.raises(TypeError, match="twice has options of the shared names model"):
        with_inputs(twice)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["--workload", "digits-class", "--prune", "omp"], SettingError, "use omp"),
        (["--workload", "digits-class", "--prune", "omp:1.5"], SettingError, "rate"),
        (["--workload", "digits"], UserError, "digits-class"),
        (["--workload", "digits-class", "--label", "1", "--ids", "2"], RequestError, "exactly one"),
        (["--label", "1"], UserError, "either --workload"),
        (["--model", "m", "--label", "1"], UserError, "needs --data"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(tmp_path, monkeypatch, name, words, error, says):  # fmt: skip
    monkeypatch.setattr("expunge.workloads.base.Workload.problem", None)
    done = invoke(name, *ENOUGH[name], *words, "--store", str(tmp_path / "s"))
    assert isinstance(done.exception, error)
    assert says in str(done.exception)
    assert not (tmp_path / "s").exists()


def test_suggest_and_tune_prune_first(tmp_path):
    common = ["--workload", "digits-class", "--prune", "omp:0.5", "--store", str(tmp_path), "--threads", "1", "--json"]  # fmt: skip
    found = invoke("suggest", *common)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["problem"] == "digits-class (omp:0.5)"
    tuned = invoke("tune", *ENOUGH["tune"], "--references", "1", *common)
    assert tuned.exit_code == 0, tuned.output
    store = xp.Store.open(tmp_path)
    record = store.get(json.loads(tuned.stdout)["run"])
    assert record.record["problem"] == "digits-class (omp:0.5)"
    assert store.get(record.parents[0]).record["fingerprint"]["mask"]


def test_a_model_without_a_recipe_cannot_be_pruned(monkeypatch, tmp_path):
    import torch

    problem = xp.Classification(torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.arange(8) % 2))
    monkeypatch.setattr("expunge.problems.data_on_disk.problem_from_disk", lambda *a, **k: problem)
    words = ["--model", "m", "--data", "d", "--label", "1", "--prune", "omp:0.5"]
    monkeypatch.setattr("expunge.cli.options.request_from", lambda *a, **k: xp.forget(label=1))
    done = invoke("suggest", *words, "--store", str(tmp_path / "s"))
    assert isinstance(done.exception, NeedsError) and "recipe" in str(done.exception)

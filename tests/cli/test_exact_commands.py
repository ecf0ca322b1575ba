"""`expunge exact`: a life from training to retraining, and sentences for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import expunge as xp
from expunge.cli.__main__ import app
from expunge.core.errors import ExpungeError, UserError
from expunge.core.hashing import hash_model
from expunge.workloads import registry
from expunge.workloads.base import original_of

HERE = Path(__file__).resolve().parents[1] / "exact"
PROBLEM = ["--problem", "sharded_world:problem_of"]
QUICK = ["--shards", "2", "--slices", "2", "--orders", "2", "--adapter", "lora(2)", "--set", "epochs=1"]  # fmt: skip


def invoke(*words, code=0):
    done = CliRunner().invoke(app, ["exact", *map(str, words)])
    if code is not None:
        assert done.exit_code == code, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        folder = tmp_path_factory.mktemp("exact") / "m"
        invoke("train", folder, *PROBLEM, *QUICK)
        yield folder


@pytest.fixture
def folder(trained, tmp_path):
    return xp.Sharded.load(trained).save(tmp_path / "m")


def slice_of(folder, shard, piece):
    index = xp.Sharded.load(folder)._now.index
    return [int(i) for i in index.ids[(index.shard == shard) & (index.piece == piece)]]


def test_from_plan_to_retraining(folder):
    before = json.loads(invoke("status", folder, "--json").stdout)
    assert [sorted(s) for s in before["served"]] == [[0, 1], [0, 1]] and before["samples"] == 48
    first, last = before["served"][0]
    one = slice_of(folder, 0, last)[0]
    planned = json.loads(invoke("plan", folder, "--ids", one, "--json").stdout)
    assert planned["ids"] == [one] and planned["off"] == {"0": [[last], [0, 1], [1, 0]]}
    assert json.loads(invoke("status", folder, "--json").stdout) == before  # nothing was changed
    said = invoke("forget", folder, "--ids", one).stdout
    assert "3 stages switched off" in said and "0-1" in said and before["weights"] in said
    after = json.loads(invoke("status", folder, "--json").stdout)
    assert after["served"] == [[first], before["served"][1]]
    assert after["weights"] in said and after["deleted"] == 1
    assert "nothing changed" in invoke("forget", folder, "--ids", one).stdout
    both = f"{slice_of(folder, 0, first)[0]},{one}"
    again = json.loads(invoke("forget", folder, "--ids", both, "--json").stdout)
    assert again["plan"]["dies"] == [0] and again["plan"]["already"] == [one]
    assert "shard 0: dead" in invoke("status", folder).stdout
    made = json.loads(invoke("retrain", folder, *PROBLEM, "--json").stdout)
    assert made["dead"] == [] and made["samples"] == 46
    assert "every file" in invoke("verify", folder).stdout


def test_other_requests_need_the_problem(folder):
    found = json.loads(invoke("plan", folder, "--label", "0", *PROBLEM, "--json").stdout)
    assert len(found["ids"]) > 1
    error = invoke("plan", folder, "--label", "0", code=1).exception
    assert isinstance(error, UserError) and "load the model with its problem" in str(error)
    assert isinstance(invoke("retrain", folder, code=1).exception, UserError)


def test_unknown_ids_stop_a_deletion_unless_they_are_skipped(folder):
    one = slice_of(folder, 1, 0)[0]
    asked = ["--ids", f"{one},987654"]
    assert "unknown: 987654" in invoke("plan", folder, *asked).stdout
    error = invoke("forget", folder, *asked, code=1).exception
    assert isinstance(error, UserError) and "nothing was deleted" in str(error)
    assert xp.Sharded.load(folder).status().deleted == 0
    said = invoke("forget", folder, "--ids", "987654", "--skip-unknown").stdout
    assert "none of it is in the model; nothing changed" in said and "before;" not in said
    done = json.loads(invoke("forget", folder, *asked, "--skip-unknown", "--json").stdout)
    assert done["plan"]["ids"] == [one] and done["changed"]


def test_verify_says_which_file_was_altered(folder):
    stage = min(xp.Sharded.load(folder)._now.alive)
    path = folder / "stages" / f"{stage}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    done = invoke("verify", folder, code=1)
    assert "was altered" in done.stdout and stage in done.stdout and "is refused" in done.stdout
    found = json.loads(invoke("verify", folder, "--json", code=1).stdout)
    assert not found["ok"] and len(found["faults"]) == 1


def test_a_workload_is_found_again_by_its_name(tmp_path):
    words = ["--workload", "digits-class", *QUICK, "--orders", "1", "--set", "blocks=all", "--json"]
    made = json.loads(invoke("train", tmp_path / "m", *words).stdout)
    assert made["exact"] and made["settings"]["start"] == "fresh" and made["stages"] == 4
    assert 0 < made["test_accuracy"] < 1 and made["status"]["samples"] > 1000
    found = json.loads(invoke("plan", tmp_path / "m", "--where", "label == 3", "--json").stdout)
    assert len(found["ids"]) > 50 and found["unknown"] == []
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert manifest["problem"]["source"] == {"kind": "workload", "workload": "digits-class"}
    problem = registry.get("digits-class").untrained()
    sharded = xp.Sharded.load(tmp_path / "m", problem)
    request = xp.forget(ids=found["ids"][:1])
    saved = sharded.outcome(request, sharded.forget(request)).save(tmp_path / "outcome")
    x = problem.test.fetch(problem.test.ids).x
    for given in (None, registry.get("digits-class").untrained().model):
        assert torch.equal(xp.load(saved, model=given).runnable()(x), sharded.predict(x))


def test_an_untrained_workload_is_the_same_each_time():
    workload = registry.get("digits-class")
    torch.manual_seed(1)
    one, state = workload.untrained(), torch.random.get_rng_state()
    torch.manual_seed(2)
    again, other = workload.untrained(), workload.untrained(seed=1)
    assert hash_model(one.model) == hash_model(again.model) != hash_model(other.model)
    assert hash_model(original_of(other.source)) == hash_model(other.model)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # and the caller's chance is left alone


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "F"], "training needs data"),
        (["train", "F", *PROBLEM, "--workload", "digits-class"], "name one of"),
        (["train", "F", *PROBLEM, "--data", "x.npz"], "go with --model"),
        (["train", "F", "--model", "x"], "--model needs --data"),
        (["train", "F", "--problem", "nowhere:at_all"], "cannot be imported"),
        (["train", "F", "--problem", "builtins:dict"], "neither a problem"),
        (["train", "F", *PROBLEM, "--set", "pace=1"], "no setting 'pace'"),
        (["train", "F", *PROBLEM, "--shards", "2", "--set", "shards=3"], "given twice"),
        (["train", "F", *PROBLEM, "--fitted", "tokenizer"], "--fitted takes"),
        (["train", "F", *PROBLEM, "--accept", "luck"], "there is no 'luck'"),
        (["train", "M", *PROBLEM, *QUICK], "holds a sharded model"),
        (["train", "F", "--workload", "digits-class", *QUICK, "--set", "start=model"], "backbone"),
        (["plan", "M"], "exactly one of"),
        (["plan", "M", "--ids", "1", "--label", "0"], "exactly one of"),
        (["plan", "F", "--ids", "1"], "holds no sharded model"),
        (["plan", "M", "--label", "0", "--workload", "digits-class"], "architecture|backbone"),
        (["status", "F"], "holds no sharded model"),
        (["retrain", "M", "--shards", "one"], "takes numbers"),
        (["retrain", "M", *PROBLEM, "--shards", "7"], "numbered 0 to 1"),
    ],
)
def test_mistakes_are_sentences(trained, tmp_path, words, part):
    named = {"F": tmp_path / "f", "M": trained}
    error = invoke(*(named.get(w, w) for w in words), code=1).exception
    assert isinstance(error, ExpungeError), repr(error)
    assert any(p in str(error) for p in part.split("|")), str(error)

"""Exact deletions through the service: versions share files, certificates name what was switched off."""

from __future__ import annotations

import shutil

import pytest
import small_problem
from stepping import step_until_done

import expunge as xp
from expunge.report.certificate import statement_of, verify
from expunge.report.keys import KeySet
from expunge.service.service import Service


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "model"
    small_problem.train(folder)
    return folder


@pytest.fixture
def made(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "model")
    file = tmp_path / "service.toml"

    def opened(more=""):
        file.write_text(small_problem.policy("model", more=more))
        return Service(file, patience=5)

    return opened


def submit(service, **form):
    row = service.submit("small", xp.forget(**form))[0]
    step_until_done(service)
    return service.get(row["id"])


def test_a_deletion_equals_that_of_the_model_itself(made, tmp_path, trained):
    service = made()
    alone = xp.Sharded.load(trained, small_problem.problem()).save(tmp_path / "alone")
    alone = xp.Sharded.load(alone, small_problem.problem())
    row = submit(service, ids=[5, 6, 7])
    done = alone.forget([5, 6, 7])
    assert row["state"] == "released"
    current = service.current("small")
    assert current["weights"] == done.weights_after
    predicate = statement_of(row["certificate"])["predicate"]
    assert predicate["class"] == "exact"
    assert predicate["exact"]["before"] == done.weights_before
    assert predicate["exact"]["after"] == done.weights_after
    shards = {e["shard"] for e in predicate["exact"]["switchedOff"]}
    assert shards == set(done.plan.off)
    assert row["plan"]["seconds"] == 0 and "ids" not in row["plan"]
    folder = service.current_folder(current)
    assert service.deleter("small").verify(folder) == []
    verdict = verify(row["certificate"], KeySet.read(service.keys), folder)
    assert verdict.ok, verdict.sentences
    x = small_problem.data().fetch(small_problem.data().ids[:9]).x
    module = service.deleter("small").predictor(folder)
    assert (module(x) == alone.predict(x)).all()
    service.close()


def test_what_was_deleted_before_the_service_began_names_the_folder_in_force(made, tmp_path):
    model = tmp_path / "model"
    xp.Sharded.load(model).forget([1])
    service = made()
    row = submit(service, ids=[1])
    assert row["result"] == {"outcome": "already-deleted", "version": 0}
    keys = KeySet.read(service.keys)
    verdict = verify(row["certificate"], keys, model)
    assert verdict.ok, verdict.sentences
    stage = next((model / "stages").glob("*.safetensors"))
    stage.write_bytes(stage.read_bytes() + b"x")
    assert not verify(row["certificate"], keys, model).ok
    service.close()


def test_superseded_adapters_are_erased_everywhere(made, tmp_path):
    service = made()
    submit(service, ids=[1])
    submit(service, ids=[2])
    versions = [p for p in service.versions("small").iterdir() if p.is_dir()]
    assert [p.name for p in versions] == [service.current("small")["folder"]]
    here = {p.name for p in (versions[0] / "stages").iterdir()}
    there = {p.name for p in (tmp_path / "model" / "stages").iterdir()}
    assert here == there  # the dead stages of the folder that was trained are gone too
    origin = xp.Sharded.load(tmp_path / "model", small_problem.problem())
    assert origin.status().deleted == 2 and origin.verify() == []
    service.close()


def test_what_cannot_be_done_is_told_apart(made):
    service = made()
    answers = {
        "unknown": submit(service, ids=[1, 777_777]),
        "word": submit(service, ids=["nobody"]),
        "all": submit(service, ids=list(range(600))),
        "label": submit(service, label=77),
        "condition": submit(service, where="secret_column == 5"),
        "user": submit(service, user="user-99"),
    }
    assert {k: v["state"] for k, v in answers.items()} == dict.fromkeys(answers, "rejected")
    said = {k: v["error"] for k, v in answers.items()}
    assert said["unknown"] == "1 of the 2 samples it names are unknown"
    assert "all the data that is left" in said["all"] and "label" in said["label"]
    assert "no column" in said["condition"]
    assert "none of the users" in said["user"]
    by_user = submit(service, user="user-7")
    assert by_user["state"] == "released" and by_user["count"] == 12
    again = submit(service, ids=[7, 57])
    assert again["state"] == "released" and again["result"]["outcome"] == "already-deleted"
    assert verify(again["certificate"], KeySet.read(service.keys)).ok
    from expunge.service import ledger

    with service.database.engine.connect() as connection:
        ends = {e.request: e.kind for e in ledger.entries(connection) if e.kind in ("rejected", "released")}  # fmt: skip
    assert all(ends[v["id"]] == v["state"] for v in [*answers.values(), by_user, again])
    assert ledger.verify(service.database.engine) == []
    service.close()


def test_when_no_shard_is_left_they_are_trained_anew(made):
    service = made()
    held = service.deleter("small")._open(None)
    # one sample of each slice of each shard
    index, ids = held._now.index, []
    for shard in range(3):
        for piece in range(4):
            ids.append(int(index.ids[(index.shard == shard) & (index.piece == piece)][0]))
    row = submit(service, ids=ids)
    assert row["state"] == "released", row["error"]
    exact = statement_of(row["certificate"])["predicate"]["exact"]
    assert exact["retrained"] == [0, 1, 2]
    assert (
        exact["died"] == [] and exact["collateral"] == 0
    )  # they serve again, with all that is left
    folder = service.current_folder(service.current("small"))
    assert held.__class__.load(folder, small_problem.problem()).status().dead == ()
    service.close()


def test_audits_may_hold_a_release_back(made):
    service = made('audits = ["accuracy"]\nlimits = { "accuracy/retain-test" = { low = 1.01 } }')
    row = submit(service, ids=[3])
    assert row["state"] == "rejected" and "below 1.01" in row["error"]
    assert service.current("small") is None
    assert not [p for p in service.versions("small").iterdir() if p.is_dir()]
    service.close()

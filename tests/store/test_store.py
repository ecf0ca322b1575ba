import gc as garbage
import math
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from expunge.core.audit import Finding
from expunge.core.errors import StoreError
from expunge.core.hashing import hash_tensors
from expunge.store import Store
from expunge.store import store as module

RECORD = {
    "problem": "digits",
    "method": {"name": "ssd", "passed": {"alpha": 10.0}, "in_force": {"alpha": 10.0}},
    "runtime": {"device": "cpu", "seed": 7},
    "weights": "ab" * 32,
    "cost": {"seconds": 0.25},
    "curve": [{"step": 1, "loss": 0.5}],
}


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "evidence")


def tensors_of_all_kinds():
    shared = torch.arange(6.0)
    return {
        "float": torch.randn(2, 3),
        "half": torch.randn(4).half(),
        "bfloat": torch.randn(4).bfloat16(),
        "int": torch.tensor([[1, -2]]),
        "bool": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "strided": torch.randn(4, 5).T,
        "tied a": shared,
        "tied b": shared[1:],
        "grad": torch.ones(2, requires_grad=True),
        "nan": torch.tensor([math.nan, math.inf]),
    }


def put(store, key, **more):
    return store.put_run(**({"kind": "unlearn", "key": key, "record": RECORD} | more))


def test_nothing_is_written_before_the_first_entry(store):
    assert store.runs() == []
    assert store.find("unlearn", "k") is None
    assert store.suites() == []
    assert store.gc() == []
    with pytest.raises(StoreError, match="begins with '0'"):
        store.get("0")
    with pytest.raises(StoreError):
        put(store, "k", parents=["0" * 26])
    assert not store.folder.exists()


def test_the_folder_is_given_or_from_the_environment_or_beside_the_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPUNGE_STORE", raising=False)
    assert Store.open().folder == tmp_path / ".expunge"
    monkeypatch.setenv("EXPUNGE_STORE", str(tmp_path / "elsewhere"))
    assert Store.open().folder == tmp_path / "elsewhere"
    assert Store.open(tmp_path / "given").folder == tmp_path / "given"


def test_a_run_comes_back_as_it_was_put_from_another_object(store):
    tensors = tensors_of_all_kinds()
    original = store.put_run(kind="original", key="o", record={"problem": "digits"})
    run_id = put(store, "k", tensors=tensors, parents=[original])

    run = Store.open(store.folder).get(run_id)
    assert (run.id, run.kind, run.key, run.status) == (run_id, "unlearn", "k", "done")
    assert (run.problem, run.method, run.seed, run.weights) == ("digits", "ssd", 7, "ab" * 32)
    assert run.record == RECORD
    assert run.parents == (original,)

    back = Store.open(store.folder).tensors(run_id)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
    assert hash_tensors(back) == hash_tensors(tensors)


def test_a_blob_is_a_plain_safetensors_file_under_its_content_hash(store):
    tensors = {"w": torch.arange(4.0)}
    put(store, "a", tensors=tensors)
    put(store, "b", tensors=tensors)
    digest = hash_tensors(tensors)
    found = [str(p.relative_to(store.folder)) for p in store.folder.glob("blobs/**/*.*")]
    assert found == [f"blobs/{digest[:2]}/{digest}.safetensors"]
    assert torch.equal(load_file(store.folder / found[0])["w"], tensors["w"])


def test_a_run_without_tensors_has_none(store):
    assert store.tensors(put(store, "k")) == {}
    assert not (store.folder / "blobs").exists()


def test_a_finished_run_is_neither_repeated_nor_changed(store):
    first = put(store, "k", tensors={"w": torch.zeros(2)})
    again = put(store, "k", record={"problem": "other"}, tensors={"w": torch.ones(2)})
    assert again == first
    assert len(store.runs()) == 1
    assert store.get(first).record == RECORD
    assert torch.equal(store.tensors(first)["w"], torch.zeros(2))
    assert put(store, "k", kind="reference") != first


def test_a_failed_run_is_kept_but_not_taken_for_a_result(store):
    failed = put(store, "k", status="failed")
    assert store.find("unlearn", "k") is None
    done = put(store, "k")
    assert done != failed
    assert store.find("unlearn", "k").id == done
    assert [r.status for r in store.runs()] == ["done", "failed"]


def test_runs_are_listed_newest_first_and_by_their_columns(store):
    ids = [put(store, str(i), record={**RECORD, "problem": f"p{i % 2}"}) for i in range(6)]
    assert [r.id for r in store.runs()] == ids[::-1]
    assert [r.id for r in store.runs(problem="p1", limit=2)] == [ids[5], ids[3]]
    assert store.runs(method="ssd", kind="unlearn", limit=1)[0].id == ids[5]
    assert store.runs(method="scrub") == []
    assert store.runs(kind="audit") == []


def test_listed_runs_keep_their_parents_in_order(store):
    a, b, c = (put(store, k) for k in "abc")
    child = put(store, "child", parents=[c, a, b])
    listed = {r.id: r.parents for r in store.runs()}
    assert listed == {a: (), b: (), c: (), child: (c, a, b)}
    assert [r.parents for r in store.runs(limit=1)] == [(c, a, b)]


def test_a_unique_prefix_is_enough_and_an_ambiguous_one_names_its_candidates(store, monkeypatch):
    names = iter(["01aaaaaaaaaaaaaaaaaaaaaaaa", "01aaaaaaaabbbbbbbbbbbbbbbb", "01b" + "0" * 23])
    monkeypatch.setattr(module, "new_id", lambda: next(names))
    ids = [put(store, k) for k in "abc"]
    assert store.get("01b").id == ids[2]
    assert store.get("01AAAAAAAAB").id == ids[1]
    assert store.get(ids[0]).id == ids[0]
    with pytest.raises(StoreError, match="several") as caught:
        store.get("01a")
    assert ids[0] in str(caught.value)
    assert ids[1] in str(caught.value)
    assert ids[2] not in str(caught.value)
    for nothing in ("", " ", "%", "01_", "zz"):
        with pytest.raises(StoreError):
            store.get(nothing)


def test_a_parent_must_be_there(store):
    put(store, "a")
    with pytest.raises(StoreError, match="to be a parent"):
        put(store, "b", parents=["0" * 26], tensors={"w": torch.zeros(1)})
    assert len(store.runs()) == 1
    assert not (store.folder / "blobs").exists()


def test_a_record_without_a_json_form_is_refused(store):
    with pytest.raises(StoreError, match="record"):
        put(store, "a", record={"model": torch.nn.Linear(1, 1)})
    with pytest.raises(StoreError):
        put(store, "", record={})
    assert not store.folder.exists()


def test_a_seed_beyond_64_bits_stays_in_the_record(store):
    run = put(store, "k", record={"runtime": {"seed": 2**70}})
    assert store.get(run).seed == 2**70


def test_findings_come_back_with_their_arrays(store):
    original, run = put(store, "o", kind="original"), put(store, "k")
    references = [put(store, f"r{i}", kind="reference") for i in range(2)]
    findings = [
        Finding(
            "mia/auc", 0.5625, "down", 0.5, math.inf, 0.53, 0.01, 0.9,
            per_sample={
                "score": np.array([0.25, -1.0], dtype=">f4"),
                "member": np.array([True, False]),
                "ids": np.arange(6)[::-2],
                "one": np.array(3, dtype=np.int16),
            },
            detail={"curve": np.array([[0.0, 0.5]]), "n": 2},
        ),
        Finding("mia/gap", None, reason="no retrained reference to compare with"),
        Finding("mia/gap", math.nan, per_sample={"score": np.zeros(0)}),
        Finding("mia/gap", np.float32(0.5), per_sample={"score": np.ones(1)}),
    ]  # fmt: skip
    audit = store.put_findings(run, findings, key="a", parents=references)

    back = Store.open(store.folder).findings(audit)
    assert [f.name for f in back] == [f.name for f in findings]
    assert back[0] == Finding(
        "mia/auc", 0.5625, "down", 0.5, math.inf, 0.53, 0.01, 0.9,
        detail={"curve": [[0.0, 0.5]], "n": 2},
    )  # fmt: skip
    assert back[1] == findings[1]
    assert (back[2].value, back[2].reason) == (None, "the value is not a number")
    assert back[3].value == 0.5
    for old, new in zip(findings, back, strict=True):
        assert set(new.per_sample) == set(old.per_sample)
        for name, array in old.per_sample.items():
            assert new.per_sample[name].dtype == array.dtype.newbyteorder("=")
            np.testing.assert_array_equal(new.per_sample[name], array)

    entry = store.get(audit)
    assert entry.kind == "audit"
    assert entry.parents == (run, *references)
    assert (entry.problem, entry.method, entry.seed) == ("digits", "ssd", 7)
    assert entry.record["findings"][0]["value"] == 0.5625
    assert store.audits(run) == [entry]
    assert store.audits(references[0]) == store.audits(original) == []
    assert store.put_findings(run, [], key="a") == audit
    assert store.findings(run) == []


def test_findings_of_unknown_runs_and_of_words_are_refused(store):
    with pytest.raises(StoreError):
        store.put_findings("0" * 26, [], key="a")
    run = put(store, "k")
    words = Finding("mia/x", 1.0, per_sample={"names": np.array(["a"])})
    with pytest.raises(StoreError, match="mia/x/names"):
        store.put_findings(run, [words], key="a")
    assert [r.id for r in store.runs()] == [run]


def test_the_log_of_a_suite_only_grows(store):
    run = put(store, "k")
    suite = store.start_suite("small", {"methods": ["ssd"], "seeds": (0, 1)})
    other = store.start_suite("other", {})
    store.log_job(suite, "j1", "started", None)
    store.log_job(other, "x", "started", None)
    store.log_job(suite, "j1", "done", run)
    store.log_job(suite, "j1", "skipped", run)
    log = store.jobs(suite)
    assert [(j["key"], j["status"], j["run"]) for j in log] == [
        ("j1", "started", None),
        ("j1", "done", run),
        ("j1", "skipped", run),
    ]
    assert [j["time"] for j in log] == sorted(j["time"] for j in log)
    assert [s["id"] for s in store.suites()] == [other, suite]
    assert store.suite(suite)["spec"] == {"methods": ["ssd"], "seeds": [0, 1]}
    assert store.suite(suite)["name"] == "small"
    with pytest.raises(StoreError, match="no suite"):
        store.jobs(run)
    with pytest.raises(StoreError, match="no run"):
        store.log_job(suite, "j2", "done", suite)


def test_a_temporary_store_goes_with_its_object():
    store = Store.temporary()
    run = put(store, "k", tensors={"w": torch.zeros(2)})
    folder = store.folder
    assert store.get(run).key == "k"
    del store
    garbage.collect()
    assert not folder.exists()


def test_gc_removes_only_what_no_run_refers_to(store):
    kept = put(store, "k", tensors={"w": torch.zeros(2)})
    blobs = store.folder / "blobs"
    orphan = store._blobs.put({"w": torch.ones(2)})
    (store.folder / "tmp").mkdir(exist_ok=True)
    (store.folder / "tmp" / "left.safetensors").write_bytes(b"half a bl")
    strangers = [blobs / "notes.txt", blobs / "ab" / "mine.safetensors", store.folder / "README"]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("keep me")

    expected = [f"blobs/{orphan[:2]}/{orphan}.safetensors", "tmp/left.safetensors"]
    assert store.gc(dry_run=True) == expected
    assert store._blobs.path(orphan).exists()
    assert store.gc() == expected
    assert store.gc() == []
    assert not store._blobs.path(orphan).exists()
    assert all(s.exists() for s in strangers)
    assert torch.equal(store.tensors(kept)["w"], torch.zeros(2))


def test_gc_does_not_take_blobs_that_lost_their_database_for_garbage(store):
    put(store, "k", tensors={"w": torch.zeros(2)})
    os.remove(store.folder / "store.sqlite")
    with pytest.raises(StoreError, match=r"put store\.sqlite back"):
        store.gc()
    assert len(list(store.folder.glob("blobs/*/*"))) == 1

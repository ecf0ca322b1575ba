import hashlib
import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch

from expunge.core.audit import Finding
from expunge.core.errors import ExpungeError, StoreError
from expunge.store import Store

GRAPH = {"problem": "digits", "runtime": {"seed": 1}, "note": "ü ☃ \x00 \U0001f600"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An original, a reference, an unlearned model and its audit; and a run apart."""
    store = Store.open(tmp_path_factory.mktemp("source"))
    apart = store.put_run(kind="original", key="x", record={}, tensors={"w": torch.ones(9)})
    original = store.put_run(kind="original", key="o", record=GRAPH, tensors={"w": torch.zeros(3)})
    reference = store.put_run(kind="reference", key="r", record=GRAPH, tensors={"w": torch.ones(3)})
    run = store.put_run(
        kind="unlearn", key="u", record=GRAPH, tensors={"w": torch.zeros(3)}, parents=[original]
    )
    findings = [
        Finding("a/b", 0.1, high=math.inf, per_sample={"s": np.arange(4.0)}, detail={"n": 1}),
        Finding("a/c", None, "up", low=-math.inf, reason="none"),
    ]
    audit = store.put_findings(run, findings, key="f", parents=[reference])
    return store, {"o": original, "r": reference, "u": run, "f": audit, "apart": apart}


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "out.tar"
    source[0].export([source[1]["f"]], path)
    return path.read_bytes()


@pytest.fixture
def tar(exported, tmp_path):
    (tmp_path / "out.tar").write_bytes(exported)
    return tmp_path / "out.tar"


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def write_tar(path, content, change=None):
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if change:
                change(info)
            tar.addfile(info, io.BytesIO(data))


def rewritten(path, edit):
    """Write the export again after an edit of its parts, with a manifest that fits them."""
    content = members(path)
    edit(content)
    sums = {n[5:-5]: hashlib.sha256(d).hexdigest() for n, d in content.items() if n[:5] == "runs/"}
    content["expunge-runs.json"] = json.dumps({"format": 1, "runs": sums}).encode()
    write_tar(path, content)


def edited_run(path, run, **values):
    def edit(content):
        entry = json.loads(content[f"runs/{run}.json"])
        content[f"runs/{run}.json"] = json.dumps(entry | values).encode()

    rewritten(path, edit)


def refused(path, tmp_path, match):
    target = Store.open(tmp_path / "target")
    with pytest.raises(StoreError, match=match) as caught:
        target.import_(path)
    assert "\n" not in str(caught.value)
    assert not target.folder.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.tar"]


def test_an_export_holds_all_ancestors_and_nothing_else(source, tar, tmp_path):
    store, ids = source
    target = Store.open(tmp_path / "target")
    assert set(target.import_(tar)) == {ids[k] for k in "oruf"}
    assert [r.id for r in target.runs()] == [r.id for r in store.runs() if r.id != ids["apart"]]
    for name in "oruf":
        assert target.get(ids[name]) == store.get(ids[name])
        for key, tensor in store.tensors(ids[name]).items():
            assert torch.equal(target.tensors(ids[name])[key], tensor)
    assert target.findings(ids["f"]) == store.findings(ids["f"])
    np.testing.assert_array_equal(target.findings(ids["f"])[0].per_sample["s"], np.arange(4.0))
    assert target.gc() == []
    assert target.import_(tar) == []


def test_the_same_runs_give_the_same_bytes(source, tar, tmp_path):
    store, ids = source
    store.export([ids["u"], ids["f"], ids["o"]], tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == tar.read_bytes()
    target = Store.open(tmp_path / "target")
    target.import_(tar)
    target.export([ids["f"][:-1]], tmp_path / "third.tar")
    assert (tmp_path / "third.tar").read_bytes() == tar.read_bytes()
    with tarfile.open(tar) as opened:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in opened} == {(0, 0, "", 0o644)}


def test_runs_of_one_key_made_in_two_places_are_both_kept(source, tar, tmp_path):
    _, ids = source
    target = Store.open(tmp_path / "target")
    own = target.put_run(kind="original", key="o", record={"own": True})
    target.import_(tar)
    assert target.get(ids["u"]).parents == (ids["o"],)
    assert target.find("original", "o").id == min(own, ids["o"])
    assert target.put_run(kind="original", key="o", record={}) == min(own, ids["o"])


def test_an_import_on_top_of_a_part_adds_the_rest(source, tar, tmp_path):
    store, ids = source
    target = Store.open(tmp_path / "target")
    store.export([ids["u"]], tmp_path / "part.tar")
    assert set(target.import_(tmp_path / "part.tar")) == {ids["o"], ids["u"]}
    assert set(target.import_(tar)) == {ids["r"], ids["f"]}


def test_a_run_that_contradicts_the_store_is_refused_as_a_whole(source, tar, tmp_path):
    store, ids = source
    target = Store.open(tmp_path / "target")
    store.export([ids["u"]], tmp_path / "part.tar")
    target.import_(tmp_path / "part.tar")
    edited_run(tar, ids["u"], record={"better": True})
    with pytest.raises(StoreError, match="another content"):
        target.import_(tar)
    assert {r.id for r in target.runs()} == {ids["o"], ids["u"]}
    assert target.get(ids["u"]).record == GRAPH


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "/evil.json",
        "runs/../../evil.json",
        "blobs/../../evil.safetensors",
        "./runs/" + "0" * 26 + ".json",
        "runs/" + "0" * 26 + ".json/",
        "store.sqlite",
        "blobs/" + "a" * 64 + ".pt",
        "blobs/" + "A" * 64 + ".safetensors",
    ],
)
def test_members_of_any_other_name_are_refused(tar, tmp_path, name):
    write_tar(tar, members(tar) | {name: b"{}"})
    refused(tar, tmp_path, "no export contains")
    assert not (tmp_path.parent / "evil.json").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_links_devices_and_folders_are_refused(tar, tmp_path, kind):
    content = members(tar)
    blob = next(n for n in content if n.startswith("blobs/"))
    del content[blob]

    with tarfile.open(tar, "w") as out:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo(blob)
        link.type, link.linkname = kind, "/etc/passwd"
        out.addfile(link)
    refused(tar, tmp_path, "not a plain file")


def test_a_member_that_comes_twice_is_refused(tar, tmp_path):
    content = members(tar)
    name = next(n for n in content if n.startswith("runs/"))
    with tarfile.open(tar, "a") as out:
        info = tarfile.TarInfo(name)
        info.size = 2
        out.addfile(info, io.BytesIO(b"{}"))
    refused(tar, tmp_path, "twice")


def test_an_altered_blob_is_refused(tar, tmp_path):
    content = members(tar)
    name = next(n for n in content if n.startswith("blobs/"))
    content[name] = content[name][:-1] + bytes([content[name][-1] ^ 1])
    write_tar(tar, content)
    refused(tar, tmp_path, "altered")


def test_a_blob_that_is_a_pickle_is_refused(tar, tmp_path):
    content = members(tar)
    name = next(n for n in content if n.startswith("blobs/"))
    pickled = io.BytesIO()
    torch.save({"w": torch.zeros(3)}, pickled)
    write_tar(tar, content | {name: pickled.getvalue()})
    refused(tar, tmp_path, "truncated or altered")


def test_a_missing_and_a_superfluous_blob_are_refused(tar, tmp_path):
    content = members(tar)
    name = next(n for n in content if n.startswith("blobs/"))
    write_tar(tar, {k: v for k, v in content.items() if k != name})
    refused(tar, tmp_path, "blobs it holds")
    write_tar(tar, content | {"blobs/" + "a" * 64 + ".safetensors": content[name]})
    refused(tar, tmp_path, "blobs it holds")


def test_an_altered_record_is_refused(source, tar, tmp_path):
    content = members(tar)
    name = f"runs/{source[1]['u']}.json"
    write_tar(tar, content | {name: content[name].replace(b'"seed": 1', b'"seed": 2')})
    refused(tar, tmp_path, "record of run .* was altered")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"id": NaN}',
        b"[" * 100_000,
        b"1" * 10_000,
        b"null",
        b"[]",
        b"{}",
    ],
)
def test_bad_json_is_refused(source, tar, tmp_path, text):
    rewritten(tar, lambda content: content.update({f"runs/{source[1]['u']}.json": text}))
    refused(tar, tmp_path, "JSON|malformed")
    write_tar(tar, members(tar) | {"expunge-runs.json": text})
    refused(tar, tmp_path, "JSON|format|runs it lists")


@pytest.mark.parametrize(
    "values",
    [
        {"id": "0" * 26},
        {"id": "../../x"},
        {"kind": ""},
        {"kind": None},
        {"key": 7},
        {"key": "\ud800"},
        {"status": ["done"]},
        {"record": []},
        {"record": {"problem": "\ud800"}},
        {"parents": "abc"},
        {"parents": ["nobody"]},
        {"parents": None},
        {"blob": "../../../etc/passwd"},
        {"blob": 1},
        {"findings": [{"name": "x"}]},
        {"findings": 3},
    ],
)
def test_malformed_runs_are_refused(source, tar, tmp_path, values):
    edited_run(tar, source[1]["u"], **values)
    refused(tar, tmp_path, "malformed|calls itself")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("direction", "sideways"),
        ("value", "many"),
        ("low", [1]),
        ("detail", "x"),
        ("arrays", {"s": "gone"}),
        ("arrays", {"s": 3}),
        ("name", None),
        ("reason", 5),
    ],
)
def test_malformed_findings_are_refused(source, tar, tmp_path, field, value):
    audit = source[1]["f"]
    findings = json.loads(members(tar)[f"runs/{audit}.json"])["findings"]
    findings[0][field] = value
    edited_run(tar, audit, findings=findings)
    refused(tar, tmp_path, "malformed|arrays of the findings")


def test_a_run_that_is_its_own_ancestor_is_refused(source, tar, tmp_path):
    _, ids = source
    edited_run(tar, ids["o"], parents=[ids["f"]])
    refused(tar, tmp_path, "own ancestor")


def test_a_missing_ancestor_is_refused(source, tar, tmp_path):
    _, ids = source
    rewritten(tar, lambda content: content.pop(f"runs/{ids['r']}.json") and content.pop(
        next(n for n in content if n.startswith("blobs/") and n[6:70] == source[0].get(ids["r"]).blob)
    ))  # fmt: skip
    refused(tar, tmp_path, "ancestor .* is missing")


def test_a_newer_format_is_refused(tar, tmp_path):
    content = members(tar)
    manifest = json.loads(content["expunge-runs.json"]) | {"format": 2}
    write_tar(tar, content | {"expunge-runs.json": json.dumps(manifest).encode()})
    refused(tar, tmp_path, "format 1")


@pytest.mark.parametrize("keep", [0, 1, 511, 700, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(tar, tmp_path, keep):
    content = tar.read_bytes()
    used = len(content.rstrip(b"\0"))
    tar.write_bytes(content[: int(keep * used) if isinstance(keep, float) else keep])
    refused(tar, tmp_path, "out.tar")


def test_a_compressed_or_absent_file_is_refused(tar, tmp_path):
    import gzip

    tar.write_bytes(gzip.compress(tar.read_bytes()))
    refused(tar, tmp_path, "not a readable export")
    with pytest.raises(StoreError, match="cannot read"):
        Store.open(tmp_path / "target").import_(tmp_path / "nothing.tar")
    with pytest.raises(StoreError, match="cannot read"):
        Store.open(tmp_path / "target").import_(tmp_path)


def test_a_member_that_claims_more_than_the_file_holds_is_refused(tar, tmp_path):
    with tarfile.open(tar, "w") as out:
        info = tarfile.TarInfo("expunge-runs.json")
        info.size = 2**50
        out.fileobj.write(info.tobuf())
    refused(tar, tmp_path, "truncated|readable")


def test_an_export_names_what_it_cannot_do(source, tmp_path):
    store, ids = source
    with pytest.raises(StoreError, match="at least one"):
        store.export([], tmp_path / "x.tar")
    with pytest.raises(StoreError, match="no run"):
        store.export(["zzz"], tmp_path / "x.tar")
    with pytest.raises(ExpungeError, match="cannot write") as caught:
        store.export([ids["o"]], tmp_path / "no" / "such" / "x.tar")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []

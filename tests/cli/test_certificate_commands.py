"""`expunge certificate` and `expunge ledger`: from a stored run to a verified certificate."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from expunge.cli.__main__ import app
from expunge.core.audit import Finding
from expunge.core.errors import StoreError, UserError
from expunge.core.hashing import hash_tensors
from expunge.core.outcome import load
from expunge.store import Store

pytest.importorskip("cryptography")
pytest.importorskip("rfc8785")
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from dataclasses import asdict

from certificate_data import evidence

from expunge.service import ledger

TENSORS = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2)}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A store with an audited run, its weights on disk, a ledger, and a place for keys."""
    monkeypatch.setenv("EXPUNGE_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("EXPUNGE_STORE", str(tmp_path / "store"))
    store = Store.open()
    original = store.put_run(kind="original", key="o", record={"problem": "digits"})
    refs = [store.put_run(kind="reference", key=f"r{i}", record={"seed": i}) for i in (1, 2)]
    record = {
        "problem": "digits",
        "fingerprint": {"model": "0" * 64},
        "request": {"ids": ["bob@example.org", "ann@example.org"], "time": "2026-11-22T08:00:00+00:00",
                    "reason": "Bob asked"},
        "method": {"name": "ssd", "passed": {}, "in_force": {"alpha": 10.0}},
        "runtime": {"seed": 3},
        "weights": hash_tensors(TENSORS),
        "change": {"kind": "weights", "hash": "77" * 32},
        "forgotten": 2,
        "packages": {"torch": "2.13.0"},
    }  # fmt: skip
    run = store.put_run(kind="unlearn", key="u", record=record, parents=[original])
    found = [
        Finding("accuracy/forget-train", 0.6, low=0.55, high=0.65, reference=0.9, original=0.3, floor=0.02),
        Finding("accuracy/retain-test", 0.95, low=0.9, high=1.0, reference=0.95, floor=0.02),
    ]  # fmt: skip
    audit = store.put_findings(run, found, key="a", parents=refs)
    save_file(TENSORS, tmp_path / "model.safetensors")
    engine = ledger.open_engine(tmp_path / "service.sqlite")
    ledger.create(engine)
    for i in range(3):
        ledger.record(engine, "planned", f"r{i}", {})
    ledger.export(engine, tmp_path / "ledger.jsonl")
    engine.dispose()
    call("certificate", "key", "create", "--name", "privacy team")
    return {"run": run, "audit": audit, "record": record, "store": store, "folder": tmp_path}


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def issue(world, *words):
    return call("certificate", "issue", world["run"][:12], "--out", world["folder"] / "c", *words)


def test_from_a_run_to_a_verified_certificate(world):
    folder = world["folder"]
    said = issue(world, "--weights", folder / "model.safetensors", "--ledger", folder / "ledger.jsonl", "--pdf")  # fmt: skip
    assert "Empirical: a method without proof" in said and "keep it apart, or destroy it" in said
    assert stat.S_IMODE((folder / "c" / "certificate.salt").stat().st_mode) == 0o600
    assert (folder / "c" / "certificate.pdf").read_bytes().startswith(b"%PDF")
    file = folder / "c" / "certificate.json"
    everything = file.read_bytes() + (folder / "c" / "certificate.html").read_bytes()
    shown = json.loads(call("certificate", "show", file, "--json"))
    for personal in ("bob", "Bob", "ann@"):
        assert personal not in json.dumps(shown) and personal.encode() not in everything
    predicate = shown["predicate"]
    assert predicate["request"] == {
        "form": "ids",
        "records": 2,
        "received": "2026-11-22T08:00:00+00:00",
    }
    assert predicate["method"]["settings"] == {"alpha": 10.0} and predicate["method"]["seed"] == 3
    assert predicate["ledger"]["seq"] == 3
    assert predicate["runs"] == {"unlearn": world["run"], "audit": world["audit"]}
    assert [r["seed"] for r in predicate["references"]] == [1, 2]
    assert "still tell the model from retrained ones" in " ".join(predicate["says"]) or "its own" in " ".join(predicate["says"])  # fmt: skip
    salt = json.loads((folder / "c" / "certificate.salt").read_text())["salt"]
    assert ledger.commitments(salt, ["bob@example.org", "ann@example.org"]) == predicate["commitments"]["records"]  # fmt: skip

    checks = ("--weights", folder / "model.safetensors", "--ledger", folder / "ledger.jsonl")
    said = call("certificate", "verify", file, *checks)
    assert "the certificate holds" in said and "not looked at" not in said
    found = json.loads(call("certificate", "verify", file, *checks[:2], "--json"))
    assert found["ok"] and found["class"] == "empirical" and len(found["unchecked"]) == 1
    by_database = ("--ledger", folder / "service.sqlite")
    assert "row 3 is the one named" in call("certificate", "verify", file, *by_database)


def test_verify_says_which_file_was_changed(world):
    folder = world["folder"]
    issue(world, "--weights", folder / "model.safetensors", "--ledger", folder / "ledger.jsonl")
    file = folder / "c" / "certificate.json"
    checks = ("--weights", folder / "model.safetensors", "--ledger", folder / "ledger.jsonl")
    for path, name in ((folder / "model.safetensors", "model.safetensors"),
                       (folder / "ledger.jsonl", "ledger.jsonl"), (file, "certificate.json")):  # fmt: skip
        whole = path.read_bytes()
        path.write_bytes(whole[:-10] + bytes([whole[-10] ^ 4]) + whole[-9:])
        said = call("certificate", "verify", file, *checks, code=1)
        assert f"wrong: {name}" in said and said.endswith("refused\n")
        found = json.loads(call("certificate", "verify", file, *checks, "--json", code=1))
        assert not found["ok"] and all(name in f for f in found["faults"])
        path.write_bytes(whole)
    call("certificate", "verify", file, *checks)


def test_rotation_and_revocation_on_the_command_line(world):
    issue(world)
    file = world["folder"] / "c" / "certificate.json"
    public = world["folder"] / "public.json"
    call("certificate", "key", "export", public)
    call("certificate", "key", "rotate")
    call("certificate", "verify", file)
    call("certificate", "verify", file, "--keys", public)
    listed = json.loads(call("certificate", "key", "list", "--json"))
    assert [k["name"] for k in listed] == ["privacy team"] * 2 and listed[0]["until"]
    call("certificate", "key", "revoke", listed[0]["id"][:10], "--reason", "stolen")
    assert "stolen" in call("certificate", "verify", file, code=1)
    with pytest.raises(UserError, match="exists"):
        call("certificate", "key", "export", public)
    with pytest.raises(UserError, match="private keys lie in a folder"):
        call("certificate", "key", "rotate", "--keys", public)
    assert "stolen" in call("certificate", "key", "list")


def test_mistakes_are_told_before_anything_is_written(world, monkeypatch):
    folder = world["folder"]
    save_file({"fc.weight": torch.ones(2, 3)}, folder / "other.safetensors")
    with pytest.raises(UserError, match="does not hold the weights of run"):
        issue(world, "--weights", folder / "other.safetensors")
    with pytest.raises(StoreError, match="of kind audit"):
        call("certificate", "issue", world["audit"])
    with pytest.raises(UserError, match="cannot read"):
        issue(world, "--ids", folder / "none.txt")
    (folder / "bad.jsonl").write_bytes((folder / "ledger.jsonl").read_bytes()[:-5])
    with pytest.raises(UserError, match="does not hold, so no certificate names it"):
        issue(world, "--ledger", folder / "bad.jsonl")
    assert not (folder / "c").exists()
    issue(world)
    with pytest.raises(UserError, match="pass --force"):
        issue(world)
    issue(world, "--force")
    with pytest.raises(UserError, match="cannot read the keys"):
        call("certificate", "verify", folder / "c" / "certificate.json", "--keys", folder / "no")
    with pytest.raises(UserError, match="cannot read"):
        call("certificate", "verify", folder / "nothing.json")
    monkeypatch.setenv("EXPUNGE_KEYS", str(folder / "empty"))
    with pytest.raises(UserError, match="key create"):
        issue(world, "--force")


def test_a_certificate_over_handed_evidence_follows_another(world):
    folder = world["folder"]
    issue(world)
    first = folder / "c" / "certificate.json"
    given = asdict(evidence("exact")) | {"ledger": None}
    (folder / "evidence.json").write_text(json.dumps(given))
    (folder / "ids.txt").write_text("7\n8\n")
    made = json.loads(call("certificate", "issue", folder / "evidence.json", "--out", folder / "d",
                           "--predecessor", first, "--ids", folder / "ids.txt", "--json"))  # fmt: skip
    assert made["class"] == "exact" and made["salt"] == "certificate.salt"
    second = folder / "d" / "certificate.json"
    assert "follows the given predecessor" in call("certificate", "verify", second, "--predecessor", first)  # fmt: skip
    call("certificate", "verify", second, "--predecessor", second, code=1)
    assert "Exact: the weights" in call("certificate", "show", second, "--html", folder / "x.html")
    assert "<h1>Certificate of exact deletion</h1>" in (folder / "x.html").read_text()


def test_a_saved_outcome_is_recognised_by_its_change(world, tmp_path):
    """What `Outcome.save` writes can be named as the released folder."""
    store, record = world["store"], world["record"]
    folder = tmp_path / "saved"
    folder.mkdir()
    save_file(TENSORS, folder / "change.safetensors")
    changed = record | {"weights": "12" * 32, "change": {"kind": "weights", "hash": hash_tensors(TENSORS)}}  # fmt: skip
    (folder / "record.json").write_text(json.dumps(changed))
    assert load(folder).change is not None
    run = store.put_run(kind="unlearn", key="v", record=changed)
    call("certificate", "issue", run, "--weights", folder, "--out", tmp_path / "e")
    file = tmp_path / "e" / "certificate.json"
    assert "No audit was run" in call("certificate", "show", file)
    call("certificate", "verify", file, "--weights", folder)
    (folder / "record.json").write_text("{}")
    assert "wrong: record.json was changed" in call("certificate", "verify", file, "--weights", folder, code=1)  # fmt: skip


def test_a_wrapper_is_suppression_whatever_the_method_says(world):
    wrapped = world["record"] | {"change": {"kind": "wrapper", "hash": "77" * 32}}
    run = world["store"].put_run(kind="unlearn", key="w", record=wrapped)
    out = world["folder"] / "w"
    assert json.loads(call("certificate", "issue", run, "--out", out, "--json"))["class"] == "suppression"  # fmt: skip


def test_the_ledger_commands(world):
    folder = world["folder"]
    assert "the ledger holds" in call("ledger", "verify", folder / "ledger.jsonl")
    assert json.loads(call("ledger", "verify", folder / "service.sqlite", "--json")) == {"ok": True, "faults": []}  # fmt: skip
    issue(world, "--ledger", folder / "service.sqlite")
    signed = folder / "signed.jsonl"
    call("ledger", "export", folder / "service.sqlite", "--output", signed, "--sign")
    call("ledger", "verify", signed, "--keys", folder / "keys")
    named = ("--certificate", folder / "c" / "certificate.json")
    call("ledger", "verify", signed, *named)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    end = json.loads(lines[1])
    cut = ledger.canonical({"checkpoint": None, "head": {"hash": end["hash"], "seq": 2}}) + b"\n"
    (folder / "cut.jsonl").write_bytes(b"".join(lines[:2]) + cut)
    call("ledger", "verify", folder / "cut.jsonl")
    assert "rows were cut off" in call("ledger", "verify", folder / "cut.jsonl", *named, code=1)
    with pytest.raises(UserError, match="is no database"):
        call("ledger", "export", signed, "--output", folder / "y")
    with pytest.raises(UserError, match="cannot read"):
        call("ledger", "verify", folder / "nothing")

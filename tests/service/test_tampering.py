"""Flip any byte of a ledger, an artefact or a certificate: verification says which."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from expunge.service import ledger

pytest.importorskip("cryptography")
pytest.importorskip("rfc8785")
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from certificate_data import evidence

from expunge.core.errors import UserError
from expunge.report import artefact, certificate
from expunge.report.envelope import EnvelopeError, pae
from expunge.report.keys import Key, KeySet
from expunge.report.statement import PAYLOAD

often = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KEY, OTHER = Key.new(), Key.new()
TRUSTED = KeySet.of(KEY)


def flipped(data: bytes, place: float, bits: int) -> bytes:
    at = min(int(place * len(data)), len(data) - 1)
    return data[:at] + bytes([data[at] ^ bits]) + data[at + 1 :]


places = st.floats(0, 1, exclude_max=True)
flips = st.integers(1, 255)


# ------------------------------------------------------------------ the ledger's export


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of an export with umlauts, numbers and nested values; one signed, one not."""
    folder = tmp_path_factory.mktemp("ledger")
    engine = ledger.open_engine(folder / "l.sqlite")
    ledger.create(engine)
    for i in range(6):
        ledger.record(engine, "planned", f"r{i}", {"é": "ü\n", "n": [i, 0.5, None, {"a": 1e-7}]})
    ledger.export(engine, folder / "plain.jsonl")
    ledger.export(engine, folder / "signed.jsonl", sign=KEY)
    engine.dispose()
    return {n: (folder / f"{n}.jsonl").read_bytes() for n in ("plain", "signed")}


@pytest.fixture
def says(tmp_path):
    def check(data, **more):
        path = tmp_path / "export.jsonl"
        path.write_bytes(data)
        return ledger.verify(path, **more)

    return check


@pytest.mark.parametrize("name", ["plain", "signed"])
def test_untouched_exports_hold(whole, says, name):
    assert says(whole[name]) == []
    assert says(whole["signed"], keys=TRUSTED) == []


@often
@given(place=places, bits=flips)
def test_any_flip_in_an_export_is_told(whole, says, place, bits):
    said = says(flipped(whole["plain"], place, bits))
    assert said and all("export.jsonl" in s for s in said)


@often
@given(place=places, bits=flips)
def test_any_flip_in_a_signed_export_is_told_with_the_keys(whole, says, place, bits):
    assert says(flipped(whole["signed"], place, bits), keys=TRUSTED)


@often
@given(place=places)
def test_any_truncation_of_an_export_is_told(whole, says, place):
    data = whole["plain"]
    assert says(data[: int(place * len(data))])


@given(st.permutations(range(6)).filter(lambda order: order != list(range(6))))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_in_another_order_are_told(whole, says, order):
    *rows, last = whole["plain"].splitlines(keepends=True)
    assert any("order" in s for s in says(b"".join(rows[i] for i in order) + last))


@pytest.mark.parametrize("kept", [slice(1, 6), slice(0, 5), [0, 1, 3, 4, 5], [0, 1, 1, 2, 3, 4, 5]])
def test_rows_left_out_or_doubled_are_told(whole, says, kept):
    *rows, last = whole["plain"].splitlines(keepends=True)
    chosen = rows[kept] if isinstance(kept, slice) else [rows[i] for i in kept]
    assert says(b"".join(chosen) + last)


def shortened(data: bytes, rows: int) -> bytes:
    """The work of somebody who knows the format: a shorter ledger, whole in itself."""
    lines = data.splitlines(keepends=True)[:rows]
    end = json.loads(lines[-1])
    last = {"checkpoint": None, "head": {"hash": end["hash"], "seq": end["seq"]}}
    return b"".join(lines) + ledger.canonical(last) + b"\n"


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_well_made_shorter_ledger_is_told_by_what_names_its_end(whole, says, rows):
    data = shortened(whole["plain"], rows)
    assert says(data) == []  # nothing inside can show it: that is why certificates name the head
    end = json.loads(whole["plain"].splitlines()[5])
    named = [ledger.Head(end["seq"], end["hash"])]
    assert any("rows were cut off" in s for s in says(data, named=named))
    assert says(whole["plain"], named=named) == []
    assert any("no signature under its head" in s for s in says(data, keys=TRUSTED))
    # a certificate that is older than the cut does not make up for the signature
    first = json.loads(whole["plain"].splitlines()[0])
    older = [ledger.Head(1, first["hash"])]
    told = any("no signature under its head" in s for s in says(data, keys=TRUSTED, named=older))
    assert told == (rows > 1)


def test_the_signature_of_another_head_does_not_fit(whole, says):
    mark = json.loads(whole["signed"].splitlines()[-1])["checkpoint"]
    lines = shortened(whole["plain"], 4).splitlines(keepends=True)
    last = json.loads(lines[-1]) | {"checkpoint": mark}
    data = b"".join(lines[:-1]) + ledger.canonical(last) + b"\n"
    assert any("signed head names row 6" in s for s in says(data, keys=TRUSTED))
    assert any("not trusted" in s for s in says(whole["signed"], keys=KeySet.of(OTHER)))


def test_a_ledger_written_anew_is_told_by_what_names_its_rows(whole, says, tmp_path):
    engine = ledger.open_engine(tmp_path / "new.sqlite")
    ledger.create(engine)
    for i in range(8):
        ledger.record(engine, "planned", f"r{i}", {})
    ledger.export(engine, tmp_path / "new.jsonl")
    engine.dispose()
    end = json.loads(whole["plain"].splitlines()[5])
    said = says((tmp_path / "new.jsonl").read_bytes(), named=[ledger.Head(6, end["hash"])])
    assert len(said) == 1 and "row 6 is not the one" in said[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'{"body"', b'{ "body"'), (b'"seq":3', b'"seq":3.0'), (b'"seq":3', b'"seq":9,"seq":3')],
)
def test_other_spellings_of_a_row_are_told(whole, says, old, new):
    lines = whole["plain"].splitlines(keepends=True)
    assert json.loads(lines[2]) == json.loads(lines[2].replace(old, new, 1))  # the same value
    lines[2] = lines[2].replace(old, new, 1)
    assert any("line 3 was changed" in s for s in says(b"".join(lines)))


def test_a_row_forged_with_a_hash_that_fits_is_told_by_the_next(whole, says):
    lines = whole["plain"].splitlines(keepends=True)
    row = json.loads(lines[2])
    forged = ledger.Entry(**(row | {"body": '{"n":"forged"}', "hash": ""}))
    forged = replace(forged, hash=forged.digest())
    said = says(b"".join([*lines[:2], forged.line(), *lines[3:]]))
    assert said == ["export.jsonl: row 4 does not follow the row before it: one of the two was changed"]  # fmt: skip


# ------------------------------------------------------------------ the ledger's rows


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A ledger whose owner took the triggers off, as somebody with the password can."""
    engine = ledger.open_engine(tmp_path_factory.mktemp("rows") / "l.sqlite")
    ledger.create(engine)
    for i in range(4):
        with engine.begin() as connection:
            secret = ledger.keep(connection, f"r{i}", {"ids": [i, "x"]})
            ledger.append(connection, "received", f"r{i}", {"selectors": secret, "n": i})
    with engine.begin() as connection:
        for verb in ("update", "delete"):
            connection.execute(sa.text(f"DROP TRIGGER ledger_no_{verb}"))
    yield engine
    engine.dispose()


@often
@given(
    seq=st.integers(1, 4),
    column=st.sampled_from(["seq", "time", "kind", "request", "body", "previous", "hash"]),
    place=places,
    bits=flips,
)
def test_any_flip_in_a_row_is_told_with_its_number(database, seq, column, place, bits):
    with database.connect() as connection, connection.begin() as undone:
        query = sa.text(f"SELECT {column} FROM ledger WHERE seq = {seq}")
        old = str(connection.scalar(query)).encode()
        new = flipped(old, place, bits & 127 or 1).decode("latin-1")
        change = sa.text(f"UPDATE ledger SET {column} = :v WHERE seq = {seq}")
        try:
            connection.execute(change, {"v": new})
        except sa.exc.IntegrityError:  # another row has this number
            assume(False)
        said = ledger.verify(_same(connection))
        undone.rollback()
    assert said
    assert column == "seq" or any(f"row {seq} " in s for s in said)
    assert ledger.verify(database) == []


@often
@given(seq=st.integers(1, 4), column=st.sampled_from(["selectors", "salt"]), place=places, bits=flips)  # fmt: skip
def test_any_flip_beside_the_chain_is_told(database, seq, column, place, bits):
    where = f"WHERE request = 'r{seq - 1}'"
    with database.connect() as connection, connection.begin() as undone:
        old = connection.scalar(sa.text(f"SELECT {column} FROM ledger_selectors {where}")).encode()
        new = flipped(old, place, bits & 127 or 1).decode("latin-1")
        connection.execute(
            sa.text(f"UPDATE ledger_selectors SET {column} = :v {where}"), {"v": new}
        )
        said = ledger.verify(_same(connection))
        undone.rollback()
    assert any(f"request r{seq - 1} " in s for s in said)


def _same(connection):
    """An engine that lends out this one connection, so that what is not committed is seen."""

    class Lent(sa.Engine):
        def __init__(self):
            self.url = connection.engine.url

        def connect(self):
            import contextlib

            return contextlib.nullcontext(connection)

    return Lent()


# ------------------------------------------------------------------ certificates


@pytest.fixture(scope="module")
def signed():
    return certificate.issue(evidence(), KEY)


@often
@given(place=places, bits=flips)
def test_any_flip_in_a_certificate_is_told(signed, tmp_path, place, bits):
    path = tmp_path / "certificate.json"
    path.write_bytes(flipped(certificate.text(signed).encode(), place, bits))
    refused(path)


@often
@given(place=places)
def test_any_truncation_of_a_certificate_is_told(signed, tmp_path, place):
    data = certificate.text(signed).encode()
    path = tmp_path / "certificate.json"
    path.write_bytes(data[: int(place * len(data))])
    refused(path)


def refused(path, keys=TRUSTED):
    try:
        found = certificate.verify(certificate.read(path), keys)
    except EnvelopeError as error:
        return str(error)
    assert not found.ok and found.faults and found.statement is None
    return found.faults[0]


@often
@given(place=places, bits=flips, part=st.sampled_from(["payload", "sig"]))
def test_any_flip_of_the_bytes_inside_is_told(signed, place, bits, part):
    changed = json.loads(json.dumps(signed))
    holder = changed if part == "payload" else changed["signatures"][0]
    holder[part] = base64.b64encode(flipped(base64.b64decode(holder[part]), place, bits)).decode()
    found = certificate.verify(changed, TRUSTED)
    assert not found.ok and "does not fit" in found.faults[0]


def test_unused_bits_of_base64_are_told(signed):
    changed = json.loads(json.dumps(signed))
    text = changed["signatures"][0]["sig"]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = letters[letters.index(text[-3]) ^ 1]
    changed["signatures"][0]["sig"] = text[:-3] + last + "=="
    assert base64.b64decode(changed["signatures"][0]["sig"]) == base64.b64decode(text)
    assert "as it was written" in certificate.verify(changed, TRUSTED).faults[0]


def test_signatures_of_others_do_not_count(signed):
    assert certificate.verify(signed, TRUSTED).ok
    unknown = certificate.verify(signed, KeySet.of(OTHER))
    assert not unknown.ok and "not trusted here" in unknown.faults[0]
    another = certificate.issue(evidence(problem="mnist"), KEY)
    swapped = certificate.verify(signed | {"signatures": another["signatures"]}, TRUSTED)
    assert not swapped.ok and "another envelope" in swapped.faults[0]
    # the right key's id over a signature of another key
    forged = json.loads(json.dumps(certificate.issue(evidence(), OTHER)))
    forged["signatures"][0]["keyid"] = KEY.id
    assert not certificate.verify(forged, TRUSTED).ok
    # one good signature does not carry a bad one
    both = signed | {"signatures": [*signed["signatures"], *another["signatures"]]}
    assert not certificate.verify(both, TRUSTED).ok
    assert not certificate.verify(signed | {"signatures": []}, TRUSTED).ok


def test_a_signature_over_the_bare_payload_is_no_dsse_signature(signed):
    payload = base64.b64decode(signed["payload"])
    for message in (payload, pae("application/json", payload)):
        sig = base64.b64encode(KEY.sign(message)).decode()
        wrong = signed | {"signatures": [{"keyid": KEY.id, "sig": sig}]}
        assert not certificate.verify(wrong, TRUSTED).ok
    right = base64.b64encode(KEY.sign(pae(PAYLOAD, payload))).decode()
    assert right == signed["signatures"][0]["sig"]


@pytest.mark.parametrize("junk", [None, 3, [], {}, {"payload": 1}, {"payload": "", "payloadType": PAYLOAD, "signatures": [3]}])  # fmt: skip
def test_what_is_no_envelope_is_refused(junk):
    assert not certificate.verify(junk, TRUSTED).ok


# ------------------------------------------------------------------ weights and their folders


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    tensors = {"fc.weight": torch.randn(6, 5), "fc.bias": torch.zeros(6)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "manifest.json").write_text(json.dumps({"shards": 2, "records": {"1": [0, 1]}}))
    (folder / "stages").mkdir()
    save_file({"lora": torch.ones(3)}, folder / "stages" / "a.safetensors")
    subjects = artefact.describe(folder)
    envelope = certificate.issue(replace(evidence(), subjects=subjects), KEY)
    return folder, envelope


@often
@given(
    name=st.sampled_from(["model.safetensors", "manifest.json", "stages/a.safetensors"]),
    place=places,
    bits=flips,
)
def test_any_flip_in_what_was_released_is_told_with_the_file(released, name, place, bits):
    folder, envelope = released
    whole = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(flipped(whole, place, bits))
        found = certificate.verify(envelope, TRUSTED, folder)
        alone = certificate.verify(envelope, TRUSTED, folder / name)
    finally:
        (folder / name).write_bytes(whole)
    assert (
        not found.ok
        and len(found.faults) == 1
        and found.faults[0].startswith(f"{name} was changed")
    )
    assert not alone.ok and Path(name).name in alone.faults[0]


def test_missing_and_extra_files_are_told(released, tmp_path):
    folder, envelope = released
    assert certificate.verify(envelope, TRUSTED, folder).ok
    assert certificate.verify(envelope, TRUSTED, folder / "model.safetensors").ok
    moved = (folder / "manifest.json").rename(tmp_path / "manifest.json")
    assert certificate.verify(envelope, TRUSTED, folder).faults == [f"manifest.json is missing in {folder}"]  # fmt: skip
    moved.rename(folder / "manifest.json")
    (folder / "other.pt").write_bytes(b"x")
    assert "other.pt could hold weights" in certificate.verify(envelope, TRUSTED, folder).faults[0]
    (folder / "other.pt").unlink()
    with pytest.raises(UserError, match="there is no"):
        certificate.verify(envelope, TRUSTED, folder / "nothing")


@pytest.fixture(scope="module")
def by_tensors(released):
    """A certificate that knows the tensors only, as one from a run of the store."""
    hashed = artefact.tensors_hash(released[0] / "model.safetensors")
    subject = {"name": "weights", "digest": {"expungeTensors": hashed}}
    envelope = certificate.issue(replace(evidence(), subjects=[subject]), KEY)
    assert certificate.verify(envelope, TRUSTED, released[0] / "model.safetensors").ok
    return envelope


@often
@given(place=places, bits=flips)
def test_without_file_hashes_any_flip_of_a_tensor_is_told(released, by_tensors, place, bits):
    folder, envelope = released[0], by_tensors
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    try:
        file.write_bytes(whole[:start] + flipped(whole[start:], place, bits))
        found = certificate.verify(envelope, TRUSTED, file)
    finally:
        file.write_bytes(whole)
    assert found.faults == ["model.safetensors was changed: its tensors are not those that were released"]  # fmt: skip

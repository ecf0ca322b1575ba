"""Keys: made once, never replaced, for their owner alone; rotation and revocation."""

from __future__ import annotations

import json
import os
import stat
import time
from dataclasses import replace

import pytest

pytest.importorskip("cryptography")
from certificate_data import evidence

from expunge.core.errors import UserError
from expunge.report import certificate
from expunge.report.keys import Key, Keys, KeySet


@pytest.fixture
def keys(tmp_path):
    return Keys(tmp_path / "keys")


def holds(envelope, keys):
    found = certificate.verify(envelope, keys.public)
    return found.ok, " ".join(found.faults)


def test_a_key_is_for_its_owner_alone_and_never_replaced(keys):
    made = keys.create("team privacy")
    path = keys.folder / f"{made.id}.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"PRIVATE" in path.read_bytes()
    assert "PRIVATE" not in (keys.folder / "keys.json").read_text()
    with pytest.raises(UserError, match="rotate"):
        keys.create()
    with pytest.raises(UserError, match="never replaced"):
        Key.new().write(path)
    assert keys.signer().id == made.id
    path.chmod(0o640)
    with pytest.raises(UserError, match="others may read"):
        keys.signer()


def test_the_first_rotated_and_revoked_key(keys):
    old = keys.create("one")
    before = certificate.issue(evidence(), keys.signer())
    time.sleep(0.002)
    new = keys.rotate()
    assert new.name == "one" and new.id != old.id and keys.signer().id == new.id
    after = certificate.issue(evidence(), keys.signer())
    assert holds(before, keys) == (True, "") and holds(after, keys) == (True, "")
    # the old private half is still there; what it signs from now on does not count
    late = certificate.issue(evidence(), Key.read(keys.folder / f"{old.id}.pem"))
    time.sleep(0.002)
    late = certificate.issue(evidence(), Key.read(keys.folder / f"{old.id}.pem"))
    ok, why = holds(late, keys)
    assert not ok and "was replaced" in why
    early = certificate.issue(evidence(), keys.signer(), issued="2020-01-01T00:00:00+00:00")
    assert "before the key" in holds(early, keys)[1]
    assert (
        "is no time" in holds(certificate.issue(evidence(), keys.signer(), issued="now"), keys)[1]
    )
    keys.revoke(old.id[:8], "laptop lost")
    ok, why = holds(before, keys)
    assert not ok and "revoked" in why and "laptop lost" in why
    assert holds(after, keys)[0]
    with pytest.raises(UserError, match="already"):
        keys.revoke(old.id)
    keys.revoke(new.id)
    with pytest.raises(UserError, match="no key in use"):
        keys.signer()
    with pytest.raises(UserError, match="no key in use"):
        keys.rotate()
    assert keys.create("again").name == "again"


def test_a_passphrase_is_needed_where_one_was_given(keys, monkeypatch):
    monkeypatch.setenv("EXPUNGE_KEY_PASSPHRASE", "correct horse")
    made = keys.create()
    assert b"ENCRYPTED" in (keys.folder / f"{made.id}.pem").read_bytes()
    assert keys.signer().id == made.id
    monkeypatch.setenv("EXPUNGE_KEY_PASSPHRASE", "wrong")
    with pytest.raises(UserError, match="no private key that can be read"):
        keys.signer()
    monkeypatch.delenv("EXPUNGE_KEY_PASSPHRASE")
    with pytest.raises(UserError, match="passphrase"):
        keys.signer()


def test_a_changed_key_set_is_refused(keys, tmp_path):
    made = keys.create()
    path = tmp_path / "set.json"
    keys.public.write(path)
    assert KeySet.read(path) == keys.public == KeySet.read(keys.folder)
    data = json.loads(path.read_text())
    other = Key.new()
    for change in ({"public": other.public}, {"id": other.id}, {"id": 3}, {"since": "soon"},
                   {"public": "?"}, {"colour": "red"}, {"since": "2026-01-01T00:00:00"}):  # fmt: skip
        path.write_text(json.dumps({"keys": [data["keys"][0] | change]}))
        with pytest.raises(UserError):
            KeySet.read(path)
    with pytest.raises(UserError, match="begins with"):
        keys.public.resolve("zz")
    assert keys.public.resolve(made.id[:6]) == made


def test_files_that_are_no_keys_are_told(tmp_path):
    path = tmp_path / "x.pem"
    with pytest.raises(UserError, match="cannot read the key"):
        Key.read(path)
    path.touch(mode=0o600)
    os.chmod(path, 0o600)
    with pytest.raises(UserError, match="no private key"):
        Key.read(path)
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import x25519

    private = x25519.X25519PrivateKey.generate()
    path.write_bytes(private.private_bytes(
        forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption()))  # fmt: skip
    with pytest.raises(UserError, match="another kind"):
        Key.read(path)


def test_a_swapped_private_file_is_told(keys):
    made = keys.create()
    path = keys.folder / f"{made.id}.pem"
    path.unlink()
    Key.new().write(path)
    with pytest.raises(UserError, match="another key than its name"):
        keys.signer()


def test_a_key_that_ends_signs_to_the_end(keys):
    made = keys.create()
    key = keys.signer()
    listed = replace(made, since="2026-01-01T00:00:00+00:00", until="2026-02-01T00:00:00+00:00")
    for issued, ok in (("2026-01-01T00:00:00+00:00", True), ("2026-02-01T01:00:00+01:00", True),
                       ("2026-02-01T00:00:01+00:00", False), ("2025-12-31T23:59:59+00:00", False)):  # fmt: skip
        envelope = certificate.issue(evidence(), key, issued=issued)
        assert certificate.verify(envelope, KeySet((listed,))).ok is ok

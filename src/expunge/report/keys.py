"""Ed25519 keys that sign certificates: creation, rotation, revocation, and the set that is trusted.

A folder holds `keys.json`, the public keys with the times in which each may sign, and one
`ID.pem` for every private key. `keys.json` is what those who verify are given, by a way they
trust: it is the root of all that follows. An id is the SHA-256 of the 32 public bytes.

Rotation gives a key an end: what it signed until then stays valid. Revocation is for a key that
may be in other hands: as its holder could date anything back, nothing it signed is valid any more.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from expunge.core.errors import UserError

LISTED = "keys.json"
PASSPHRASE = "EXPUNGE_KEY_PASSPHRASE"
"""Environment variable with a passphrase for private keys, if they are to have one."""
_NEEDED = "certificates need the extra serve: pip install 'expunge[serve]'"


@dataclass(frozen=True)
class PublicKey:
    """A key that may be trusted.

    Attributes:
        id: SHA-256 of the public bytes, hex.
        public: the 32 bytes in base64.
        name: whose key it is, for people.
        since: from when on it signs (ISO 8601, UTC).
        until: when it stopped signing, if it did.
        revoked: when it was found to be unsafe, if it was.
        reason: why it was revoked.
    """

    id: str
    public: str
    name: str = ""
    since: str = ""
    until: str | None = None
    revoked: str | None = None
    reason: str = ""

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether a signature over a message is this key's."""
        from cryptography.exceptions import InvalidSignature

        try:
            _ed25519().Ed25519PublicKey.from_public_bytes(base64.b64decode(self.public)).verify(
                signature, message
            )
        except InvalidSignature:
            return False
        return True

    def objection(self, issued: str) -> str | None:
        """Why this key is not good for something signed at a time; None if it is."""
        if self.revoked is not None:
            why = f": {self.reason}" if self.reason else ""
            return f"the key {self.id[:16]} was revoked at {self.revoked}{why}"
        try:
            at, since = _time(issued), _time(self.since)
            until = None if self.until is None else _time(self.until)
        except ValueError:
            return f"{issued!r} is no time"
        if at < since:
            return f"it is dated {issued}, before the key {self.id[:16]} was in use ({self.since})"
        if until is not None and at > until:
            return f"it is dated {issued}, after the key {self.id[:16]} was replaced ({self.until})"
        return None


class Key:
    """A private key, to sign with."""

    def __init__(self, private: Any) -> None:
        """Take a private key of `cryptography`."""
        self._private = private
        raw = private.public_key().public_bytes_raw()
        self.id = hashlib.sha256(raw).hexdigest()
        self.public = base64.b64encode(raw).decode()

    @classmethod
    def new(cls) -> Key:
        """Draw a key; it is nowhere but in memory."""
        return cls(_ed25519().Ed25519PrivateKey.generate())

    @classmethod
    def read(cls, path: str | Path) -> Key:
        """Read a private key.

        Raises:
            UserError: it is not there, others may read it, it is no Ed25519 key, or the
                passphrase does not fit.
        """
        path = Path(path)
        module = _ed25519()
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            mode, data = path.stat().st_mode, path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the key {path}: {error.strerror or error}") from error
        if os.name == "posix" and mode & 0o077:
            raise UserError(f"others may read the key {path}; say chmod 600 {path}, or replace it")
        try:
            private = load_pem_private_key(data, _passphrase())
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            hint = (
                f"; a passphrase is read from ${PASSPHRASE}" if "pass" in str(error).lower() else ""
            )
            raise UserError(f"{path} holds no private key that can be read{hint}") from error
        if not isinstance(private, module.Ed25519PrivateKey):
            raise UserError(f"{path} holds a key of another kind than Ed25519")
        return cls(private)

    def write(self, path: Path) -> None:
        """Write the private key for its owner alone.

        Raises:
            UserError: there is a file already, which is never replaced, or it cannot be written.
        """
        from cryptography.hazmat.primitives import serialization as forms

        phrase = _passphrase()
        data = self._private.private_bytes(
            forms.Encoding.PEM,
            forms.PrivateFormat.PKCS8,
            forms.BestAvailableEncryption(phrase) if phrase else forms.NoEncryption(),
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise UserError(f"{path} exists; a key is never replaced") from error
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        with os.fdopen(file, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())

    def sign(self, message: bytes) -> bytes:
        """The 64 bytes of an Ed25519 signature."""
        signature: bytes = self._private.sign(message)
        return signature

    def listed(self, name: str = "", since: str | None = None) -> PublicKey:
        """Its public half, in use from now on unless another time is given."""
        return PublicKey(self.id, self.public, name, since or _now())


@dataclass(frozen=True)
class KeySet:
    """The keys that somebody trusts."""

    keys: tuple[PublicKey, ...] = ()

    @classmethod
    def of(cls, *keys: Key | PublicKey) -> KeySet:
        """A set of keys; private ones are listed as in use since 1970."""
        return cls(tuple(
            k.listed(since="1970-01-01T00:00:00.000+00:00") if isinstance(k, Key) else k
            for k in keys
        ))  # fmt: skip

    @classmethod
    def read(cls, path: str | Path) -> KeySet:
        """Read `keys.json`, or the folder that holds it.

        Raises:
            UserError: it is not there, or is no key set.
        """
        path = Path(path)
        path = path / LISTED if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            keys = tuple(PublicKey(**key) for key in data["keys"])
        except OSError as error:
            raise UserError(f"cannot read the keys {path}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{path} is no set of keys") from error
        for key in keys:
            _check(key, path)
        return cls(keys)

    def find(self, keyid: str) -> PublicKey | None:
        """The key of an id."""
        return next((k for k in self.keys if k.id == keyid), None)

    def resolve(self, prefix: str) -> PublicKey:
        """The one key whose id begins so.

        Raises:
            UserError: there is none, or there are several.
        """
        found = [k for k in self.keys if prefix and k.id.startswith(prefix.lower())]
        if len(found) != 1:
            what = "no key" if not found else "several keys"
            raise UserError(f"{what} in the set with an id that begins with {prefix!r}")
        return found[0]

    def write(self, path: Path) -> None:
        """Write the set, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        text = json.dumps({"keys": [asdict(k) for k in self.keys]}, indent=1) + "\n"
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                temporary.unlink()


class Keys:
    """A folder with private keys and the public set."""

    def __init__(self, folder: str | Path) -> None:
        """Remember the folder; nothing is read or written."""
        self.folder = Path(folder)

    @property
    def public(self) -> KeySet:
        """The public set; empty before the first key."""
        path = self.folder / LISTED
        return KeySet.read(path) if path.exists() else KeySet()

    def create(self, name: str = "") -> PublicKey:
        """Make the first key, in use from now on.

        Raises:
            UserError: there is one in use; rotate it.
        """
        if any(_in_use(k) for k in self.public.keys):
            raise UserError(f"{self.folder} has a key in use; rotate it to get a new one")
        return self._add(name, self.public.keys)

    def rotate(self, name: str = "") -> PublicKey:
        """Make a new key; the one in use signs no more, and what it signed stays valid.

        Raises:
            UserError: there is none in use.
        """
        used = [k for k in self.public.keys if _in_use(k)]
        if not used:
            raise UserError(f"{self.folder} has no key in use; create one")
        end = _now()
        ended = [replace(k, until=end) if k in used else k for k in self.public.keys]
        return self._add(name or used[-1].name, ended, since=end)

    def revoke(self, prefix: str, reason: str = "") -> PublicKey:
        """Take all trust from a key, also for what it has signed.

        Raises:
            UserError: there is no such key, or it is revoked already.
        """
        listed = self.public
        key = listed.resolve(prefix)
        if key.revoked is not None:
            raise UserError(f"the key {key.id[:16]} was revoked already, at {key.revoked}")
        gone = replace(key, revoked=_now(), reason=reason)
        KeySet(tuple(gone if k == key else k for k in listed.keys)).write(self.folder / LISTED)
        return gone

    def signer(self) -> Key:
        """The private key in use.

        Raises:
            UserError: there is none, or its file is not what the set says.
        """
        used = next((k for k in self.public.keys if _in_use(k)), None)
        if used is None:
            raise UserError(f"{self.folder} has no key in use; say expunge certificate key create")
        key = Key.read(self.folder / f"{used.id}.pem")
        if key.id != used.id:
            raise UserError(
                f"{self.folder / (used.id + '.pem')} holds another key than its name says"
            )
        return key

    def _add(self, name: str, before: Iterable[PublicKey], since: str | None = None) -> PublicKey:
        key = Key.new()
        # the private half first: a set must never promise a key that nobody has
        key.write(self.folder / f"{key.id}.pem")
        listed = key.listed(name, since)
        KeySet((*before, listed)).write(self.folder / LISTED)
        return listed


def _in_use(key: PublicKey) -> bool:
    return key.until is None and key.revoked is None


def _check(key: PublicKey, path: Path) -> None:
    try:
        raw = base64.b64decode(key.public, validate=True)
        for moment in (key.since, key.until, key.revoked):
            _time(moment) if moment is not None else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds a key or a time that cannot be read") from error
    if len(raw) != 32 or hashlib.sha256(raw).hexdigest() != key.id:
        raise UserError(f"{path}: the key {str(key.id)[:16]} was changed; its id does not fit")


def _time(text: str) -> dt.datetime:
    moment = dt.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without its zone")
    return moment


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")


def _passphrase() -> bytes | None:
    return (os.environ.get(PASSPHRASE) or "").encode() or None


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UserError(_NEEDED) from error
    return ed25519

"""DSSE envelopes: bytes with signatures over exactly these bytes and their type.

What is signed is the pre-authentication encoding of the DSSE specification, version 1:
`PAE(type, body) = "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body`, lengths as ASCII decimals
of bytes. Nothing has to be canonical, since the signed bytes themselves travel, in base64.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expunge.core.errors import ExpungeError

if TYPE_CHECKING:
    from expunge.report.keys import Key, KeySet


class EnvelopeError(ExpungeError):
    """An envelope is malformed, altered, or not signed by a key that is trusted."""


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: no two pairs of type and payload share them."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def seal(payload: bytes, payload_type: str, keys: Sequence[Key]) -> dict[str, Any]:
    """Sign a payload.

    Args:
        payload: any bytes.
        payload_type: their media type.
        keys: private keys, one signature each.

    Returns:
        The envelope, as JSON types.
    """
    message = pae(payload_type, payload)
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [
            {"keyid": key.id, "sig": base64.b64encode(key.sign(message)).decode()} for key in keys
        ],
    }


def unsealed(envelope: Any, payload_type: str) -> tuple[bytes, list[tuple[str, bytes]]]:
    """Take an envelope apart without trusting it.

    Returns:
        The payload, and the signatures with the ids of the keys they name.

    Raises:
        EnvelopeError: a part is missing, has another form, or is not as `seal` writes it.
    """
    if not isinstance(envelope, dict) or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise EnvelopeError("it is no DSSE envelope (payload, payloadType, signatures)")
    if envelope["payloadType"] != payload_type:
        raise EnvelopeError(f"it holds {envelope['payloadType']!r}, not {payload_type}")
    listed = envelope["signatures"]
    if not isinstance(listed, list) or not listed:
        raise EnvelopeError("it carries no signature")
    found = []
    for one in listed:
        if not isinstance(one, dict) or set(one) != {"keyid", "sig"}:
            raise EnvelopeError("a signature is not made of keyid and sig")
        if not isinstance(one["keyid"], str):
            raise EnvelopeError("a keyid is no text")
        found.append((one["keyid"], _bytes(one["sig"], "a signature")))
    return _bytes(envelope["payload"], "the payload"), found


def opened(envelope: Any, payload_type: str, keys: KeySet) -> dict[str, Any]:
    """Check an envelope and return what it holds.

    Every signature in it has to hold: one that does not is a sign that somebody was at work.

    Args:
        envelope: as `seal` made it, perhaps altered.
        payload_type: what it should hold.
        keys: the keys that are trusted, with the times for which they are.

    Returns:
        The payload, a JSON object; its `issued` lies within each key's time.

    Raises:
        EnvelopeError: says what is wrong.
    """
    payload, signatures = unsealed(envelope, payload_type)
    message = pae(payload_type, payload)
    trusted = []
    for keyid, signature in signatures:
        key = keys.find(keyid)
        if key is None:
            raise EnvelopeError(
                f"it is signed by the key {keyid[:16]!r}, which is not trusted here"
            )
        if not key.verifies(signature, message):
            raise EnvelopeError(
                f"the signature of the key {key.id[:16]} does not fit: payload or signature was "
                "changed, or it belongs to another envelope"
            )
        trusted.append(key)
    content = _object(payload)
    for key in trusted:
        if complaint := key.objection(issued_at(content)):
            raise EnvelopeError(complaint)
    return content


def issued_at(content: dict[str, Any]) -> str:
    """When a payload says that it was signed: `issued`, there or in an in-toto predicate.

    Raises:
        EnvelopeError: it does not say.
    """
    predicate = content.get("predicate")
    found = (predicate if isinstance(predicate, dict) else content).get("issued")
    if not isinstance(found, str):
        raise EnvelopeError("it does not say when it was signed")
    return found


def _object(payload: bytes) -> dict[str, Any]:
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise EnvelopeError("its payload is no JSON") from error
    if not isinstance(content, dict):
        raise EnvelopeError("its payload is no JSON object")
    return content


def _bytes(text: Any, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise EnvelopeError(f"{what} is not in base64") from error
    # unused bits at the end could be changed without changing the bytes
    if base64.b64encode(data).decode() != text:
        raise EnvelopeError(f"{what} is not in base64 as it was written")
    return data

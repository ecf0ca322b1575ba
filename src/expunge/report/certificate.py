"""Certificates: issue one over evidence, and verify one offline, in sentences.

A certificate is a DSSE envelope over an in-toto Statement v1 with a predicate of our own (see
`statement`). It is signed with Ed25519. `verify` needs the envelope and the keys that are trusted,
nothing else; given the released files, or the ledger, it looks at those too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from expunge.core.errors import ExpungeError, UserError
from expunge.report.artefact import compare
from expunge.report.classes import FORBIDDEN, WORDING, EvidenceClass
from expunge.report.envelope import EnvelopeError, opened, seal, unsealed
from expunge.report.keys import Key, KeySet, _now
from expunge.report.statement import (
    PAYLOAD,
    PREDICATE,
    STATEMENT,
    Evidence,
    statement,
    weights_of,
    words,
)
from expunge.store.ids import new_id


@dataclass(frozen=True)
class Verdict:
    """What verification found.

    Attributes:
        ok: whether the certificate can be relied on, as far as was looked.
        faults: sentences about what is wrong; empty if `ok`.
        checked: sentences about what was found to be right.
        unchecked: sentences about what was not looked at.
        statement: what it states, None unless its signature holds.
    """

    ok: bool
    faults: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    statement: dict[str, Any] | None = None

    @property
    def sentences(self) -> list[str]:
        """Everything in one list, what is wrong first."""
        return [*self.faults, *self.checked, *self.unchecked]


def issue(evidence: Evidence, key: Key, *, issued: str | None = None) -> dict[str, Any]:
    """Sign a certificate.

    Args:
        evidence: what is known.
        key: the private key in use.
        issued: when; now, unless a workflow that is run again must give the same.

    Returns:
        The envelope, as JSON types; `write` puts it into a file.

    Raises:
        UserError: the evidence contradicts itself, or claims more than its class allows.
    """
    content = statement(evidence, issued or _now(), new_id())
    payload = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    try:
        data = payload.encode()
    except UnicodeEncodeError as error:
        raise UserError("the evidence holds text that is no Unicode") from error
    return seal(data, PAYLOAD, [key])


def verify(
    envelope: Any,
    trusted: KeySet,
    weights: str | Path | None = None,
    *,
    predecessor: Any = None,
) -> Verdict:
    """Check a certificate without any network.

    Args:
        envelope: as `issue` made it, or as it was found.
        trusted: keys, with the times for which they are trusted.
        weights: file or folder of what was released, to be compared with the subjects.
        predecessor: envelope of the certificate that it says it follows.

    Returns:
        What is right, what is wrong, and what was not looked at.

    Raises:
        UserError: `weights` cannot be read.
    """
    try:
        content = opened(envelope, PAYLOAD, trusted)
        faults = _form(content)
    except EnvelopeError as error:
        return Verdict(False, [f"the certificate does not hold: {error}"])
    if faults:
        return Verdict(False, faults)
    key = trusted.find(envelope["signatures"][0]["keyid"])
    whose = f" ({key.name})" if key is not None and key.name else ""
    predicate = content["predicate"]
    checked = [
        f"signed by the trusted key {envelope['signatures'][0]['keyid'][:16]}{whose} "
        f"at {predicate['issued']}"
    ]
    unchecked = []
    if predicate.get("wording") != WORDING:
        unchecked.append(
            f"its words are of version {predicate.get('wording')!r}; this version of expunge knows "
            f"those of version {WORDING}, and cannot tell whether they say too much"
        )
    if weights is None:
        unchecked.append("the weights were not compared with the certificate (--weights)")
    elif found := compare(weights, content["subject"]):
        faults += found
    else:
        checked.append(f"{weights} is what was released")
    if predicate["predecessor"] is not None:
        if predecessor is None:
            unchecked.append("the certificate before it was not looked at (--predecessor)")
        elif _fingerprint(predecessor) != predicate["predecessor"]:
            faults.append("the certificate that is given as its predecessor is another one")
        else:
            checked.append("it follows the given predecessor")
    elif predecessor is not None:
        faults.append("it names no predecessor, but one is given")
    if predicate["ledger"] is not None:
        head = predicate["ledger"]
        unchecked.append(f"the ledger was not compared: it has row {head['seq']} = {head['hash']}")
    return Verdict(not faults, faults, checked, unchecked, content)


def fingerprint(envelope: Any) -> str:
    """SHA-256 of what a certificate signs; its successor names it.

    Raises:
        EnvelopeError: it is no certificate.
    """
    payload, _ = unsealed(envelope, PAYLOAD)
    return hashlib.sha256(payload).hexdigest()


def statement_of(envelope: Any) -> dict[str, Any]:
    """The statement in an envelope, whoever signed it; `verify` first where that matters.

    Raises:
        EnvelopeError: it holds no statement of this kind.
    """
    payload, _ = unsealed(envelope, PAYLOAD)
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise EnvelopeError("its payload is no JSON") from error
    if faults := _form(content):
        raise EnvelopeError(faults[0])
    found: dict[str, Any] = content
    return found


def text(envelope: Mapping[str, Any]) -> str:
    """The text of a certificate's file: one line, so that no byte of it is without meaning."""
    return json.dumps(envelope, sort_keys=True, separators=(",", ":")) + "\n"


def read(path: str | Path) -> Any:
    """Read a certificate's file.

    Raises:
        UserError: the file cannot be read.
        EnvelopeError: it is no certificate, or some byte of it was changed.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        envelope = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EnvelopeError(
            f"{path.name} is no certificate, or was changed: it is no JSON"
        ) from error
    if not isinstance(envelope, dict) or text(envelope).encode() != data:
        raise EnvelopeError(
            f"{path.name} is not byte for byte as it was written; ask for the certificate again"
        )
    return envelope


def _form(content: Any) -> list[str]:
    """Whether signed content has the form and the words of a certificate."""
    if not isinstance(content, dict) or content.get("_type") != STATEMENT:
        return ["the certificate holds no in-toto statement"]
    predicate = content.get("predicate")
    if content.get("predicateType") != PREDICATE or not isinstance(predicate, dict):
        return ["the statement is of another kind than those of expunge"]
    if predicate.get("class") not in get_args(EvidenceClass):
        return [f"the certificate has no known evidence class ({predicate.get('class')!r})"]
    try:
        said = words(predicate)
        texts = [s for v in said for s in _texts(predicate[v])]
        head, named = predicate["ledger"], [s["digest"].items() for s in content["subject"]]
        _ = (predicate["predecessor"], predicate["issued"], head and (head["seq"], head["hash"]))
    except (KeyError, TypeError, AttributeError, ValueError):
        return ["the certificate lacks what every one of them has"]
    faults = []
    if not named:
        faults.append("the certificate names nothing that was released")
    if predicate.get("wording") == WORDING and any(predicate[k] != v for k, v in said.items()):
        faults.append("the certificate's words are not those of its evidence class")
    if predicate["class"] != "exact" and any(FORBIDDEN.search(t) for t in texts):
        faults.append(f"the certificate says more than {predicate['class']} evidence can show")
    exact, after = predicate.get("exact"), weights_of(content["subject"])
    if exact and after and exact.get("after") != after:
        faults.append("the weights after the deletion are not those that are named as released")
    return faults


def _texts(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else [v for v in value if isinstance(v, str)]


def _fingerprint(envelope: Any) -> str | None:
    try:
        return fingerprint(envelope)
    except ExpungeError:
        return None

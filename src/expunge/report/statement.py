"""Evidence about a result, and the in-toto statement that a certificate signs."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.core.errors import UserError
from expunge.core.hashing import plain
from expunge.report.classes import CLASSES, FORBIDDEN, WORDING, EvidenceClass, check_words, says

if TYPE_CHECKING:
    from expunge.core.audit import Finding

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:expunge:certificate:v1"
PAYLOAD = "application/vnd.in-toto+json"
TENSORS = "expungeTensors"
"""Name of the digest over names, types, shapes and bits of tensors (`core.hashing`)."""
SCHEME = "HMAC-SHA-256(salt, 'record:' + id)"
NUMBERS = ("value", "low", "high", "reference", "floor", "original")


@dataclass(frozen=True)
class Exact:
    """What an exact deletion did.

    Attributes:
        switched_off: one entry a shard: `{"shard": 1, "slices": [2], "adapters": ["g3", "g4"]}`.
        manifest: SHA-256 of the manifest that says which record is in which slice.
        before: hash of the weights in force before.
        after: hash of those in force after, the released ones.
        died: shards without a live model left.
        retrained: shards that were trained anew, without the records.
        collateral: samples that are not used for now, though nobody asked.
    """

    switched_off: Sequence[Mapping[str, Any]]
    manifest: str
    before: str
    after: str
    died: Sequence[int] = ()
    retrained: Sequence[int] = ()
    collateral: int | None = None


@dataclass(frozen=True)
class Evidence:
    """Everything a certificate says, before it is signed. Nothing personal belongs in it.

    Attributes:
        kind: evidence class; `classes.evidence_class` tells it from a method's card.
        subjects: released artefacts, `{"name": …, "digest": {algorithm: hex}}`; the one called
            `weights` has the digest `expungeTensors`. `artefact.describe` makes them from files.
        method: `name`, `settings` in force, `seed`, `link`.
        request: `id`, `form`, number of `records`, `received`.
        problem: name of the problem.
        findings: as `finding_row` makes them.
        verdict: `state` and `sentence` of `verdict.row_verdict`.
        untested: what was not tested, in sentences.
        references: retrained models that the findings stand beside, `{"run": …, "seed": …}`.
        exact: what an exact deletion did.
        bound: of a certified result: its guarantee and conditions, as JSON types.
        commitments: salted commitments to the ids of the records, sorted.
        ledger: `seq` and `hash` of the ledger's head when this was issued.
        predecessor: SHA-256 of the certificate of the model before (`certificate.fingerprint`).
        runs: ids of runs in the store, by what they are.
        packages: versions of the packages that were used.
    """

    kind: EvidenceClass
    subjects: Sequence[Mapping[str, Any]]
    method: Mapping[str, Any]
    request: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    findings: Sequence[Mapping[str, Any]] = ()
    verdict: Mapping[str, Any] | None = None
    untested: Sequence[str] = ()
    references: Sequence[Mapping[str, Any]] = ()
    exact: Exact | None = None
    bound: Mapping[str, Any] | None = None
    commitments: Sequence[str] = ()
    ledger: Mapping[str, Any] | None = None
    predecessor: str | None = None
    runs: Mapping[str, Any] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Evidence:
        """Read evidence that another program wrote as JSON.

        Raises:
            UserError: the file cannot be read, or has other fields.
        """
        path = Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            names = ", ".join(f.name for f in fields(cls))
            raise UserError(f"{path} is no evidence ({error}); it has {names}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evidence:
        """Rebuild evidence from JSON types."""
        exact = values.get("exact")
        return cls(**{**values, "exact": None if exact is None else Exact(**exact)})


def statement(evidence: Evidence, issued: str, name: str) -> dict[str, Any]:
    """The in-toto statement of some evidence, with its words.

    Args:
        evidence: what is known.
        issued: when it is signed (ISO 8601, UTC).
        name: id of the certificate.

    Returns:
        JSON types.

    Raises:
        UserError: the evidence contradicts itself, or claims more than its class allows.
    """
    _check(evidence)
    exact = evidence.exact
    predicate: dict[str, Any] = {
        "wording": WORDING,
        "id": name,
        "issued": issued,
        "class": evidence.kind,
        "problem": evidence.problem,
        "request": dict(evidence.request),
        "method": dict(evidence.method),
        "verdict": None if evidence.verdict is None else dict(evidence.verdict),
        "findings": list(evidence.findings),
        "references": list(evidence.references),
        "untested": list(evidence.untested),
        "exact": None
        if exact is None
        else {
            "switchedOff": list(exact.switched_off),
            "manifest": exact.manifest,
            "before": exact.before,
            "after": exact.after,
            "died": list(exact.died),
            "retrained": list(exact.retrained),
            "collateral": exact.collateral,
        },
        "bound": evidence.bound,
        "commitments": {"scheme": SCHEME, "records": sorted(evidence.commitments)},
        "ledger": evidence.ledger,
        "predecessor": evidence.predecessor,
        "runs": dict(evidence.runs),
        "packages": dict(evidence.packages),
    }
    try:
        predicate = plain(predicate)
        subjects = plain(list(evidence.subjects))
    except TypeError as error:
        raise UserError(f"the evidence cannot be written as JSON: {error}") from error
    for part in ("verdict", "findings", "untested"):
        predicate[part] = _quiet(evidence.kind, predicate[part])
    predicate |= words(predicate)
    return {
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": predicate,
    }


def words(predicate: Mapping[str, Any]) -> dict[str, Any]:
    """What a predicate says in words; a function of its facts, so that it can be checked."""
    wording = CLASSES[predicate["class"]]
    return {
        "title": wording.title,
        "says": says(predicate),
        "maySay": list(wording.may_say),
        "mayNotSay": list(wording.may_not_say),
        "restsOn": list(wording.rests_on),
    }


def weights_of(subjects: Sequence[Mapping[str, Any]]) -> str | None:
    """The tensor hash of the subject called `weights`."""
    for one in subjects:
        if one.get("name") == "weights":
            found = (one.get("digest") or {}).get(TENSORS)
            return found if isinstance(found, str) else None
    return None


def weights_subject(digest: str, name: str = "weights") -> dict[str, Any]:
    """The subject of a tensor hash."""
    return {"name": name, "digest": {TENSORS: digest}}


def finding_row(finding: Finding) -> dict[str, Any]:
    """A finding as a certificate shows it: numbers, reference, interval, and how it reads."""
    from expunge.report.explain import explain
    from expunge.report.verdict import judge

    raw = {k: v for k, v in vars(finding).items() if k not in ("name", "per_sample")}
    found, label = judge(finding.name, raw), explain(finding.name, finding.direction).label
    if finding.name.startswith("accuracy/"):  # elsewhere the heading says so
        label = f"accuracy ({label})"
    row: dict[str, Any] = plain({
        "name": finding.name,
        "label": label,
        **{k: raw[k] for k in NUMBERS},
        "direction": finding.direction,
        "reason": finding.reason,
        "state": found.state,
        "reading": found.sentence,
    })
    return row


ALWAYS_UNTESTED = (
    "Attacks that are stronger than those listed, or use knowledge that these do not.",
    "Near copies of the records in data that was kept.",
)


def not_tested(findings: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> list[str]:
    """What was not tested: audits that exist but were not run, and those without a result.

    Args:
        findings: rows of `finding_row`.
        domains: kinds of problem the model belongs to, beside `general`.

    Returns:
        Sentences.
    """
    run = {f["name"].partition("/")[0] for f in findings}
    suited = [n for n, domain in _audits().items() if domain in ("general", *domains)]
    missing = [n for n in suited if n not in run]
    failed = [f for f in findings if f["value"] is None]
    said = [f"{f['label']}: {f['reason'] or 'there is no value'}." for f in failed]
    if missing:
        said.append(f"Audits that were not run: {', '.join(sorted(missing))}.")
    return [*said, *ALWAYS_UNTESTED]


@functools.cache
def _audits() -> dict[str, str]:
    """Kind of problem by audit; looked up once, as other packages' audits are searched for."""
    from expunge.audits import registry

    return {name: registry.get(name).domain for name in registry}


def _check(evidence: Evidence) -> None:
    exact, after = evidence.exact, weights_of(evidence.subjects)
    check_words(evidence.kind, [evidence.problem, str(evidence.request.get("form") or "")])
    if not evidence.subjects:
        raise UserError("a certificate names what was released; there is no subject")
    for one in evidence.subjects:
        if not one.get("name") or not isinstance(one.get("digest"), Mapping) or not one["digest"]:
            raise UserError("a subject needs a name and a digest")
    if not evidence.method.get("name"):
        raise UserError("a certificate names the method")
    if exact is not None and evidence.kind != "exact":
        raise UserError(f"an exact deletion cannot be called {evidence.kind}")
    if exact is not None and after is not None and exact.after != after:
        raise UserError("the weights after the deletion are not those that are released")
    if evidence.kind == "certified" and not evidence.bound:
        raise UserError("a certified result needs its bound and the conditions of it")


def _quiet(kind: EvidenceClass, value: Any) -> Any:
    """Texts that audits wrote, without the words that only an exact result may use."""
    if kind == "exact":
        return value
    if isinstance(value, list):
        return [_quiet(kind, v) for v in value]
    if isinstance(value, dict):  # names stay: they say where to look
        return {k: v if k == "name" else _quiet(kind, v) for k, v in value.items()}
    return FORBIDDEN.sub("[…]", value) if isinstance(value, str) else value

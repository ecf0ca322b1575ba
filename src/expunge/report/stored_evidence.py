"""Evidence about a run of the store, for a certificate: its record, and what audits found."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.core.errors import StoreError, UserError
from expunge.core.request import Request
from expunge.report.artefact import describe
from expunge.report.classes import evidence_class
from expunge.report.statement import (
    Evidence,
    finding_row,
    not_tested,
    weights_of,
    weights_subject,
)
from expunge.report.verdict import row_verdict

if TYPE_CHECKING:
    from expunge.core.needs import Card
    from expunge.store import Run, Store


def evidence_of(store: Store, run: Run, weights: str | Path | None = None, **more: Any) -> Evidence:
    """Gather what a store knows about an unlearning run. Nothing personal is taken over.

    Args:
        store: holds the run and its audits.
        run: of kind `unlearn`.
        weights: file or folder that is released; its tensors must be the run's, or its change.
        **more: further fields of `Evidence`: ledger, predecessor, commitments, …

    Returns:
        The evidence, its class from the method's card and the kind of change.

    Raises:
        StoreError: the run is of another kind.
        UserError: the files hold other weights than the run.
    """
    if run.kind != "unlearn":
        raise StoreError(
            f"run {run.id} is of kind {run.kind}; a certificate is about an unlearning run"
        )
    record = run.record
    card, domain = _card(record["method"])
    intent = card.intent if card else "removal"
    guarantee = card.guarantee if card else "empirical"
    change = (record.get("change") or {}).get("kind", "weights")
    kind = evidence_class(intent, guarantee, change)
    found, references, runs = _findings(store, run)
    verdict = row_verdict({
        "method": run.method,
        "intent": intent,
        # what stands in a certificate must not say more than the weakest of method and change
        "guarantee": "inference-time" if kind == "suppression" else guarantee,
        "findings": found,
    })
    rows = list(runs.pop("rows"))
    request = Request.from_dict(record["request"])
    method = record["method"]
    fields: dict[str, Any] = {
        "kind": kind,
        "subjects": _subjects(run, weights),
        "method": {
            "name": method["name"],
            "settings": method.get("in_force") or {},
            "seed": run.seed,
            "link": card.link if card else None,
        },
        "request": {
            "form": request.form,
            "records": record.get("forgotten"),
            "received": request.time or None,
        },
        "problem": run.problem or "",
        "findings": rows,
        "verdict": {"state": verdict.state, "sentence": verdict.sentence} if rows else None,
        "untested": not_tested(rows, [domain]),
        "references": references,
        "bound": (record.get("details") or {}).get("bound"),
        "runs": {"unlearn": run.id, **runs},
        "packages": record.get("packages") or {},
    }
    return Evidence(**(fields | more))


def committed(ids: Iterable[int | str]) -> tuple[str, list[str]]:
    """A new salt (hex), and the sorted commitments to record ids under it.

    Args:
        ids: of the records; the same scheme as the ledger's.

    Returns:
        The salt, to be kept apart or destroyed, and the commitments for the certificate.
    """
    salt = secrets.token_bytes(32)
    digests = (hmac.new(salt, f"record:{name}".encode(), hashlib.sha256) for name in ids)
    return salt.hex(), sorted(d.hexdigest() for d in digests)


def _findings(
    store: Store, run: Run
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Findings by name as reports judge them, the references, and the audits' ids with the rows."""
    audits = store.audits(run.id)  # newest first
    widest = max(audits, key=lambda a: len(a.parents), default=None)
    if widest is None:
        return {}, [], {"rows": []}
    used = [a for a in reversed(audits) if a.parents[1:] == widest.parents[1:]]
    findings = {f.name: f for a in used for f in store.findings(a.id)}
    references = [{"run": r.id, "seed": r.seed} for r in map(store.get, widest.parents[1:])]
    as_dicts = {
        name: {k: v for k, v in vars(f).items() if k not in ("name", "per_sample")}
        for name, f in findings.items()
    }
    named = {"audit" if i == 0 else f"audit {i + 1}": a.id for i, a in enumerate(used)}
    return as_dicts, references, named | {"rows": [finding_row(f) for f in findings.values()]}


def _subjects(run: Run, weights: str | Path | None) -> list[Mapping[str, Any]]:
    recorded = str(run.record.get("weights") or "")
    if not recorded:
        raise StoreError(f"run {run.id} records no weights")
    changed = (run.record.get("change") or {}).get("hash")
    if weights is None:
        known: list[Mapping[str, Any]] = [weights_subject(recorded)]
        if changed:
            known.append(weights_subject(changed, "change"))
        return known
    found = describe(weights)
    tensors = weights_of(found)
    if tensors not in (recorded, changed) or tensors is None:
        raise UserError(f"{weights} does not hold the weights of run {run.id}, nor its change")
    files: list[Mapping[str, Any]] = [s for s in found if s["name"] != "weights"]
    extra: list[Mapping[str, Any]] = []
    if tensors == changed:
        extra = [weights_subject(changed, "change")]
    return [*files, weights_subject(recorded), *extra]


def _card(method: Mapping[str, Any]) -> tuple[Card | None, str]:
    from expunge.methods import registry

    for name in (method["name"], method.get("class")):
        try:
            found = registry.get(str(name))
            return found.card, found.domain
        except (UserError, AttributeError):
            continue
    return None, "general"

"""A comparison built from stored records and findings alone, for `expunge report`."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

from expunge import __version__
from expunge.core.audit import Finding
from expunge.core.errors import StoreError
from expunge.core.hashing import content_key, plain
from expunge.core.outcome import Cost
from expunge.core.request import Request
from expunge.store import Run, Store
from expunge.suite.compare import Comparison, finding_dict


def comparison_of(store: Store, ids: Sequence[str]) -> Comparison:
    """Gather runs into comparisons, one for each problem and request.

    Args:
        store: holds the runs and their audits.
        ids: ids or unique prefixes of unlearning runs.

    Returns:
        The comparison; rows of the references that were used are added.

    Raises:
        StoreError: a run is no unlearning run, or was never audited.
    """
    groups: dict[str, list[Run]] = {}
    for run in (store.get(i) for i in ids):
        if run.kind != "unlearn":
            raise StoreError(f"run {run.id} is of kind {run.kind}; a report takes unlearning runs")
        request = Request.from_dict(run.record["request"])
        groups.setdefault(content_key([run.record["fingerprint"], request.key]), []).append(run)
    audits = store.runs(kind="audit")
    comparisons = [_comparison(store, runs, audits) for runs in groups.values()]
    return Comparison({
        "expunge": __version__,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": "expunge report",
        "comparisons": plain(comparisons),
        "report": None,
    })


def _comparison(store: Store, runs: Sequence[Run], audits: Sequence[Run]) -> dict[str, Any]:
    references: dict[str, Run] = {}
    rows = []
    for run in runs:
        mine = [a for a in audits if a.parents and a.parents[0] == run.id]  # newest first
        audit = max(mine, key=lambda a: len(a.parents), default=None)
        if audit is None:
            raise StoreError(
                f"run {run.id} was never audited; run expunge audit {run.id[:10]} first"
            )
        own = {r: store.get(r) for r in audit.parents[1:]}
        references |= own
        # one run may have been audited in parts; what was found beside the same references belongs together
        merged = {
            f.name: f
            for a in reversed(mine)
            if a.parents[1:] == audit.parents[1:]
            for f in store.findings(a.id)
        }
        rows.append(_row(run, list(merged.values()), list(own.values())))
    first = runs[0]
    request = Request.from_dict(first.record["request"])
    return {
        "workload": first.problem,
        "title": f"{first.problem}: forget {request}",
        "request": request.to_dict() | {"text": str(request)},
        "classes": None,
        "splits": {"forget-train": first.record.get("forgotten")},
        "references": [
            {"run": r.id, "seed": r.seed, "seconds": r.record["cost"]["seconds"]}
            for r in references.values()
        ],
        "rows": rows,
    }


def _row(run: Run, findings: Sequence[Finding], references: Sequence[Run]) -> dict[str, Any]:
    from expunge.methods import registry

    record = run.record
    retraining = [Cost.read(r.record["cost"]) for r in references]
    card = (
        registry.get(record["method"]["name"]).card
        if record["method"]["name"] in set(registry)
        else None
    )
    return {
        "method": run.method,
        "seed": run.seed,
        "run": run.id,
        "seconds": record["cost"]["seconds"],
        "cost_ratio": Cost.read(record["cost"]).ratio(retraining),
        "intent": card.intent if card else None,
        "guarantee": card.guarantee if card else None,
        "fidelity": card.fidelity if card else None,
        "cost": record["cost"],
        "settings": record["method"],
        "details": record["details"],
        "notes": [record["details"]["stopped"]] if "stopped" in record["details"] else [],
        "curve": record["curve"],
        "findings": {f.name: finding_dict(f) for f in findings},
    }

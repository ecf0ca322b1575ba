"""Evidence as a service would hand it over, one for each class."""

from __future__ import annotations

from dataclasses import replace

from expunge.core.audit import Finding
from expunge.report.classes import CLASSES
from expunge.report.statement import (
    Evidence,
    Exact,
    finding_row,
    not_tested,
    weights_subject,
)

AFTER, BEFORE = "ab" * 32, "cd" * 32
FINDINGS = [
    Finding("accuracy/forget-train", 0.91, low=0.88, high=0.94, reference=0.905, floor=0.02),
    Finding("accuracy/retain-test", 0.953, low=0.94, high=0.965, reference=0.951, floor=0.01),
    Finding("membership/auc-loss", 0.521, low=0.5, high=0.55, reference=0.514, floor=0.02,
            detail={"auc": 0.521, "reference_auc": 0.514}),
    Finding("cost/seconds", 4.0, direction="down", reference=31.0),
    Finding("lira/all", None, reason="no shadow models were trained"),
]  # fmt: skip


def evidence(kind: str = "empirical", **more) -> Evidence:
    rows = [finding_row(f) for f in FINDINGS]
    made = Evidence(
        kind=kind,  # type: ignore[arg-type]
        subjects=[
            {"name": "model.safetensors", "digest": {"sha256": "12" * 32}},
            weights_subject(AFTER),
        ],
        method={"name": "exact-shards" if kind == "exact" else "ssd", "seed": 0,
                "settings": {"alpha": 10.0, "mask": None, "layers": ["fc1", "head"]},
                "link": "https://arxiv.org/abs/2308.07707"},
        request={"id": "01hzy4m6w8d2k3v9q0x5c7b1ra", "form": "ids", "records": 12,
                 "received": "2026-11-22T08:00:00.000+00:00"},
        problem="digits",
        findings=rows,
        verdict={"state": "matches", "sentence": "behaves like a model retrained without the data"},
        untested=not_tested(rows, ["classification"]),
        references=[{"run": "01ref1", "seed": 1001}, {"run": "01ref2", "seed": 1002}],
        commitments=["ff" * 32, "00" * 32],
        ledger={"seq": 41, "hash": "9e" * 32},
        predecessor="77" * 32,
        runs={"unlearn": "01hzy4m6w8d2k3v9q0x5c7b1rb"},
        packages={"python": "3.11.2", "torch": "2.13.0"},
    )  # fmt: skip
    if kind == "exact":
        made = replace(made, exact=Exact(
            [{"shard": 1, "slices": [2], "adapters": ["shard1/0-2", "shard1/0-2-3"]},
             {"shard": 2, "slices": [0, 3], "adapters": ["shard2/1-0"]}],
            manifest="5a" * 32, before=BEFORE, after=AFTER, died=[2], collateral=188,
        ))  # fmt: skip
    if kind == "certified":
        made = replace(made, bound={"epsilon": 0.5, "delta": 1e-6, "loss": "convex, L2 0.01"})
    return replace(made, **more)


KINDS = tuple(CLASSES)

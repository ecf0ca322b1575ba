"""What further audits see is named beside a verdict that the accuracies alone would praise."""

from __future__ import annotations

from expunge.report.verdict import closer


def test_audits_of_features_and_memory_speak():
    finding = {"direction": "reference", "low": None, "high": None, "detail": {}}
    names = {
        "recovery/forget": (0.93, 0.51, 0.93),
        "representation/cka-original": (1.0, 0.3, 1.0),
        "memorised-fraction/limit": (1.0, 0.1, 1.0),
    }
    row = {
        "method": "x",
        "findings": {
            n: finding | {"value": v, "reference": r, "original": o}
            for n, (v, r, o) in names.items()
        },
    }
    assert set(closer(row)) == set(names)

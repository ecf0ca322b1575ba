"""Audits, one file each. `audits.Accuracy` and the name `"accuracy"` resolve lazily."""

from __future__ import annotations

from typing import Any

from expunge.core.registry import Registry

registry = Registry(
    "audit",
    {
        "accuracy": "expunge.audits.accuracy:Accuracy",
        "prediction-matrix": "expunge.audits.prediction_matrix:PredictionMatrix",
        "divergence": "expunge.audits.divergence:Divergence",
        "membership": "expunge.audits.membership:Membership",
        "cka": "expunge.audits.cka:CKA",
        "weight-distance": "expunge.audits.weight_distance:WeightDistance",
        "cost": "expunge.audits.cost:CostAudit",
    },
    group="expunge.audits",
)

SUITES = {"standard": tuple(registry), "quick": ("accuracy", "cost")}
"""Named groups of audits."""


def __getattr__(name: str) -> Any:
    return registry.by_class(name)


def __dir__() -> list[str]:
    return registry.class_names()

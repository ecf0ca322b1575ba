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
        "privacy-score": "expunge.audits.privacy_score:PrivacyScore",
        "corrective": "expunge.audits.corrective:Corrective",
        "nomus": "expunge.audits.nomus:NoMUS",
        "lira": "expunge.audits.lira:LiRA",
        "rmia": "expunge.audits.rmia:RMIA",
        "u-lira": "expunge.audits.u_lira:ULiRA",
        "cka": "expunge.audits.cka:CKA",
        "weight-distance": "expunge.audits.weight_distance:WeightDistance",
        "norm-statistics": "expunge.audits.norm_statistics:NormStatistics",
        "cost": "expunge.audits.cost:CostAudit",
        "regression-error": "expunge.audits.regression_error:RegressionError",
        "wasserstein": "expunge.audits.wasserstein:Wasserstein",
        "residual-membership": "expunge.audits.residual_membership:ResidualMembership",
        "representation": "expunge.audits.representation:Representation",
        "recovery": "expunge.audits.recovery:Recovery",
        "relearn-time": "expunge.audits.relearn_time:RelearnTime",
        "klom": "expunge.audits.klom:KLoM",
        "memorised-fraction": "expunge.audits.memorised_fraction:MemorisedFraction",
        "memorisation": "expunge.audits.memorisation:Memorisation",
        "rouge": "expunge.audits.rouge:Rouge",
        "truth-ratio": "expunge.audits.truth_ratio:TruthRatio",
        "extraction-likelihood": "expunge.audits.extraction:ExtractionLikelihood",
        "text-membership": "expunge.audits.text_membership:TextMembership",
        "ches": "expunge.audits.ches:CHES",
        "in-context": "expunge.audits.in_context:InContext",
        "in-context-images": "expunge.audits.in_context_images:InContextImages",
    },
    group="expunge.audits",
)

ASKED_FOR = (
    "corrective",
    "nomus",
    "lira",
    "rmia",
    "u-lira",
    "relearn-time",
    "recovery",
    "extraction-likelihood",
    "in-context",
    "in-context-images",
    "ches",
    "klom",
)
"""Audits that train models anew, ask one many times over, want many models, are about pairs of answers
that a method is to be given, about data that was manipulated or about people of whom some were set apart, and so
run only when they are named."""
SUITES = {
    "standard": tuple(name for name in registry if name not in ASKED_FOR),
    "quick": ("accuracy", "regression-error", "memorisation", "cost"),
}
"""Named groups of audits; what is for another kind of problem is left out."""


def __getattr__(name: str) -> Any:
    return registry.by_class(name)


def __dir__() -> list[str]:
    return registry.class_names()

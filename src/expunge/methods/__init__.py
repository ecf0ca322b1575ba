"""Unlearning methods, one file each. `methods.SSD` and the name `"ssd"` resolve lazily."""

from __future__ import annotations

from typing import Any

from expunge.core.registry import Registry

registry = Registry(
    "method",
    {
        "retrain": "expunge.methods.general.retrain:Retrain",
        "finetune": "expunge.methods.general.finetune:FineTune",
        "gradient-ascent": "expunge.methods.general.gradient_ascent:GradientAscent",
        "neggrad-plus": "expunge.methods.general.neggrad_plus:NegGradPlus",
        "random-label": "expunge.methods.general.random_label:RandomLabel",
        "amnesiac": "expunge.methods.general.amnesiac:Amnesiac",
        "amnesiac-updates": "expunge.methods.general.amnesiac_updates:AmnesiacUpdates",
        "bad-teacher": "expunge.methods.general.bad_teacher:BadTeacher",
        "unsir": "expunge.methods.general.unsir:UNSIR",
        "boundary-shrink": "expunge.methods.general.boundary_shrink:BoundaryShrink",
        "boundary-expand": "expunge.methods.general.boundary_expand:BoundaryExpand",
        "guided-unlearning": "expunge.methods.general.guided_unlearning:GuidedUnlearning",
        "scrub": "expunge.methods.general.scrub:SCRUB",
        "modhifi-u": "expunge.methods.general.modhifi_u:ModHiFiU",
        "salun": "expunge.methods.general.salun:SalUn",
        "blindspot": "expunge.methods.regression.blindspot:Blindspot",
        "gaussian-amnesiac": "expunge.methods.regression.gaussian_amnesiac:GaussianAmnesiac",
        "ssd": "expunge.methods.general.ssd:SSD",
        "l1-sparse": "expunge.methods.general.l1_sparse:L1Sparse",
        "influence": "expunge.methods.general.influence:Influence",
        "fisher-forgetting": "expunge.methods.general.fisher_forgetting:FisherForgetting",
        "iau": "expunge.methods.general.iau:IAU",
        "laf": "expunge.methods.general.laf:LAF",
        "oracle-matching": "expunge.methods.general.oracle_matching:OracleMatching",
        "datamodel-matching": "expunge.methods.general.datamodel_matching:DatamodelMatching",
        "dm-direct": "expunge.methods.general.dm_direct:DMDirect",
        "npo": "expunge.methods.text.npo:NPO",
        "dpo": "expunge.methods.text.dpo:DPO",
        "idk-dpo": "expunge.methods.text.idk_dpo:IdkDPO",
        "altpo": "expunge.methods.text.altpo:AltPO",
        "pdu": "expunge.methods.text.pdu:PDU",
        "rmu": "expunge.methods.text.rmu:RMU",
        "grad-diff": "expunge.methods.text.grad_diff:GradDiff",
        "kl-min": "expunge.methods.text.kl_min:KLMin",
        "simnpo": "expunge.methods.text.simnpo:SimNPO",
        "wga": "expunge.methods.text.wga:WGA",
        "satimp": "expunge.methods.text.satimp:SatImp",
        "ceu": "expunge.methods.text.ceu:CEU",
        "undial": "expunge.methods.text.undial:UNDIAL",
        "task-vector": "expunge.methods.text.task_vector:TaskVector",
        "whp": "expunge.methods.text.whp:WHP",
        "llmu": "expunge.methods.text.llmu:LLMU",
        "code-eraser": "expunge.methods.text.code_eraser:CodeEraser",
        "eco": "expunge.methods.text.eco:ECO",
        "guard": "expunge.methods.text.guard:Guard",
        "o3": "expunge.methods.text.o3:O3",
        "concept-mask": "expunge.methods.text.concept_mask:ConceptMask",
        "concept-poison": "expunge.methods.general.concept_poison:ConceptPoison",
    },
    group="expunge.methods",
)


def __getattr__(name: str) -> Any:
    return registry.by_class(name)


def __dir__() -> list[str]:
    return registry.class_names()

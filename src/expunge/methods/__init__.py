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
        "scrub": "expunge.methods.general.scrub:SCRUB",
        "salun": "expunge.methods.general.salun:SalUn",
        "ssd": "expunge.methods.general.ssd:SSD",
    },
    group="expunge.methods",
)


def __getattr__(name: str) -> Any:
    return registry.by_class(name)


def __dir__() -> list[str]:
    return registry.class_names()

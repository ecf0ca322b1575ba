"""Remove the influence of chosen data from trained models, and show how far it got.

    import expunge as xp
    problem = xp.Classification(model, train, test, recipe=recipe)
    request = xp.forget(label=3)
    outcome = xp.unlearn(problem, request, xp.methods.SSD())
    findings = xp.audit(outcome, "standard", references=3)
    comparison = xp.compare(problem, request, ["retrain", "finetune", "ssd"])

Public names load what they need when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_PUBLIC = {
    "Audit": "expunge.core.audit",
    "Batch": "expunge.core.data",
    "Card": "expunge.core.needs",
    "CausalLM": "expunge.problems.causal_lm",
    "Classification": "expunge.problems.classification",
    "ClassifierRecipe": "expunge.train.recipe",
    "Comparison": "expunge.suite.compare",
    "Cost": "expunge.core.outcome",
    "Data": "expunge.core.data",
    "Deviation": "expunge.core.needs",
    "ExpungeError": "expunge.core.errors",
    "Finding": "expunge.core.audit",
    "Method": "expunge.core.method",
    "Needs": "expunge.core.needs",
    "Outcome": "expunge.core.outcome",
    "Problem": "expunge.core.problem",
    "Regression": "expunge.problems.regression",
    "RegressorRecipe": "expunge.train.recipe",
    "Request": "expunge.core.request",
    "Runtime": "expunge.core.runtime",
    "Sharded": "expunge.exact.sharded",
    "Store": "expunge.store",
    "Subject": "expunge.core.audit",
    "TokenData": "expunge.problems.tokens",
    "UserError": "expunge.core.errors",
    "View": "expunge.core.view",
    "audit": "expunge.suite.compare",
    "audit_model": "expunge.suite.foreign",
    "compare": "expunge.suite.compare",
    "difficulty": "expunge.fleet.difficulty",
    "encode": "expunge.problems.encoding",
    "forget": "expunge.core.request",
    "load": "expunge.core.outcome",
    "load_lm": "expunge.problems.lm_on_disk",
    "prepare": "expunge.core.method",
    "prune": "expunge.train.prune",
    "setting": "expunge.core.settings",
    "suggest": "expunge.suite.suggest",
    "tune": "expunge.suite.tune",
    "unlearn": "expunge.core.method",
    "unlearn_sequence": "expunge.suite.sequence",
}
_MODULES = ("audits", "methods", "workloads")

__all__ = sorted([*_PUBLIC, *_MODULES])

if TYPE_CHECKING:
    from expunge import audits, methods, workloads
    from expunge.core.audit import Audit, Finding, Subject
    from expunge.core.data import Batch, Data
    from expunge.core.errors import ExpungeError, UserError
    from expunge.core.method import Method, prepare, unlearn
    from expunge.core.needs import Card, Deviation, Needs
    from expunge.core.outcome import Cost, Outcome, load
    from expunge.core.problem import Problem
    from expunge.core.request import Request, forget
    from expunge.core.runtime import Runtime
    from expunge.core.settings import setting
    from expunge.core.view import View
    from expunge.exact.sharded import Sharded
    from expunge.fleet.difficulty import difficulty
    from expunge.problems.causal_lm import CausalLM
    from expunge.problems.classification import Classification
    from expunge.problems.encoding import encode
    from expunge.problems.lm_on_disk import load_lm
    from expunge.problems.regression import Regression
    from expunge.problems.tokens import TokenData
    from expunge.store import Store
    from expunge.suite.compare import Comparison, audit, compare
    from expunge.suite.foreign import audit_model
    from expunge.suite.sequence import unlearn_sequence
    from expunge.suite.suggest import suggest
    from expunge.suite.tune import tune
    from expunge.train.prune import prune
    from expunge.train.recipe import ClassifierRecipe, RegressorRecipe


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"expunge.{name}")
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

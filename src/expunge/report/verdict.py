"""Verdicts: what a finding means beside its reference, and a row or comparison in words.

Pure functions of the report's dict. A gap within the tolerance is no gap; the tolerance is the
largest of the references' own spread, half the interval, and a fixed floor (0.02, for membership
0.03). Forgetting *more* than a retrained model is a leak and is called one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["matches", "short", "overshoot", "lost", "worse", "unjudged"]

WORDS: dict[str, str] = {
    "matches": "like retraining",
    "short": "not forgotten",
    "overshoot": "over-forgotten",
    "lost": "utility lost",
    "worse": "further away",
    "unjudged": "no verdict",
}
MARKS: dict[str, str] = {
    "matches": "●",
    "short": "▲",
    "overshoot": "◆",
    "lost": "▼",
    "worse": "△",
    "unjudged": "○",
}
_FORGET = ("accuracy/forget-test", "accuracy/forget-train", "membership/auc-loss")
_KEEP = ("accuracy/retain-test", "accuracy/retain-train")


@dataclass(frozen=True)
class Judgement:
    """A state and the sentence that explains it."""

    state: State
    sentence: str


def judge(name: str, finding: Mapping[str, Any]) -> Judgement:
    """Judge one finding against its reference.

    Args:
        name: the finding's name, e.g. `accuracy/forget-test`.
        finding: its dict, as in `report.json`.

    Returns:
        `matches` within the tolerance; `short` if it stays on the original's side; `overshoot`
        beyond the reference; `lost` for kept data below the reference; `worse` for a distance
        above that among references; `unjudged` without value or reference.
    """
    value, reference = finding.get("value"), finding.get("reference")
    if value is None or reference is None:
        return Judgement("unjudged", str(finding.get("reason") or "there is no reference"))
    detail = finding.get("detail") or {}
    signed = detail.get("auc") is not None and detail.get("reference_auc") is not None
    here = float(detail["auc"] if signed else value)
    there = float(detail["reference_auc"] if signed else reference)
    gap, allowed = here - there, tolerance(name, finding)
    numbers = f"{here:.3g} against {there:.3g} for retrained models"
    if finding.get("direction") in ("down", "up"):
        away = gap if finding["direction"] == "down" else -gap
        if away <= allowed:
            return Judgement(
                "matches", f"as close as retrained models are to each other ({numbers})"
            )
        return Judgement(
            "worse", f"further away than retrained models are from each other ({numbers})"
        )
    if abs(gap) <= allowed:
        return Judgement("matches", f"as in a retrained model ({numbers})")
    if name in _KEEP:
        if gap < 0:
            return Judgement("lost", f"accuracy on what was to be kept is lost ({numbers})")
        return Judgement("matches", f"no worse than a retrained model ({numbers})")
    original = detail.get("original_auc") if signed else finding.get("original")
    toward = 1.0 if original is None else original - there
    if signed and abs(toward) < allowed:
        toward = 1.0  # the original does not say which side is memory; higher looks like a member
    if gap * toward > 0:
        return Judgement("short", f"still on the original's side ({numbers})")
    return Judgement(
        "overshoot", f"forgets more than a model that never saw the data: a leak ({numbers})"
    )


def tolerance(name: str, finding: Mapping[str, Any]) -> float:
    """The gap that counts as none: references' spread, half the interval, or a fixed floor."""
    low, high = finding.get("low"), finding.get("high")
    half = (high - low) / 2 if low is not None and high is not None else 0.0
    fixed = 0.03 if name.startswith("membership/") else 0.02
    if finding.get("direction") in ("down", "up"):
        # distances have no common scale: a quarter of the distance among references
        away = finding["direction"] == "down"
        fixed = 0.25 * abs(finding.get("reference") or 0.0) if away else 0.05
    return max(float(finding.get("floor") or 0.0), half, fixed)


def row_verdict(row: Mapping[str, Any]) -> Judgement:
    """One verdict for a method: utility first, then what was to be forgotten.

    Args:
        row: a row of a comparison.

    Returns:
        The gravest state among accuracy on kept data, accuracy on forgotten data and membership.
    """
    judged = {n: judge(n, f) for n, f in row["findings"].items() if n in (*_KEEP, *_FORGET)}
    for name in _KEEP:
        if name in judged and judged[name].state == "lost":
            return judged[name]
    for state in ("short", "overshoot"):
        for name in _FORGET:
            if name in judged and judged[name].state == state:
                return Judgement(judged[name].state, f"{name}: {judged[name].sentence}")
    usable = [j for j in judged.values() if j.state != "unjudged"]
    if not usable:
        why = next((j.sentence for j in judged.values()), "nothing was measured")
        return Judgement("unjudged", why)
    return Judgement(
        "matches", "behaves like a model retrained without the data, as far as these audits see"
    )


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """The outcome of a comparison in sentences, for people.

    Args:
        comparison: one entry of `comparisons`.

    Returns:
        At most one sentence for each kind of outcome, the good news first.
    """
    rows = [r for r in comparison["rows"] if r["method"] not in ("original", "retrain")]
    groups: dict[str, list[str]] = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        groups.setdefault(method_state(own), []).append(method + _price(own))
    said = []
    phrases = {
        "matches": "{} {} like a model retrained without the data, as far as these audits see.",
        "short": "{} {} not forgotten as retraining does.",
        "overshoot": "{} {} more than a model that never saw the data; that is a leak of its own.",
        "lost": "{} {} accuracy on what was to be kept.",
        "unjudged": "{} {} no verdict: there is no retrained reference.",
    }
    verbs = {"matches": ("behaves", "behave"), "short": ("has", "have"), "overshoot": ("forgets", "forget"), "lost": ("lost", "lost"), "unjudged": ("gets", "get")}  # fmt: skip
    for state, phrase in phrases.items():
        if names := groups.get(state):
            said.append(phrase.format(_list(names), verbs[state][len(names) > 1]))
    if differing := _differing([r for r in rows if row_verdict(r).state == "matches"]):
        said.append(
            f"Seen more closely, {_list(differing)} still {'differs' if len(differing) == 1 else 'differ'} "
            "from retrained models on the forgotten samples by more than those do from each other."
        )
    original = next((r for r in comparison["rows"] if r["method"] == "original"), None)
    findings = (original or {"findings": {}})["findings"]
    found = findings.get("accuracy/forget-test") or {}
    if found.get("value") is None:
        found = findings.get("accuracy/forget-train") or {}
    if found.get("value") is not None and found.get("reference") is not None:
        said.insert(0, f"The original is right on {found['value']:.1%} of what is to be forgotten, retrained models on {found['reference']:.1%}.")  # fmt: skip
    return said or ["No method was run."]


def method_state(rows: Sequence[Mapping[str, Any]]) -> State:
    """The gravest verdict over a method's seeds."""
    order: tuple[State, ...] = ("lost", "short", "overshoot", "unjudged", "matches")
    states = [row_verdict(r).state for r in rows]
    return next((s for s in order if s in states), "unjudged")


def _differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods whose predictions on forgotten samples are further from retrained ones than noise."""
    name = "divergence/js-forget-train"
    return list(
        dict.fromkeys(
            f"{r['method']} (JS {r['findings'][name]['value']:.2g} against {r['findings'][name]['reference']:.2g} nats)"
            for r in rows
            if name in r["findings"] and judge(name, r["findings"][name]).state == "worse"
        )
    )


def _price(rows: Sequence[Mapping[str, Any]]) -> str:
    ratios = [r["cost_ratio"] for r in rows if r.get("cost_ratio") is not None]
    if not ratios:
        return ""
    ratio = sum(ratios) / len(ratios)
    return f" (at {ratio:.2g}× the time of retraining)"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

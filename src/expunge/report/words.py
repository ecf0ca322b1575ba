"""A comparison in sentences: which methods forget as retraining does, which do not, at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from expunge.report.explain import explain
from expunge.report.verdict import State, claim, closer, finite, method_verdict, row_verdict

Rows = Sequence[Mapping[str, Any]]

SHOWN = ("original", "retrain")
"""Rows that are no methods under comparison: the model before, and the reference itself."""


def by_method(comparison: Mapping[str, Any]) -> dict[str, Rows]:
    """Rows of each method, in the comparison's order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in comparison["rows"]:
        found.setdefault(row["method"], []).append(row)
    return dict(found)


def summary(comparison: Mapping[str, Any]) -> list[str]:
    """The outcome of a comparison in sentences, for people.

    Args:
        comparison: one entry of `comparisons`.

    Returns:
        What the original and retrained models know, then at most one sentence for each kind of
        outcome, the good news first. No sentence claims more than the audits can see.
    """
    return [sentence for _, sentence in told(comparison)]


def told(comparison: Mapping[str, Any]) -> list[tuple[State | None, str]]:
    """The sentences of `summary`, each with the state it is about."""
    groups: dict[State, dict[str, Rows]] = {}
    for method, rows in by_method(comparison).items():
        if method not in SHOWN:
            groups.setdefault(method_verdict(rows).state, {})[method] = rows
    said: list[tuple[State | None, str]] = []
    if before := _before(comparison):
        said.append((None, before))
    said += _matching(groups.get("matches", {}))
    for state, one, many in (
        ("short", "has not forgotten as retraining does.", "have not forgotten as retraining does."),
        ("overshoot", "forgets more than a model that never saw the data: a leak of its own.", "forget more than a model that never saw the data: a leak of its own."),
        ("worse", "differs from retrained models on what was to be forgotten; the audits at hand cannot say to which side.", "differ from retrained models on what was to be forgotten; the audits at hand cannot say to which side."),
        ("lost", "lost accuracy on what was to be kept.", "lost accuracy on what was to be kept."),
    ):  # fmt: skip
        if found := groups.get(state):  # type: ignore[call-overload]
            names = [named(m, rows) for m, rows in found.items()]
            said.append((state, f"{_brief(names)} {one if len(names) == 1 else many}"))  # type: ignore[arg-type]
            if state == "lost":
                said += _lost_and(found)
    reasons: dict[str, list[str]] = {}
    for method, rows in groups.get("unjudged", {}).items():
        reasons.setdefault(method_verdict(rows).sentence, []).append(named(method, rows))
    for reason, names in reasons.items():
        said.append(("unjudged", f"{_brief(names)} {'gets' if len(names) == 1 else 'get'} no verdict: {reason}."))  # fmt: skip
    return said if groups else [*said, (None, "No method was run.")]


def headline(comparison: Mapping[str, Any]) -> str:
    """One line over all methods, for a page with several comparisons."""
    methods = {m: r for m, r in by_method(comparison).items() if m not in SHOWN}
    if not methods:
        return "no method was run"
    states = {m: method_verdict(rows).state for m, rows in methods.items()}
    if set(states.values()) == {"unjudged"}:
        return f"{len(methods)} methods, none of them with a verdict"
    good = [m for m, s in states.items() if s == "matches"]
    if not good:
        return f"none of {len(methods)} methods behaves like retraining"
    rest = "" if len(good) > 6 else f": {listed(good)}"
    return f"{len(good)} of {len(methods)} {'behaves' if len(good) == 1 else 'behave'} like retraining{rest}"


def named(method: str, rows: Rows) -> str:
    """A method with its price, and how many seeds share the verdict."""
    notes = []
    ratios = [r for row in rows if (r := finite(row.get("cost_ratio"))) is not None]
    if ratios:
        notes.append(f"{times(sum(ratios) / len(ratios))} the time of retraining")
    state = method_verdict(rows).state
    same = sum(row_verdict(r).state == state for r in rows)
    if same < len(rows):
        notes.append(f"in {same} of {len(rows)} seeds")
    return f"{method} ({', '.join(notes)})" if notes else method


def times(ratio: float) -> str:
    """A ratio as people write it: 0.08×, 1.3×, 12×."""
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.2g}×"


def _brief(names: Sequence[str]) -> str:
    """Join named methods; only the first says what its price is relative to."""
    rest = [n.replace("× the time of retraining", "×") for n in names[1:]]
    return listed([*names[:1], *rest])


def listed(names: Sequence[str]) -> str:
    """Join names with commas and a last `and`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _before(comparison: Mapping[str, Any]) -> str:
    original = next((r for r in comparison["rows"] if r["method"] == "original"), None)
    findings = (original or {"findings": {}})["findings"]
    for split, what in (("test", "unseen samples of what is to be forgotten"), ("train", "the samples to be forgotten")):  # fmt: skip
        finding = findings.get(f"accuracy/forget-{split}") or {}
        value, reference = finite(finding.get("value")), finite(finding.get("reference"))
        if value is not None and reference is not None:
            return f"The original is right on {value:.1%} of {what}, retrained models on {reference:.1%}: that is the aim, no less and no more."
        if value is not None:
            return f"The original is right on {value:.1%} of {what}."
        finding = findings.get(f"regression-error/mae-forget-{split}") or {}
        value, reference = finite(finding.get("value")), finite(finding.get("reference"))
        if value is not None and reference is not None:
            return f"The original is off by {value:.3g} on average on {what}, retrained models by {reference:.3g}: that is the aim, no less and no more."
        if value is not None:
            return f"The original is off by {value:.3g} on average on {what}."
    return ""


def _matching(found: Mapping[str, Rows]) -> list[tuple[State | None, str]]:
    """Methods that match, one sentence for each kind of claim, and where they still differ."""
    claims: dict[str, list[str]] = {}
    for method, rows in found.items():
        claims.setdefault(claim(rows[0]), []).append(named(method, rows))
    plural = (("behaves ", "behave "), ("answers ", "answer "), ("its result was", "their results were"), ("is certified under its", "are certified under their"), ("it suppresses", "they suppress"))  # fmt: skip
    said: list[tuple[State | None, str]] = []
    for words, names in claims.items():
        joint = ":" if words.startswith("its ") else ""
        for one, many in plural if len(names) > 1 else ():
            words = words.replace(one, many, 1)
        said.append(("matches", f"{_brief(names)}{joint} {words}."))
    differing = [f"{m} ({finer})" for m, rows in found.items() if (finer := _finer(rows))]
    if differing:
        verb = "differs" if len(differing) == 1 else "differ"
        said.append(("worse", f"Seen more closely, {listed(differing)} still {verb} from retrained models by more than those do from each other."))  # fmt: skip
    return said


def _finer(rows: Rows) -> str:
    """The first finding, with its numbers, in which the first differing seed still differs."""
    row = next((r for r in rows if closer(r)), None)
    if row is None:
        return ""
    names = sorted(closer(row), key=lambda n: n != "divergence/js-forget-train")
    finding = row["findings"][names[0]]
    more = len(names) - 1
    rest = f" and {more} more finding{'s' if more > 1 else ''}" if more else ""
    return (
        f"{explain(names[0]).label} {finding['value']:.2g} against {finding['reference']:.2g}{rest}"
    )


def _lost_and(found: Mapping[str, Rows]) -> list[tuple[State | None, str]]:
    said: list[tuple[State | None, str]] = []
    for words, state, end in (
        ("not forgotten either", "short", "not forgotten as retraining does either"),
        ("over-forgotten too", "overshoot", "forgotten more than retraining does, too"),
    ):
        names = [m for m, rows in found.items() if any(words in row_verdict(r).sentence for r in rows)]  # fmt: skip
        if names:
            verb = "has" if len(names) == 1 else "have"
            of = "" if len(names) == len(found) else "Of these, "
            said.append((state, f"{of}{listed(names)} {verb} {end}."))  # type: ignore[arg-type]
    return said

"""Verdicts: what one finding means beside its reference, and what that makes of a method.

Pure functions of the report's dict. The rule, in one place:

- The tolerance is the largest of the references' own spread, half the 95 % interval, and a fixed
  floor: 0.02, for membership 0.03, for errors 0.02 standard deviations of the targets. A gap
  within it is no gap.
- Toward the reference: within the tolerance `matches`; on the original's side `short`; beyond the
  reference `overshoot`, since forgetting more than a model that never saw the data is a leak.
- Kept data is not to be forgotten: accuracy below the reference, or an error above it, is `lost`;
  the other side is fine.
- Two-sided AUCs do not say which side they are on; the raw AUC in `detail` does. Without it a gap
  is `worse`, and the sentence says that the side is unknown.
- Distances (`down`, `up`) are held against the distance among references: `matches` or `worse`.
- A method's verdict rests on the accuracies (or mean errors) and one membership AUC; what further
  audits see is said
  beside it.
- Weights moved and prices paid are no forgetting: they get no verdict (dearer than retraining: `worse`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

State = Literal["matches", "short", "overshoot", "lost", "worse", "unjudged"]

WORDS: dict[str, str] = {
    "matches": "like retraining",
    "short": "not forgotten",
    "overshoot": "over-forgotten",
    "lost": "utility lost",
    "worse": "further away",
    "unjudged": "no verdict",
}
"""A state in two words."""
MARKS: dict[str, str] = {
    "matches": "●",
    "short": "▲",
    "overshoot": "◆",
    "lost": "▼",
    "worse": "△",
    "unjudged": "○",
}
"""A shape for each state, so that colour is never alone."""
NO_REFERENCE = "there is no retrained reference to compare with"
FLOOR, FLOOR_MEMBERSHIP = 0.02, 0.03
"""Gaps too small to matter, for accuracies and for AUCs."""
ERRORS = "regression-error/"
"""Findings in which more is worse."""
MEMBERSHIP = ("membership/", "residual-membership/", "lira/", "rmia/", "u-lira/", "nomus/mia")
_SLACK = 1e-9  # 0.94 − 0.92 is a little more than 0.02 in binary


class Judgement(NamedTuple):
    """A state and the sentence that explains it."""

    state: State
    sentence: str


def judge(name: str, finding: Mapping[str, Any]) -> Judgement:
    """Judge one finding against its reference.

    Args:
        name: the finding's name, e.g. `accuracy/forget-test`.
        finding: its dict, as in `report.json`.

    Returns:
        `matches` within the tolerance; `short` on the original's side; `overshoot` beyond the
        reference; `lost` for accuracy on kept data below it; `worse` for a distance above that
        among references, or a gap whose side is unknown; `unjudged` without value or reference.
    """
    value, reference = finite(finding.get("value")), finite(finding.get("reference"))
    if value is None:
        return Judgement("unjudged", str(finding.get("reason") or "it was not measured"))
    if name.startswith("cost/"):
        return _price(value, reference)
    if reference is None:
        return Judgement("unjudged", str(finding.get("reason") or NO_REFERENCE))
    if name.startswith("weight-distance/"):
        numbers = f"{value:.3g} beside {reference:.3g} for retrained models"
        return Judgement("unjudged", f"how much was changed, not what was forgotten ({numbers})")
    if name.startswith("corrective/"):
        return Judgement(
            "unjudged",
            f"{value:.3g}; retrained without the known part {reference:.3g}, which is not the goal",
        )
    if name == "nomus/score":
        return Judgement(
            "unjudged",
            f"{value:.3g} beside {reference:.3g} for retrained models; one answer for everything may score as high, "
            "so its two parts are judged",
        )
    if finding.get("direction") in ("down", "up"):
        return _distance(name, finding, value, reference)
    return _toward(name, finding, value, reference)


def tolerance(name: str, finding: Mapping[str, Any]) -> float:
    """The gap to the reference that counts as none.

    Args:
        name: the finding's name.
        finding: its dict.

    Returns:
        The largest of the references' spread, half the interval and a fixed floor. Distances have
        no common scale, so theirs is a quarter of the distance among references (of a similarity:
        0.05), and their spread is how far its maximum lies above its mean.
    """
    detail = finding.get("detail") or {}
    raw = finite(detail.get("auc")) is not None
    low = finite(detail.get("auc_low") if raw and "auc_low" in detail else finding.get("low"))
    high = finite(detail.get("auc_high") if raw and "auc_high" in detail else finding.get("high"))
    half = (high - low) / 2 if low is not None and high is not None else 0.0
    spread = finite(detail.get("reference_auc_spread") if raw else finding.get("floor"))
    spread = spread or finite(finding.get("floor")) or 0.0
    reference = finite(finding.get("reference")) or 0.0
    if finding.get("direction") == "down":
        return max(spread - reference, half, 0.25 * abs(reference))
    if finding.get("direction") == "up":
        return max(spread, half, 0.05)
    if name.startswith(ERRORS):
        return max(spread, half, FLOOR * (finite(detail.get("scale")) or 1.0))
    return max(spread, half, FLOOR_MEMBERSHIP if name.startswith(MEMBERSHIP) else FLOOR)


def row_verdict(row: Mapping[str, Any]) -> Judgement:
    """One verdict for one run: what was to be kept first, then what was to be forgotten.

    Args:
        row: a row of a comparison.

    Returns:
        The gravest state among the accuracies and one membership AUC, in words that claim no more
        than the method's guarantee allows; `closer` names what the other audits see. `unjudged`
        unless something was judged on forgotten *and* on kept data: half the evidence is none.
    """
    judged = {n: judge(n, row["findings"][n]) for n in decisive(row)}
    faults = {s: next((n for n, j in judged.items() if j.state == s), None) for s in _GRAVE}
    if faults["lost"]:
        sentence = f"{faults['lost']}: {judged[faults['lost']].sentence}"
        also = faults["short"] or faults["overshoot"]
        if also:
            what = "not forgotten either" if faults["short"] else "over-forgotten too"
            sentence += f"; and {what}: {also}: {judged[also].sentence}"
        return Judgement("lost", sentence)
    for state in ("short", "overshoot", "worse"):
        if name := faults[state]:
            return Judgement(judged[name].state, f"{name}: {judged[name].sentence}")
    if judged and all(j.state == "unjudged" for j in judged.values()):
        # what was measured says best why there is no verdict
        measured = [n for n in judged if finite(row["findings"][n].get("value")) is not None]
        return judged[next(iter(measured or judged))]
    for side in ("forget", "retain"):
        own = [j for n, j in judged.items() if (side == "retain") == kept(n)]
        if all(j.state == "unjudged" for j in own):
            said = "to be forgotten" if side == "forget" else "to be kept"
            why = next((j.sentence for j in own), "it was not measured")
            return Judgement("unjudged", f"nothing to judge by on what was {said}: {why}")
    if row.get("method") != "retrain" and not telling(row, judged):
        return Judgement(
            "unjudged",
            "these audits cannot tell the original from a retrained model here: the request is too "
            "small, or the original does not remember it",
        )
    finer = closer(row)
    but = f"; seen more closely it still differs in {', '.join(finer)}" if finer else ""
    return Judgement("matches", claim(row) + but)


def telling(row: Mapping[str, Any], judged: Mapping[str, Judgement]) -> bool:
    """Whether some audit of forgotten data would have called the original not forgotten.

    Without that a match says nothing: doing nothing would have matched as well.
    """
    for name in judged:
        finding = row["findings"][name]
        original, reference = finite(finding.get("original")), finite(finding.get("reference"))
        if kept(name) or reference is None:
            continue
        if original is None or abs(original - reference) > tolerance(name, finding):
            return True
    return False


_GRAVE: tuple[State, ...] = ("lost", "short", "overshoot", "worse")


def claim(row: Mapping[str, Any]) -> str:
    """The most that can be said of a method whose audits found nothing, by its guarantee."""
    if row.get("intent") == "suppression" or row.get("guarantee") == "inference-time":
        return (
            "answers like a model retrained without the data, as far as these audits see; "
            "it suppresses, so the weights may still hold what they learned"
        )
    if row.get("guarantee") == "exact":
        return "its result was trained without the data (exact), and these audits agree"
    if row.get("guarantee") == "certified":
        return "is certified under its stated conditions, and these audits agree"
    return "behaves like a model retrained without the data, as far as these audits see"


def method_verdict(rows: Sequence[Mapping[str, Any]]) -> Judgement:
    """The gravest verdict over a method's seeds, with how many of them have it.

    Args:
        rows: the method's rows, one a seed.

    Returns:
        A mean over seeds would hide a seed that failed, so the worst one speaks.
    """
    verdicts = [row_verdict(r) for r in rows]
    for state in (*_GRAVE, "unjudged", "matches"):
        own = [v for v in verdicts if v.state == state]
        if own:
            some = f"in {len(own)} of {len(rows)} seeds: " if len(own) < len(rows) else ""
            return Judgement(own[0].state, some + own[0].sentence)
    return Judgement("unjudged", "it was not run")


def decisive(row: Mapping[str, Any]) -> list[str]:
    """Names of the findings that make up a run's verdict.

    Args:
        row: a row of a comparison.

    Returns:
        The accuracies or mean errors, and the first membership AUC that has a value. Others look at the
        same outputs again; to let each of them fail a method would be one test in many disguises.
    """
    findings = row["findings"]
    named = (*(f"membership/auc-{score}" for score in SCORES), "residual-membership/auc")
    auc = next((n for n in named if finite(findings.get(n, {}).get("value")) is not None), None)
    whole = [n for n in findings if n.startswith(DECISIVE) and "@" not in n]  # strata are parts
    return whole + ([auc] if auc else [])


DECISIVE = ("accuracy/", ERRORS + "mae-")
"""Beginnings of the findings on which a verdict rests, beside the membership AUC."""


SCORES = ("loss", "confidence", "modified-entropy", "entropy", "correctness")
"""Membership scores in the order in which one speaks for a run."""


def closer(row: Mapping[str, Any]) -> list[str]:
    """Further findings in which a run differs from retrained models; they qualify its verdict.

    Args:
        row: a row of a comparison.

    Returns:
        Names of findings on memberships, distances of outputs and relearning that are not as in a
        retrained model. Divergences come as JS and KL of the same predictions; JS speaks.
    """
    own = decisive(row)
    families = (
        *MEMBERSHIP,
        "divergence/js-",
        "prediction-matrix/",
        "wasserstein/",
        "relearn-time/ain",
        "recovery/forget",
        "representation/",
        "memorised-fraction/limit",
        "memorised-fraction/erased",
        "privacy-score/",
        "klom/",
    )
    return [
        n
        for n, f in row["findings"].items()
        if n.startswith(families)
        and "@" not in n
        and n not in own
        and judge(n, f).state in ("short", "overshoot", "worse")
    ]


def kept(name: str) -> bool:
    """Whether a finding is about data that was to be kept."""
    return "retain" in name.split("/")[-1].split("-")


def finite(value: Any) -> float | None:
    """A number as float; None for nothing, NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _price(value: float, reference: float | None) -> Judgement:
    if reference is None:
        return Judgement("unjudged", "what it took; nothing to compare it with")
    numbers = f"{value:.3g} against {reference:.3g}"
    if value > reference + _SLACK:
        return Judgement("worse", f"more than retraining took ({numbers})")
    return Judgement("unjudged", f"what it took beside retraining, no verdict ({numbers})")


def _distance(name: str, finding: Mapping[str, Any], value: float, reference: float) -> Judgement:
    gap = value - reference if finding["direction"] == "down" else reference - value
    numbers = f"{value:.3g}; among those {reference:.3g}"
    if gap <= tolerance(name, finding) + _SLACK:
        return Judgement("matches", f"as near to retrained models as those are to each other ({numbers})")  # fmt: skip
    return Judgement("worse", f"further from retrained models than those are from each other ({numbers})")  # fmt: skip


def _toward(name: str, finding: Mapping[str, Any], value: float, reference: float) -> Judgement:
    detail = finding.get("detail") or {}
    raw, raw_reference = finite(detail.get("auc")), finite(detail.get("reference_auc"))
    signed = raw is not None and raw_reference is not None
    here, there = (raw or 0.0, raw_reference or 0.0) if signed else (value, reference)
    gap, allowed = here - there, tolerance(name, finding)
    numbers = f"{here:.3f} against {there:.3f} for retrained models, tolerance {allowed:.3f}"
    if abs(gap) <= allowed + _SLACK:
        return Judgement("matches", f"as in a retrained model ({numbers})")
    if kept(name):
        if (gap < 0) if name.startswith(ERRORS) else (gap > 0):
            return Judgement("matches", f"no worse than a retrained model ({numbers})")
        if name.startswith(("accuracy/", "nomus/accuracy", ERRORS)):
            return Judgement("lost", f"utility on what was to be kept is lost ({numbers})")
        return Judgement("worse", f"kept data is treated otherwise than by retraining ({numbers})")
    original = finite(detail.get("original_auc") if signed else finding.get("original"))
    side = _side(name, signed, None if original is None else original - there, allowed)
    if side == 0:
        return Judgement(
            "worse",
            f"differs from retrained models; too little or too much, this number cannot say ({numbers})",
        )
    if gap * side > 0:
        return Judgement("short", f"not forgotten: still on the original's side ({numbers})")
    if name.startswith("cka/"):
        return Judgement("overshoot", f"less like the original than retraining makes it ({numbers})")  # fmt: skip
    return Judgement(
        "overshoot", f"forgets more than a model that never saw the data: a leak ({numbers})"
    )


def _side(name: str, signed: bool, toward: float | None, allowed: float) -> int:
    """Where memory lies from the reference: +1 above, −1 below, 0 unknown."""
    shadow = ("lira/", "rmia/", "u-lira/")  # rates look into both tails
    aucs = ("membership/auc-", "membership/attack", "residual-membership/auc", *shadow)
    folded = name.startswith(aucs) and not signed
    if folded:
        return 0
    if toward is not None and abs(toward) > allowed:
        return 1 if toward > 0 else -1
    # the original is where the reference is: what the number means tells the side
    if signed or name.startswith(("accuracy/", "cka/original")):
        return 1
    if name.startswith(("membership/efficacy", ERRORS, "relearn-time/")):
        return -1
    if name == "residual-membership/svc":
        return 1
    return 0 if toward is None or toward == 0 else (1 if toward > 0 else -1)

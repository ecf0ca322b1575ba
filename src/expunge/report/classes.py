"""Evidence classes: what each one is, what it lets one say, and what it never lets one say.

One table. Certificates take their words from it, verification holds them against it, and the
guide prints it. The weaker the evidence, the fewer words there are: only an exact result may use
those of `FORBIDDEN`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from expunge.core.errors import UserError

EvidenceClass = Literal["exact", "certified", "empirical", "suppression"]
WORDING = 1
"""Version of these words; a certificate says by which it was written."""
FORBIDDEN = re.compile(
    r"\b(remov(e|es|ed|al|ing)|delet(e|es|ed|ion|ions|ing)|eras(e|es|ed|ure|ing)"
    r"|expunged|purged|wiped|destroyed)\b",
    re.IGNORECASE,
)
"""Words that say more than anything but exactness shows."""


@dataclass(frozen=True)
class Wording:
    """The words of one evidence class.

    Attributes:
        title: heading of a certificate.
        means: what the class is, in a sentence.
        may_say: what the holder of such a certificate can tell a regulator.
        may_not_say: what it does not support, each after "that".
        rests_on: what has to hold for it to be true and cannot be seen in the weights.
    """

    title: str
    means: str
    may_say: tuple[str, ...]
    may_not_say: tuple[str, ...]
    rests_on: tuple[str, ...]


_ELSEWHERE = (
    "that copies of the records outside this model, in data sets, backups, logs or other models, "
    "are gone too",
    "that models released earlier, or made from this one before, are affected",
)
_RECORDED = (
    "that the request was resolved to the right records",
    "that what was recorded while the model was trained is true",
)
CLASSES: Mapping[EvidenceClass, Wording] = {
    "exact": Wording(
        "Certificate of exact deletion",
        "Exact: the weights were trained without the records, by construction.",
        (
            "The influence of the named records was removed from these weights: every parameter in "
            "force was trained on data that did not hold them.",
            "No audit is needed to believe this; those listed are a check of the machinery.",
        ),
        (
            "that a model which never saw the records must behave otherwise toward the people "
            "behind them: what was learned from similar data stays",
            *_ELSEWHERE,
        ),
        (
            *_RECORDED,
            "that nothing else in force was fitted on the records: the frozen backbone, tokenizer, "
            "normalisation, choice of settings, deduplication",
        ),
    ),
    "certified": Wording(
        "Certificate of certified unlearning",
        "Certified: what is left of the records is bounded by a proof, under stated conditions.",
        (
            "Under the conditions stated here, the weights differ from those of a model trained "
            "without the records by no more than the stated bound.",
        ),
        (
            "that nothing at all is left of the records",
            "that the bound holds where its conditions do not, such as a loss that is not convex",
            *_ELSEWHERE,
        ),
        (*_RECORDED, "that the conditions of the proof are met by this model and this training"),
    ),
    "empirical": Wording(
        "Certificate of audited unlearning",
        "Empirical: a method without proof was applied, and the listed audits were run on its result.",
        (
            "The method named here was applied to these weights because of the request, and these "
            "audits were run, with these results, beside models retrained without the records "
            "where that is stated.",
        ),
        (
            "that nothing of the records is left in the weights: that an audit finds no trace is no "
            "proof that there is none",
            "that other or stronger attacks would find as little",
            "that the model equals one that was trained without the records",
            *_ELSEWHERE,
        ),
        (*_RECORDED, "that the retrained models of comparison were trained as the model was"),
    ),
    "suppression": Wording(
        "Certificate of suppression",
        "Suppression: the model answers differently; what it learned may be in its weights as before.",
        (
            "The system named here no longer answers from the records in the ways that were tested, "
            "for as long as it is used as a whole.",
        ),
        (
            "that the weights no longer hold what they learned from the records",
            "that the records' influence has left the model",
            "that the effect stays when the part that suppresses is taken off, or the weights are "
            "used without it or trained further",
            *_ELSEWHERE,
        ),
        (*_RECORDED, "that the weights are only served together with the part that suppresses"),
    ),
}
"""What each evidence class is worth."""


def markdown() -> str:
    """The table for guides: what each class lets one say to a regulator, and what not."""
    lines = ["| evidence | may be said | may not be said | rests on |", "|---|---|---|---|"]
    for name, wording in CLASSES.items():
        cells = [wording.may_say, wording.may_not_say, wording.rests_on]
        joined = " | ".join("<br>".join(cell) for cell in cells)
        lines.append(f"| **{name}**: {wording.means.partition(': ')[2]} | {joined} |")
    return "\n".join(lines) + "\n"


def evidence_class(intent: str, guarantee: str, change: str = "weights") -> EvidenceClass:
    """The class of a result: the weakest of what method, guarantee and kind of change allow.

    Args:
        intent: of the method's card: removal or suppression.
        guarantee: of the card: exact, certified, empirical or inference-time.
        change: what was changed. Under a wrapper or adapters the old weights keep every bit.

    Returns:
        The class.
    """
    if intent == "suppression" or guarantee == "inference-time" or change in ("wrapper", "adapter"):
        return "suppression"
    if guarantee == "exact":
        return "exact"
    return "certified" if guarantee == "certified" else "empirical"


def check_words(kind: EvidenceClass, texts: Sequence[str]) -> None:
    """Refuse texts that claim more than an evidence class allows.

    Args:
        kind: the class.
        texts: free texts that would stand in a certificate.

    Raises:
        UserError: a text uses a word that only an exact result may use; or the class is unknown.
    """
    if kind not in get_args(EvidenceClass):
        raise UserError(
            f"no evidence class {kind!r}; there are {', '.join(get_args(EvidenceClass))}"
        )
    for text in texts:
        if kind != "exact" and (found := FORBIDDEN.search(text)):
            raise UserError(
                f"a certificate with {kind} evidence cannot say {found[0]!r} ({text!r}); "
                "say it in other words"
            )


def says(predicate: Mapping[str, Any]) -> list[str]:
    """The sentences of a certificate, from its facts alone.

    Args:
        predicate: of a statement.

    Returns:
        What was done, and what the evidence shows; no more than the class allows.
    """
    kind: EvidenceClass = predicate["class"]
    sentences = [CLASSES[kind].means, *_done(predicate)]
    verdict = predicate.get("verdict") or {}
    state, why = verdict.get("state"), verdict.get("sentence") or ""
    if not predicate.get("findings"):
        sentences.append("No audit was run.")
    elif state == "matches":
        sentences.append(
            "The audits listed here found no more traces of the records than in models retrained "
            "without them."
        )
    elif state in ("short", "worse"):
        sentences.append(f"The audits still tell the model from retrained ones: {_end(why)}")
    elif state == "overshoot":
        sentences.append(
            f"The audits find less than in models that never saw the records, a trace of its own: {_end(why)}"
        )
    elif state == "lost":
        sentences.append(f"Accuracy on other data suffered: {_end(why)}")
    else:
        sentences.append(f"The audits give no verdict: {_end(why)}")
    return sentences


def _done(predicate: Mapping[str, Any]) -> Iterator[str]:
    request, exact = predicate["request"], predicate.get("exact")
    count = request.get("records")
    named = "The request named records" if count is None else f"The request covers {_count(count)}"
    if request.get("earlier"):
        yield f"{named}, as an earlier request did: nothing was done for this one."
        return
    yield f"{named}; the method {predicate['method']['name']} answered it."
    if not exact:
        return
    for step in exact.get("switchedOff") or []:
        adapters = [str(a) for a in step.get("adapters") or []]
        what = (
            f"adapter{'s' if len(adapters) > 1 else ''} {', '.join(adapters)}"
            if adapters
            else "nothing"
        )
        slices = [str(s) for s in step.get("slices") or []]
        where = f"slice {slices[0]} was" if len(slices) == 1 else f"slices {', '.join(slices)} were"
        yield f"In shard {step['shard']}, {where} affected: {what} switched off."
    if exact.get("retrained"):
        yield f"Retrained without the records: shard {', '.join(map(str, exact['retrained']))}."
    unused = [s for s in exact.get("died") or [] if s not in (exact.get("retrained") or [])]
    if unused:
        yield f"No longer in use: shard {', '.join(map(str, unused))}."


def _count(number: int) -> str:
    return "1 record" if number == 1 else f"{number} records"


def _end(text: str) -> str:
    return (text or "no reason was recorded").rstrip(".") + "."

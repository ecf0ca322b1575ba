"""What attacks with shadow models share: who is attacked, when it cannot be done, and the findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from expunge.audits._intervals import Z95, two_sided
from expunge.audits._low_fpr import roc, too_few, tpr_on, true_alarms
from expunge.audits._members import Places, auc_finding, constant, nonmembers, sides
from expunge.audits._splits import FEWEST, one_class, unusable
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.errors import NeedsError
from expunge.core.needs import Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.fleet.shadows import Shadows, shadows
from expunge.train.losses import margin_each

Array = npt.NDArray[np.float64]
Score = Callable[[Subject, str], Array]
Variant = Literal["offline", "online"]

NOT_ONLINE = (
    "the recipe cannot be run on test data, so no model is known that saw a non-member; "
    "the offline attack does without"
)

FAR = 6.0
"""Standard deviations from which a model's log-odds on unseen data are another recipe's."""


@dataclass(frozen=True)
class Ground:
    """An attack can be made: on whom, with what, and against which references."""

    places: Places
    how: str
    shadows: Shadows
    references: Sequence[Subject]
    strangers: str | None
    population: Places = field(default_factory=dict)


@dataclass(frozen=True)
class ShadowAttack(Audit):
    """Base of attacks that are made in variants, online and offline, on one set of shadow models."""

    domain: ClassVar[str] = "classification"

    variants: tuple[Variant, ...] = setting(("online", "offline"), "attacks to make")
    models: int = setting(64, "shadow models K, each on half of the data; all such audits share them", low=4, source="LiRA: 16 to 256; RMIA: 1 to 254")  # fmt: skip
    fprs: tuple[float, ...] = setting(
        (0.1, 0.01, 0.001), "false-alarm rates α, both tails together", above=0, high=0.5
    )
    nonmembers: Literal["matched", "test"] = setting(
        "matched", "matched: test samples with the forget set's class shares; test: all of them"
    )

    @property
    def needs(self) -> Needs:
        """Both sides with labels, logits, and the recipe for the shadow models."""
        return Needs(
            forget=True, retain=True, labels="all", recipe=True, models=2,
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Attack subject, original and references with one set of shadow models."""
        at = ground(subject, references, self.nonmembers, self.models, runtime)
        if isinstance(at, Ground):
            at = self._parted(subject, at, runtime)
        found: list[Finding] = []
        for variant in self.variants:
            if isinstance(at, str):
                made: list[Finding] | str = at
            elif variant == "online" and not at.shadows.both:
                made = NOT_ONLINE
            else:
                made = self._attack(variant, subject, at)
            if isinstance(made, str):
                made = [Finding(f"{self.name}/auc-{variant}", None, reason=made)]
            found += made
        return found

    def _parted(self, subject: Subject, at: Ground, runtime: Runtime) -> Ground | str:
        """The ground, with what else the attack takes from it; or why that cannot be had."""
        return at

    def _attack(self, variant: Variant, subject: Subject, at: Ground) -> list[Finding] | str:
        """Findings of one variant, or why there are none."""
        raise NotImplementedError


def ground(
    subject: Subject, references: Sequence[Subject], who: str, models: int, runtime: Runtime
) -> Ground | str:
    """Look for reasons not to attack, cheapest first, and only then train shadow models.

    Args:
        subject: the model under audit.
        references: retrained models.
        who: non-members, `matched` or `test`.
        models: K.
        runtime: seeds and progress.

    Returns:
        The ground, or why there is none.
    """
    strange = other_architecture(subject, references)
    known = [] if strange else references
    everyone = [subject, subject.original(), *known]
    why = unusable(everyone, "forget-train") or unusable(everyone, "retain-test")
    if why and "retain-test" in subject.splits and not len(subject.splits["retain-test"]):
        why = unusable(everyone, "forget-train")  # there may be no other class to test on
    why = why or one_class(subject)
    if not why and len(subject.splits["forget-train"]) < FEWEST:
        why = f"only {len(subject.splits['forget-train'])} samples to forget, {FEWEST} are needed"
    if why:
        return why
    places, how = nonmembers(subject, who, runtime)
    if places is None:
        return how
    try:
        made = shadows(subject.problem, models, runtime, subject.store)
    except NeedsError as error:
        return str(error)
    if not strange:
        strange = other_recipe(made, known)
    return Ground(places, how, made, [] if strange else known, strange)


def other_architecture(subject: Subject, references: Sequence[Subject]) -> str | None:
    """Why a reference is no retrained model of this problem, by its tensors, or None."""

    def layout(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
        return {n: tuple(p.shape) for n, p in model.state_dict().items()}

    wanted = layout(subject.problem.model)
    if any(layout(r.model) != wanted for r in references):
        return "a reference has another architecture than the original: it is from another recipe"
    return None


def other_recipe(made: Shadows, references: Sequence[Subject]) -> str | None:
    """Why a reference is no retrained model of this problem, by what it says, or None.

    A retrained model saw more samples than a shadow model. One that is far worse than all of them on kept
    unseen data, and fits its own training data far worse than they fit theirs, was trained in another
    way. One that is better cannot be told from one that saw more.
    """
    for reference in references:
        worse = []
        for split, seen in (("retain-test", False), ("retain-train", True)):
            ids = reference.whole.splits.get(split, torch.empty(0))
            if len(ids) < FEWEST:
                return None
            columns = made.columns(split, ids)
            rows = made.masks[:, columns] == seen
            theirs = (made.odds[:, columns].double() * rows).sum(1) / rows.sum(1).clamp_min(1)
            own = float(odds(reference.whole, split).mean())
            far = (float(theirs.mean()) - own) / (float(theirs.std()) or 1e-12)
            worse.append(own < float(theirs.min()) and far > FAR)
        if all(worse):
            return (
                "a reference is far worse, on its training data and on unseen data, than models of the "
                "recipe trained on half as many samples: it is from another recipe"
            )
    return None


def odds(subject: Subject, split: str) -> Array:
    """Log-odds [n] of the true labels of a split."""
    return margin_each(subject.logits(split).double(), subject.labels(split)).numpy()


def useless(forget: Array, out: Array) -> str | None:
    """Why scores tell nothing, or None."""
    if not (np.isfinite(forget).all() and np.isfinite(out).all()):
        return "some scores are not finite"
    return constant(forget, out)


def auc_and_rates(
    audit: str,
    variant: str,
    score: Score,
    subject: Subject,
    at: Ground,
    fprs: Sequence[float],
    models: int,
    cut: float | None,
) -> list[Finding]:
    """Findings of one attack: AUC, true alarms at low rates of false ones, balanced accuracy.

    Args:
        audit: its name.
        variant: of the attack, the last word of the findings' names.
        score: higher looks more like a member.
        subject: the model under audit.
        at: on whom.
        fprs: rates of false alarms.
        models: a side that the scarcest sample was fitted on.
        cut: the attack's own threshold, for the balanced accuracy; None for none.

    Returns:
        `auc-…`, `tpr-…-at-…` and `balanced-accuracy-…`.
    """
    forget, out = sides(score, subject, at.places)
    names = [f"{audit}/auc-{variant}", *(f"{audit}/tpr-{variant}-at-{f:g}" for f in fprs)]
    names += [] if cut is None else [f"{audit}/balanced-accuracy-{variant}"]
    why = useless(forget, out)
    if why:
        return [Finding(name, None, reason=why) for name in names]
    before = sides(score, subject.original(), at.places)
    theirs = [sides(score, r, at.places) for r in at.references]
    if any(useless(*t) for t in theirs):
        strange = "a retrained model gives all samples the same score, or none"
        at, theirs = replace(at, references=[], strangers=strange), []
    first = auc_finding(names[0], score, subject, at.references, at.places, at.how)
    curve = roc(forget, out)
    curve["original_tpr"] = tpr_on(curve, *before)
    if theirs:
        curve["reference_tpr"] = np.mean([tpr_on(curve, *t) for t in theirs], 0).tolist()
    made = len(at.shadows.masks)
    found = [replace(first, detail=first.detail | {"roc": curve, "shadow_models": made})]
    for name, fpr in zip(names[1:], fprs, strict=False):
        few = too_few(len(out), fpr, models)
        if few:
            found.append(Finding(name, None, reason=few))
            continue
        rate = true_alarms(forget, out, fpr)
        found.append(Finding(
            name, rate.value, low=rate.low, high=rate.high,
            original=true_alarms(*before, fpr).value,
            detail={"fpr": rate.fpr, "tails": 2, "nonmembers": at.how},
            per_sample={"called": rate.called},
            **against([true_alarms(*t, fpr).value for t in theirs]),
        ))  # fmt: skip
    if cut is not None:
        found.append(_balanced(names[-1], forget, out, before, theirs, cut, at.how))
    if useless(*before):
        found = [replace(f, original=None) for f in found]
    if at.strangers:  # a value, but nothing to hold it against
        found = [replace(f, reason=f.reason if f.value is None else at.strangers) for f in found]
    return found


def _balanced(
    name: str,
    forget: Array,
    out: Array,
    before: tuple[Array, Array],
    theirs: Sequence[tuple[Array, Array]],
    cut: float,
    how: str,
) -> Finding:
    """Balanced accuracy of calling members what lies above a threshold, folded at one half."""

    def accuracy(a: Array, b: Array) -> float:
        return float(((a > cut).mean() + (b <= cut).mean()) / 2)

    raw = accuracy(forget, out)
    # shares of n and m, drawn toward one half so that none has no error
    hits = [((x > cut).sum() + 1) / (len(x) + 2) for x in (forget, out)]
    half = (
        Z95
        / 2
        * float(
            np.sqrt(sum(p * (1 - p) / len(x) for p, x in zip(hits, (forget, out), strict=True)))
        )
    )
    value, low, high = two_sided(raw, max(0.0, raw - half), min(1.0, raw + half))
    others = [accuracy(*t) for t in theirs]
    old = accuracy(*before)
    return Finding(
        name, value, low=low, high=high, original=max(old, 1 - old),
        detail={"balanced_accuracy": raw, "threshold": cut, "nonmembers": how},
        per_sample={"called": forget > cut},
        **against([max(a, 1 - a) for a in others]),
    )  # fmt: skip

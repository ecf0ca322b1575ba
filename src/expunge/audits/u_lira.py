"""U-LiRA: can a model that unlearned a sample be told from one that never saw it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expunge import __version__
from expunge.audits._intervals import mean_interval, two_sided
from expunge.audits._low_fpr import clustered_auc, roc, too_few, tpr_on, true_alarms
from expunge.audits._shadow_attack import useless
from expunge.audits._splits import FEWEST, missing, one_class
from expunge.audits.lira import PER_SAMPLE, Fit, scores
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.errors import ExpungeError
from expunge.core.hashing import content_key, hash_tensors
from expunge.core.method import Method
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.outcome import Cost
from expunge.core.runtime import Runtime
from expunge.core.settings import setting
from expunge.fleet.unlearned_shadows import plan, retrained_shadows, run_on_shadows

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class World(NamedTuple):
    """What runs of one unlearning on shadow models say about the P samples of the pool.

    Attributes:
        forgotten: log-odds where a run forgot the sample, [R, P], else anything.
        unseen: log-odds where the sample was not in the shadow model's training, [R, P].
        forgot: who was forgotten, bool [R, P].
        never: who was never seen, bool [R, P].
        shadow: number of each run's shadow model, [R].
    """

    forgotten: Array
    unseen: Array
    forgot: Bools
    never: Bools
    shadow: npt.NDArray[np.int64]


class Told(NamedTuple):
    """Scores of the decisions on target models: forgotten and never seen, and the model of each."""

    positive: Array
    negative: Array
    of_positive: npt.NDArray[np.int64]
    of_negative: npt.NDArray[np.int64]
    separation: Array
    models: int


@dataclass(frozen=True)
class ULiRA(Audit):
    r"""A likelihood-ratio test of the *method*: it is run on shadow models, and its traces are looked for.

    K models are trained on random halves of the training data and the method makes each forget those
    samples of the request that it saw. For a target model and a sample x the log-odds \(\varphi\) are
    held against \(\mathcal N(\mu_1, \sigma_1)\), fitted on other models that forgot x, and
    \(\mathcal N(\mu_0, \sigma_0)\), on models that never saw it: \(\Lambda = \log p_1(\varphi) - \log p_0(\varphi)\).
    `auc` over all decisions, ½ … 1, and `balanced-accuracy` at \(\Lambda > 0\), folded at ½; `tpr-at-α`: share of the
    forgotten called at α false alarms, half in each tail. ½ is indistinguishable; the reference is retraining
    the same models, the original leaving them as they are.
    """

    name: ClassVar[str] = "u-lira"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy",
        authors="Hayes, Shumailov, Triantafillou, Khalifa, Papernot",
        year=2024,
        link="https://arxiv.org/abs/2403.01218",
        idea="Per sample, whether models that unlearned it look like models that never saw it.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Models that never saw a sample are, unless null=original, those that unlearned the "
                "others of the request, so that only x makes the difference.",
                "tests/audits/test_u_lira.py::test_both_null_hypotheses",
            ),
            Deviation(
                "A shadow model forgets all it saw of the request in one run (share=1, draws=1), in "
                "place of forty draws.",
                "tests/audits/test_u_lira.py::test_draws_forget_a_share_of_what_a_model_saw",
            ),
            Deviation(
                "Intervals are over target models, whose decisions on several samples hang together.",
                "tests/audits/test_low_fpr.py::test_clustered_auc_covers_where_delong_does_not",
            ),
        ),
    )

    models: int = setting(
        128, "shadow models K, each on half of the data", low=8, source="paper: 256"
    )
    targets: int = setting(32, "shadow models that are attacked; the others are fitted on", low=2, source="official code: 50")  # fmt: skip
    draws: int = setting(1, "unlearning runs a shadow model, R", low=1, source="official code: 40")
    share: float = setting(1.0, "share of what a model saw of the request that a run forgets", above=0, high=1)  # fmt: skip
    null: Literal["unlearned", "original"] = setting(
        "unlearned", "who never saw x: models that unlearned the others, or as they were trained"
    )
    method: str = setting(
        "",
        "a method's name, or original for leaving models as they are; empty: what made the model",
    )
    fprs: tuple[float, ...] = setting(
        (0.1, 0.01),
        "false-alarm rates α, both tails together",
        above=0,
        high=0.5,
        source="card: 1 %",
    )

    @property
    def needs(self) -> Needs:
        """Both sides with labels, logits, and the recipe for the shadow models."""
        return Needs(
            forget=True, retain=True, labels="all", recipe=True,
            capabilities=frozenset({"logits"}),
        )  # fmt: skip

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Run method and retraining on shadow models; the subject's own model is not looked at."""
        names = ["u-lira/auc", "u-lira/balanced-accuracy", *(f"u-lira/tpr-at-{f:g}" for f in self.fprs)]  # fmt: skip

        def none(why: str) -> list[Finding]:
            return [Finding(name, None, reason=why) for name in names]

        why = missing(subject, "forget-train") or one_class(subject)
        count = len(subject.whole.splits["forget-train"])
        if not why and count < FEWEST:
            why = f"only {count} samples to forget, {FEWEST} are needed"
        if self.targets >= self.models - 3:
            why = f"{self.models} shadow models with {self.targets} targets leave too few to fit on; raise models"
        made_by = self._method(subject)
        if why or isinstance(made_by, str):
            return none(why or str(made_by))
        try:
            made = self._runs(subject, made_by, runtime)
        except ExpungeError as error:
            doing = "training" if made_by is None else f"{made_by.name}"
            return none(f"{doing} failed on the shadow models: {error}")
        at = torch.searchsorted(
            subject.whole.splits["forget-train"], subject.splits["forget-train"]
        )
        told = {what: self._tell(made, what, at) for what in ("after", "retrained", "before")}
        told = {w: t if isinstance(t, str) else useless(t.positive, t.negative) or t for w, t in told.items()}  # fmt: skip
        own = told["after"]
        if isinstance(own, str):
            return none(own)
        facts = {
            "method": "original" if made_by is None else made_by.name,
            "shadow_models": self.models,
            "targets": self.targets,
            "retain_accuracy": float(made["kept_after"].mean()),
            "original_retain_accuracy": float(made["kept_before"].mean()),
        }
        return self._findings(names, own, told["retrained"], told["before"], facts)

    def _method(self, subject: Subject) -> Method | str | None:
        """The method to run on the shadow models, None for none, or why it is not known."""
        import importlib

        from expunge.methods import registry

        if self.method == "original":
            return None
        if self.method:
            tuned = subject.problem.tuned.get(self.method, {})
            made: Method = registry.get(self.method).create(tuned)
            return made
        record = getattr(subject.outcome, "record", {}).get("method", {})
        if "class" not in record:
            return "it is not known which method made this model; u-lira runs the method itself: pass method="
        module, _, name = record["class"].rpartition(".")
        made = getattr(importlib.import_module(module), name).create(record["in_force"])
        return made

    def _runs(self, subject: Subject, method: Method | None, runtime: Runtime) -> dict[str, Tensor]:
        problem, pool = subject.problem, subject.whole.splits["forget-train"]
        inner = replace(runtime, cost=Cost())
        drawn = plan(problem, pool, self.models, self.draws, self.share, inner)
        facts = [
            __version__, problem.recipe_key(), problem.train.fingerprint(), hash_tensors({"pool": pool}),
            self.models, self.draws, self.share, runtime.seed, runtime.device,
            [problem.fingerprint()[k] for k in ("functions", "architecture", "mask", "valid")],
        ]  # fmt: skip
        done = None if method is None else [f"{type(method).__module__}.{type(method).__qualname__}", method.in_force()]  # fmt: skip

        store = subject.store
        runs, others = (
            content_key(["u-lira", *facts, done]),
            content_key(["u-lira-retrained", *facts]),
        )
        known: dict[str, dict[str, Tensor]] = problem.__dict__.setdefault("_u_lira", {})
        if runs not in known:
            known[runs] = run_on_shadows(problem, pool, method, drawn, inner, store, runs)
        if others not in known:
            known[others] = retrained_shadows(problem, pool, drawn, inner, store, others)
        return {"masks": drawn.inside, "forgot": drawn.forgot, **known[runs], **known[others]}

    def _tell(self, made: dict[str, Tensor], what: str, at: Tensor) -> Told | str:
        """Decisions on the models after the method, retrained, or before."""
        masks, forgot = made["masks"][:, at], made["forgot"][:, at]
        shadow = torch.arange(len(forgot)) // self.draws
        if what == "retrained":  # once a model, without what its first draw forgets
            shadow, forgot = torch.arange(len(masks)), forgot[:: self.draws]
        before = made["before"][:, at].double()[shadow]
        after = before if what == "before" else made[what][:, at].double()
        unseen = before if self.null == "original" else after
        world = World(
            after.numpy(), unseen.numpy(), forgot.numpy(), ~masks[shadow].numpy(), shadow.numpy()
        )
        return tell(world, len(masks) - self.targets)

    def _findings(
        self,
        names: list[str],
        own: Told,
        theirs: Told | str,
        before: Told | str,
        facts: dict[str, Any],
    ) -> list[Finding]:
        reference = {"reason": f"retrained models: {theirs}"} if isinstance(theirs, str) else None
        per_sample = {"separation": own.separation}
        raw, low, high, design = auc_of(own)
        ends = {"auc_low": low, "auc_high": high}
        value, low, high = two_sided(raw, low, high)
        curve = roc(own.positive, own.negative)
        detail: dict[str, Any] = {"auc": raw, **ends, "roc": curve, **facts}
        others: list[float] = []
        if not isinstance(theirs, str):
            there = auc_of(theirs)[0]
            others, detail["reference_auc"] = [max(there, 1 - there)], there
            curve["reference_tpr"] = tpr_on(curve, theirs.positive, theirs.negative)
        old = None
        if not isinstance(before, str):
            detail["original_auc"] = auc_of(before)[0]
            old = max(detail["original_auc"], 1 - detail["original_auc"])
            curve["original_tpr"] = tpr_on(curve, before.positive, before.negative)
        found = [Finding(names[0], value, low=low, high=high, original=old, detail=detail,
                         per_sample=per_sample, **(reference or against(others)))]  # fmt: skip
        right, low, high = balanced(own)
        folded, low, high = two_sided(right, low, high)
        sides = [max(b, 1 - b) for b in ([] if isinstance(theirs, str) else [balanced(theirs)[0]])]
        was = None if isinstance(before, str) else balanced(before)[0]
        found.append(Finding(
            names[1], folded, low=low, high=high, original=None if was is None else max(was, 1 - was),
            detail={"balanced_accuracy": right, **facts}, per_sample=per_sample,
            **(reference or against(sides)),
        ))  # fmt: skip
        for name, fpr in zip(names[2:], self.fprs, strict=True):
            few = too_few(len(own.negative), fpr, own.models)
            if few:
                found.append(Finding(name, None, reason=few))
                continue
            rate = true_alarms(own.positive, own.negative, fpr, design)
            rates = [] if isinstance(theirs, str) else [true_alarms(theirs.positive, theirs.negative, fpr).value]  # fmt: skip
            found.append(Finding(
                name, rate.value, low=rate.low, high=rate.high,
                original=None if isinstance(before, str) else true_alarms(before.positive, before.negative, fpr).value,
                detail={"fpr": rate.fpr, "tails": 2, **facts}, per_sample=per_sample,
                **(reference or against(rates)),
            ))  # fmt: skip
        return found


def tell(world: World, fitted_on: int) -> Told | str:
    """Score every decision on target models by distributions that are fitted on the other models.

    Args:
        world: what the runs say.
        fitted_on: the first so many shadow models are fitted on, the others are targets.

    Returns:
        The scores, Λ above 0 for "forgotten"; or why there are none.
    """
    near = world.shadow < fitted_on
    one = fit(world.forgotten[near], world.forgot[near])
    zero = fit(world.unseen[near], world.never[near])
    fewest = min(one.models, zero.models)
    if not (np.isfinite(world.forgotten).all() and np.isfinite(world.unseen).all()):
        return "a model gives NaN or infinite outputs"
    if fewest < 2:
        return f"{fitted_on} shadow models leave some sample with {fewest} of a side to fit on; raise models"
    if not (one.std.any() and zero.std.any()):
        return "all shadow models say the same of every sample"

    def decide(values: Array, chosen: Bools) -> tuple[Array, npt.NDArray[np.int64]]:
        run, column = np.nonzero(chosen & ~near[:, None])
        return scores(values[run, column], zero, one, column), world.shadow[run]

    positive, of_positive = decide(world.forgotten, world.forgot)
    negative, of_negative = decide(world.unseen, world.never)
    if not len(positive) or not len(negative):
        return "no target model forgot a sample, or none never saw one; raise targets"
    spread = np.sqrt((one.std**2 + zero.std**2) / 2)
    separation = (one.mean - zero.mean) / np.maximum(spread, 1e-12)
    return Told(positive, negative, of_positive, of_negative, separation, fewest)


def fit(values: Array, chosen: Bools) -> Fit:
    """Normal distributions [P] of some of the values [R, P]; one variance for all where they are few."""
    count = chosen.sum(0)
    mean = (values * chosen).sum(0) / np.maximum(count, 1)
    variance = ((values - mean) ** 2 * chosen).sum(0) / np.maximum(count - 1, 1)
    if count.min() < PER_SAMPLE // 2:
        variance = np.full_like(variance, variance.mean())
    return Fit(mean, np.sqrt(variance), int(count.min()))


def auc_of(told: Told) -> tuple[float, float, float, float]:
    """AUC with its interval over target models, and the design effect."""
    return clustered_auc(told.positive, told.negative, told.of_positive, told.of_negative)


def balanced(told: Told) -> tuple[float, float, float]:
    """Balanced accuracy at Λ > 0 with its interval over target models."""
    each = [
        ((told.positive[told.of_positive == t] > 0).mean() + (told.negative[told.of_negative == t] <= 0).mean()) / 2
        for t in np.intersect1d(told.of_positive, told.of_negative)
    ]  # fmt: skip
    if not each:  # no target has both sides
        return float("nan"), 0.0, 1.0
    low, high = mean_interval(np.array(each))
    return float(np.mean(each)), max(0.0, low), min(1.0, high)

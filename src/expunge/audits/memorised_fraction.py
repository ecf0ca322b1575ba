"""Memorised fraction: at most how many of the forgotten records are still memorised?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from expunge.audits._calibration import Calibration, by_halves, by_references
from expunge.audits._density import Array
from expunge.audits._intervals import wilson
from expunge.audits._members import Places, best_threshold, nonmembers
from expunge.audits._mixture import ONE_SIDED, TWO_SIDED, Mixture, Population
from expunge.audits._mixture_checks import (
    Bootstrap,
    Thresholds,
    bootstrap,
    injected,
    rivals,
    self_test,
    thresholds,
)
from expunge.audits._splits import FEWEST, NO_REFERENCE, one_class, unusable
from expunge.core.audit import Audit, Finding, Subject, against
from expunge.core.errors import DataError
from expunge.core.needs import Card, Deviation, Needs
from expunge.core.runtime import Runtime
from expunge.core.settings import setting

_TEST = "tests/audits/test_memorised_fraction.py::test_"
FEW = 100
"""Records below which a limit is coarse (seldom under 0.3 where scores overlap much)."""
SMALLEST = 25
"""Non-members that a stratum needs."""
MISFIT = 0.01
COVERED = 0.8
LONELY = (
    "the one reference calibrates the scores, so none is left to compare with; give two or more"
)
WHATS = ("limit", "estimate", "limit-shifted", "estimate-shifted", "erased", "self-test")


@dataclass(frozen=True)
class Groups:
    """Scores of one model: of the records to forget, of non-members by stratum, and of members."""

    forget: Array
    out: tuple[Array, ...]
    member: Array


@dataclass(frozen=True)
class MemorisedFraction(Audit):
    r"""The share \(\rho\) of forgotten records that score as memorised ones do, with a limit.

    A record's score is the log-odds of its true label less their mean over models that never saw
    it. The forget set is fitted as a mixture of the density of non-members (in strata whose shares
    are free) and of the density of members; \(\rho\) is the members' share.

    `limit`: at most this share is still memorised, at 95 %: the largest \(\rho\) with \(TS \le t(\rho)\),
    where t is 2.71 or what populations of known shares ask for if that is more, since the densities
    are estimated too; 1 where the data cannot tell. `estimate`: the likeliest share, with its two-sided interval.
    `limit-shifted`, `estimate-shifted`: the same where the non-members' density may also be bent by a
    monotone sigmoid, as when forgotten records are harder than the non-members. `erased`: the share of
    forgotten records that score below 95 % of the non-members; 0.05 by chance, more is a leak of its own.
    `self-test`: known shares put together from members and non-members: how many of the limits hold.
    Toward the reference: retrained models, each calibrated by the others. See `_mixture.py`.
    """

    name: ClassVar[str] = "memorised-fraction"
    domain: ClassVar[str] = "classification"
    card: ClassVar[Card] = Card(
        title="Search for dark matter subhalos among unassociated Fermi-LAT sources in presence of dataset shift",
        authors="Amerio, Malyshev, Zaldívar, Gammaldi, Sánchez-Conde",
        year=2025,
        link="https://arxiv.org/abs/2503.14584",
        idea="The fraction of an unlabelled population in a new class, with a likelihood limit under dataset shift.",
        intent="measurement",
        fidelity="variant",
        deviations=(
            Deviation(
                "Objects are the records to forget, known classes are non-members by difficulty, and the "
                "new class is memorised records: the original's scores of the same records, or kept ones.",
                _TEST + "an_untouched_model_has_memorised_all_and_a_retrained_one_little",
            ),
            Deviation(
                "The limit is one-sided, 2.71 and not 3.84, and its threshold grows to what populations of "
                "known fractions ask for; both plain limits stand beside it.",
                _TEST + "the_limit_is_no_lower_than_the_plain_one",
            ),
            Deviation(
                "Bent densities are normalised class by class, and slopes have the prior N(0, 0.3²).",
                "tests/audits/test_mixture.py::test_a_bend_keeps_the_density_normalised",
            ),
            Deviation(
                "Kernels are half as wide as cross-validation has them and have a small uniform part; the "
                "bootstrap draws from the densities, and no window is cut out of the scores.",
                "tests/audits/test_mixture.py::test_a_score_that_no_sample_is_near_is_weak_evidence",
            ),
        ),
    )

    members: Literal["original", "retain"] = setting(
        "original",
        "who stands for memorised: the original's scores of the records to forget, or this model's of kept ones "
        "(calibrated by models on halves of them, which takes a recipe)",
    )
    strata: Literal["difficulty", "class", "none"] = setting(
        "difficulty",
        "parts of the non-members whose shares are free: two halves by the calibrating models' "
        "scores, labels, or one part",
    )
    nonmembers: Literal["matched", "test"] = setting(
        "matched", "matched: test samples with the forget set's class shares; test: all of them"
    )
    halves: int = setting(4, "models on halves of the kept records, with members=retain", low=2)
    resamples: int = setting(100, "draws of the bootstrap", low=20, source="paper")
    injections: int = setting(
        40, "populations a known share, for the thresholds and again for the self-test", low=10
    )
    max_samples: int = setting(2000, "records a group", low=20)

    @property
    def needs(self) -> Needs:
        """Both sides with labels, and logits; four references calibrate well."""
        return Needs(
            forget=True, retain=True, labels="all", models=4, capabilities=frozenset({"logits"})
        )

    def run(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Finding]:
        """Six findings; every model is measured in the same way."""
        everyone = [subject, subject.original(), *references]
        splits = ["forget-train", *(["retain-train"] if self.members == "retain" else [])]
        why = next((w for s in splits if (w := unusable(everyone, s))), None)
        why = why or self._few(subject, everyone)
        places: Places | None = None
        how = ""
        if not why:
            places, how = nonmembers(subject, self.nonmembers, runtime)
        if places is None:
            return [self._none(what, why or how) for what in WHATS]
        try:
            found = self._findings(subject, references, places, how, runtime)
        except DataError as error:
            return [self._none(what, str(error)) for what in WHATS]
        if self.members == "retain" or len(references) != 1:
            return found
        return [
            replace(f, reason=f.reason and f.reason.replace(NO_REFERENCE, LONELY)) for f in found
        ]

    def _few(self, subject: Subject, everyone: Sequence[Subject]) -> str | None:
        count = len(subject.splits["forget-train"])
        if count < FEWEST:
            return f"only {count} samples to forget, {FEWEST} are needed"
        if why := one_class(subject):
            return why
        if "retain-test" not in subject.splits:
            return "there is no test data, so nobody was never seen"
        there = [s for s in ("forget-test", "retain-test") if len(subject.splits[s])]
        return next((w for s in there if (w := unusable(everyone, s))), None)

    def _findings(
        self,
        subject: Subject,
        references: Sequence[Subject],
        places: Places,
        how: str,
        runtime: Runtime,
    ) -> list[Finding]:
        calibrations = self._calibrations(subject, references, runtime)
        groups = self._groups(subject, calibrations[0], places, runtime)
        mixture = _mixture(groups, runtime)
        plain = Population(mixture, groups.forget)
        made = [
            injected(groups.out, groups.member, len(groups.forget), _random(runtime, w), self.injections)
            for w in ("thresholds", "self-test")
        ]  # fmt: skip
        allowed = thresholds(made[0])
        tested = self_test(made[1], allowed)
        draws = bootstrap(
            plain, allowed(plain.limit(allowed)), _random(runtime, "bootstrap"), self.resamples
        )
        others: list[Population] = []
        outs: list[Groups] = []
        # the original first, which calibrates nobody and is not calibrated away
        measured = [(subject.original(), calibrations[0])]
        measured += list(zip(references, calibrations[1:], strict=True)) if calibrations[1:] else []
        for s, calibration in measured:
            outs.append(self._groups(s, calibration, places, runtime))
            others.append(Population(_mixture(outs[-1], runtime), outs[-1].forget))
        known_to = plain.limit(allowed) < 1 or draws.p_value <= 0.05
        notes = self._notes(plain, draws, tested, known_to)
        shown = calibrations[0].words
        detail = _detail(plain, groups, draws, tested, mixture) | {
            "nonmembers": how,
            "calibration": shown,
            "members": self.members,
            "identifiable": known_to,
        }
        findings = _both("", plain, others, draws, allowed, detail, groups, notes)
        bent = Population(mixture, groups.forget, covariate=True)
        inner = [Population(o.mixture, o.x, covariate=True) for o in others]
        extra = {
            "identifiable": known_to,
            "slope": bent.best.slope.tolist(),
            "centre": bent.best.centre.tolist(),
        }
        findings += _both("-shifted", bent, inner, draws, allowed, extra, groups, notes)
        findings.append(_erased(groups, outs))
        covered = sum(round(t["covered"] * self.injections) for t in tested)
        total = len(tested) * self.injections
        low, high = wilson(covered, total)
        return [
            *findings,
            Finding(
                f"{self.name}/self-test", covered / total, "up", low=low, high=high,
                detail={"injections": tested},
            ),
        ]  # fmt: skip

    def _calibrations(
        self, subject: Subject, references: Sequence[Subject], runtime: Runtime
    ) -> list[Calibration]:
        """Of the subject, then of each reference if it has any."""
        if self.members == "retain":
            one = by_halves(subject, self.halves, runtime)
            return [one] * (1 + len(references))
        alone = [
            by_references([o for o in references if o is not r], runtime) for r in references
        ] if len(references) > 1 else []  # fmt: skip
        return [by_references(references, runtime), *alone]

    def _groups(
        self, s: Subject, calibration: Calibration, places: Places, runtime: Runtime
    ) -> Groups:
        def thinned(what: str, size: int) -> np.ndarray:
            order = torch.randperm(size, generator=runtime.generator(self.name, what)).numpy()
            return np.sort(order[: self.max_samples])

        forget = calibration.scores(s, "forget-train")
        if self.members == "original":
            member = calibration.scores(s.original(), "forget-train")
        else:
            member = calibration.scores(s.whole, "retain-train")
        out = np.concatenate([calibration.scores(s, p)[at.numpy()] for p, at in places.items()])
        label = np.concatenate([s.labels(p)[at].numpy() for p, at in places.items()])
        hard = np.concatenate([calibration.means(s, p)[at.numpy()] for p, at in places.items()])
        kept = thinned("non-members", len(out))
        parts = self._parts(out[kept], label[kept], hard[kept])
        return Groups(forget, tuple(parts), member[thinned("members", len(member))])

    def _parts(self, out: Array, label: np.ndarray, hard: Array) -> list[Array]:
        """The non-members' scores by stratum; strata that are too small are one."""
        if self.strata == "none":
            return [out]
        of = label if self.strata == "class" else (hard > np.median(hard)).astype(int)
        parts = [out[of == k] for k in np.unique(of)]
        big = [p for p in parts if len(p) >= SMALLEST]
        rest = [p for p in parts if len(p) < SMALLEST]
        if not rest:
            return big
        left = np.concatenate(rest)
        return [*big, left] if len(left) >= SMALLEST or not big else [*big[:-1], np.concatenate([big[-1], left])]  # fmt: skip

    @staticmethod
    def _notes(plain: Population, draws: Bootstrap, tested: Sequence[dict[str, float]], known: bool) -> str:  # fmt: skip
        notes = []
        if not known:
            notes.append("not identifiable: members and non-members score too much alike to tell")
        if len(plain.x) < FEW:
            notes.append(f"only {len(plain.x)} records: so few give a coarse limit")
        if draws.fit < MISFIT:
            notes.append("the scores are no mixture of these members and non-members, so read it with care")  # fmt: skip
        covered = float(np.mean([t["covered"] for t in tested]))
        if covered < COVERED:
            notes.append(f"in the self-test only {covered:.0%} of the limits held")
        return "; ".join(notes)

    def _none(self, what: str, why: str | None) -> Finding:
        return Finding(f"{self.name}/{what}", None, reason=why)


def _random(runtime: Runtime, what: str) -> np.random.Generator:
    return np.random.default_rng(runtime.seed_for("memorised-fraction", what))


def _mixture(groups: Groups, runtime: Runtime) -> Mixture:
    return Mixture.of(groups.out, groups.member, groups.forget, _random(runtime, "folds"))


def _both(
    suffix: str,
    population: Population,
    others: Sequence[Population],
    draws: Bootstrap,
    allowed: Thresholds,
    detail: dict[str, Any],
    groups: Groups,
    notes: str,
) -> list[Finding]:
    """Limit and estimate of one model of the shift; `others`: the original, then references."""
    limit = population.limit(allowed)
    before, *theirs = (o.limit(allowed) for o in others)

    def wide(fraction: float) -> float:
        return allowed(fraction) * TWO_SIDED / ONE_SIDED

    beside = against(theirs)
    estimates = against([o.best.fraction for o in others[1:]])
    for fields in (beside, estimates):
        fields["reason"] = "; ".join(p for p in (notes, fields["reason"]) if p) or None
    low, high = (float(v) for v in np.percentile(draws.limits, [2.5, 97.5]))
    known = detail["identifiable"]
    return [
        Finding(
            f"memorised-fraction/limit{suffix}", limit,
            # the bootstrap is of the fit without a bend
            low=None if suffix else min(low, limit), high=None if suffix else max(high, limit),
            original=before, detail=detail | {"threshold": allowed(limit)}, **beside,
        ),
        Finding(
            f"memorised-fraction/estimate{suffix}",
            population.best.fraction if known else None,
            low=population.limit(wide, lower=True) if known else None,
            high=population.limit(wide) if known else None,
            original=others[0].best.fraction,
            per_sample={"posterior": population.best.posterior, "score": groups.forget},
            detail={"p_value": draws.p_value},
            **estimates,
        ),
    ]  # fmt: skip


def _detail(
    plain: Population, groups: Groups, draws: Bootstrap, tested: Any, mixture: Mixture
) -> dict[str, Any]:
    at, ts = plain.curve()
    out = np.concatenate(groups.out)
    cut = best_threshold(groups.member, out)
    everything = np.concatenate([out, groups.member, groups.forget])
    least, most = (float(v) for v in np.percentile(everything, [0.5, 99.5]))
    edges = np.linspace(least, most, 31)
    return {
        "profile": {"fraction": at.tolist(), "ts": ts.tolist()},
        "plain_limit": plain.limit(ONE_SIDED),
        "paper_limit": plain.limit(TWO_SIDED),
        "fit": draws.fit,
        "p_value": draws.p_value,
        "records": len(groups.forget),
        "nonmember_records": [len(g) for g in groups.out],
        "member_records": len(groups.member),
        "classify_and_count": float((groups.forget > cut).mean()),
        "rivals": rivals(mixture, groups.forget, [len(g) for g in groups.out]),
        "histogram": {
            "edges": edges.tolist(),
            **{
                name: (np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] / len(x)).tolist()
                for name, x in (("forget", groups.forget), ("nonmember", out), ("member", groups.member))
            },
        },
        "injections": tested,
    }  # fmt: skip


def _erased(groups: Groups, others: Sequence[Groups]) -> Finding:
    """The share that looks less like a member than 95 % of the non-members."""

    def below(g: Groups) -> np.ndarray:
        return g.forget < np.percentile(np.concatenate(g.out), 5)

    mine = below(groups)
    low, high = wilson(int(mine.sum()), len(mine))
    before, *theirs = (float(below(g).mean()) for g in others)
    return Finding(
        "memorised-fraction/erased", float(mine.mean()), low=low, high=high, original=before,
        detail={"by_chance": 0.05}, per_sample={"erased": mine}, **against(theirs),
    )  # fmt: skip

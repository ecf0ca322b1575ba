"""Who stands for samples never seen, and how groups of scores are told apart."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from expunge.audits._intervals import Z95, auc, auc_interval, two_sided
from expunge.audits._splits import FEWEST
from expunge.core.audit import Finding, Subject, against
from expunge.core.data import Data
from expunge.core.hashing import hash_tensors
from expunge.core.runtime import Runtime

Places = dict[str, Tensor]
"""Positions within splits, by split."""


def nonmembers(
    subject: Subject,
    how: str,
    runtime: Runtime,
    strata: Callable[[Tensor], Tensor] = lambda labels: labels,
    stratum: str = "class",
) -> tuple[Places | None, str]:
    """Choose test samples to stand for non-members.

    `matched` draws them so that class shares equal those of the forget set, as many as the
    scarcest class allows: a non-member set with other classes would make any audit look good.

    Args:
        subject: gives the splits and labels; its model is not used.
        how: `matched` or `test` (all test samples).
        runtime: seeds the draw.
        strata: turns labels [n] into whole numbers ≥ 0 [n] whose shares are matched.
        stratum: what such a number stands for, in one word.

    Returns:
        Positions by split and a description, or None and the reason.
    """
    splits = [s for s in ("forget-test", "retain-test") if len(subject.splits[s])]
    shared = also_to_forget(subject)
    if shared:
        return None, (
            f"{shared} of the test samples {'is' if shared == 1 else 'are'} among the samples to "
            "forget: take them out of the test data"
        )
    if how == "test":
        return {s: torch.arange(len(subject.splits[s])) for s in splits}, "all test samples"
    wanted = strata(subject.labels("forget-train")).bincount()
    labels = torch.cat([strata(subject.labels(s)) for s in splits])
    there = labels.bincount(minlength=len(wanted))[: len(wanted)]
    present = wanted.nonzero().flatten()
    if not int(there[present].min()):
        lacking = int(present[there[present].argmin()])
        return (
            None,
            f"the test data has no sample of {stratum} {lacking}, which the forget set holds",
        )
    scale = float((there[present].double() / wanted[present]).min())
    generator = runtime.generator("membership", "non-members")
    drawn = []
    for c in present.tolist():
        pool = (labels == c).nonzero().flatten()
        take = min(max(round(int(wanted[c]) * scale), 1), len(pool))
        drawn.append(pool[torch.randperm(len(pool), generator=generator)[:take]])
    chosen = torch.cat(drawn).sort().values
    if len(chosen) < FEWEST:
        return (
            None,
            f"only {len(chosen)} test samples match the forget set's {_plural(stratum)}, {FEWEST} are needed",
        )
    places, offset = {}, 0
    for s in splits:
        size = len(subject.splits[s])
        inside = chosen[(chosen >= offset) & (chosen < offset + size)] - offset
        if len(inside):
            places[s] = inside
        offset += size
    return places, f"{len(chosen)} test samples with the forget set's {stratum} shares"


def also_to_forget(subject: Subject) -> int:
    """How many test inputs equal, bit for bit, one to forget: no model has not seen them.

    Looked at once a request and kept with the problem.
    """
    problem, whole = subject.problem, subject.whole
    memory: dict[str, int] = problem.__dict__.setdefault("_shared_inputs", {})
    if problem.test is None:
        return 0
    key = hash_tensors({"forget": whole.splits["forget-train"]})
    key += problem.train.fingerprint() + problem.test.fingerprint()
    if key not in memory:
        # padding of texts depends on the others in a batch
        size = 1 if problem.kind == "causal-lm" else 256
        forget = set(_inputs(problem.train, whole.splits["forget-train"], size))
        memory[key] = sum(x in forget for x in _inputs(problem.test, problem.test.ids, size))
    return memory[key]


def _inputs(data: Data, ids: Tensor, size: int) -> Iterator[bytes]:
    """A digest of each input."""
    for batch in data.batches(size, ids):
        parts = [batch.x] if isinstance(batch.x, Tensor) else list(batch.x.values())
        rows = [p.cpu().contiguous().flatten(1) if p.ndim > 1 else p.cpu()[:, None] for p in parts]
        for n in range(len(batch)):
            yield hashlib.sha256(
                b"".join(r[n].contiguous().view(torch.uint8).numpy().tobytes() for r in rows)
            ).digest()


def constant(*groups: np.ndarray) -> str | None:
    """Why scores tell no sample from another, or None."""
    values = np.concatenate(groups)
    return "all samples have the same score" if np.ptp(values) == 0 else None


def _plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def sides(
    score: Callable[[Subject, str], np.ndarray], subject: Subject, places: Places
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the forget samples [n] and of the non-members [m]."""
    out = [score(subject, split)[at.numpy()] for split, at in places.items()]
    return score(subject, "forget-train"), np.concatenate(out)


def auc_finding(
    name: str,
    score: Callable[[Subject, str], np.ndarray],
    subject: Subject,
    references: Sequence[Subject],
    places: Places,
    how: str,
) -> Finding:
    """A threshold attack: two-sided AUC of forget samples against non-members, for every model.

    Args:
        name: of the finding.
        score: values [n] of a subject's split; higher looks more like a member.
        subject: the model under audit.
        references: retrained models.
        places: who stands for non-members.
        how: in words.

    Returns:
        The finding; the unfolded AUCs, 1 = the forget samples look like members, are in its detail.
    """
    forget, out = sides(score, subject, places)
    why = constant(forget, out)
    if why:
        return Finding(name, None, reason=why)
    raw, (low, high) = auc(forget, out), auc_interval(forget, out)
    value, folded_low, folded_high = two_sided(raw, low, high)
    theirs = [auc(*sides(score, r, places)) for r in references]
    before = auc(*sides(score, subject.original(), places))
    kept = score(subject.whole, "retain-train")
    groups = {"forget": forget, "nonmember": out} | ({"retain": kept} if len(kept) else {})
    return Finding(
        name,
        value,
        low=folded_low,
        high=folded_high,
        original=max(before, 1 - before),
        detail={
            "auc": raw,
            "auc_low": low,
            "auc_high": high,
            "reference_auc": float(np.mean(theirs)) if theirs else None,
            "reference_auc_spread": float(np.ptp(theirs)) if len(theirs) > 1 else None,
            "original_auc": before,
            "threshold": best_threshold(forget, out),
            "histogram": histograms(groups),
            "nonmembers": how,
        },
        per_sample={"score": forget},
        **against([max(a, 1 - a) for a in theirs]),
    )


def best_threshold(forget: np.ndarray, out: np.ndarray) -> float:
    """The cut between two scores with the best balanced accuracy, in either direction."""
    values = np.unique(np.concatenate([forget, out]))
    if len(values) == 1:
        return float(values[0])
    cuts = (values[1:] + values[:-1]) / 2
    above_f = 1 - np.searchsorted(np.sort(forget), cuts) / len(forget)
    above_o = 1 - np.searchsorted(np.sort(out), cuts) / len(out)
    return float(cuts[np.abs(above_f - above_o).argmax()])


def histograms(groups: dict[str, np.ndarray], bins: int = 30) -> dict[str, list[float]]:
    """Shares a bin for each group over common edges (1st to 99th percentile), outliers at the ends.

    Returns:
        `edges` (bins + 1 numbers) and one list of shares a group, each summing to 1.
    """
    low, high = np.percentile(np.concatenate(list(groups.values())), [1, 99])
    # equal scores still need a bin of some width, at any magnitude
    edges = np.linspace(low, high if high > low else low + max(1e-9, abs(low) * 1e-6), bins + 1)
    shares = {
        name: (np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0] / len(x)).tolist()
        for name, x in groups.items()
    }
    return {"edges": edges.tolist(), **shares}


def attack_accuracy(
    forget: np.ndarray, out: np.ndarray, generator: torch.Generator
) -> tuple[float, float, float]:
    """Balanced accuracy of logistic regression on the loss, clipped to [−100, 100].

    Five stratified shuffle splits of as many forget samples as non-members, a fifth held out.

    Args:
        forget: losses [n], n ≥ 10.
        out: losses [m], m ≥ 10.
        generator: draws the larger side down to the smaller one.

    Returns:
        The accuracy and its 95 % interval, none of them folded.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    size = min(len(forget), len(out))
    drawn = [x[torch.randperm(len(x), generator=generator).numpy()[:size]] for x in (forget, out)]
    x = np.clip(np.concatenate(drawn), -100, 100)[:, None]
    y = np.repeat([1, 0], size)
    splits = StratifiedShuffleSplit(n_splits=5, test_size=0.2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an optimiser that stops early still gives an attacker
        got = cross_val_score(LogisticRegression(), x, y, cv=splits, scoring="balanced_accuracy")
    mean = float(got.mean())
    # held-out parts overlap between splits: the error is taken as that of one of them
    half = Z95 * float(np.sqrt(max(mean * (1 - mean), 1e-4) / max(1, 0.4 * size)))
    return mean, max(0.0, mean - half), min(1.0, mean + half)

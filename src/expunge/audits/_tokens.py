r"""What a language model says of answers, token by token; computed once and shared by audits.

For an answered token \(y_t\) behind \(y_{<t}\): \(\log p(y_t)\), whether it is the most likely token,
and \(z_t = (\log p(y_t) - \mu_t) / \sigma_t\) with \(\mu_t, \sigma_t\) the mean and the standard
deviation of \(\log p\) over the vocabulary under p itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from expunge.audits._intervals import share_interval
from expunge.audits._splits import missing
from expunge.core.audit import Finding, Subject, against
from expunge.core.data import Batch
from expunge.core.needs import Needs
from expunge.problems.tokens import TokenData, Tokens, pad
from expunge.train.token_losses import answered, targets

HELD = 2**24
"""Logits looked at at a time, in float64 (128 MiB)."""
T = TypeVar("T")
FLOOR = 1e-6
"""Smallest variance of log p: a prediction without any spread has no z."""


TOKENS = Needs(
    forget=True, retain=True, labels="all", models=2, capabilities=frozenset({"token_logits"})
)
"""What audits of answers need: both sides with their answers, and logits of tokens."""


@dataclass(frozen=True)
class Answer:
    """One answer as a model sees it, all of it [t] over the answered tokens.

    Attributes:
        logp: log-probability of each token, in nats.
        right: whether it is the most likely one.
        z: its log-probability in standard deviations from the vocabulary's mean.
        ends: whether it is the end of a text, which is in every answer and so tells nothing.
    """

    logp: np.ndarray
    right: np.ndarray
    z: np.ndarray
    ends: np.ndarray

    @property
    def mean(self) -> float:
        r"""\(-N / |y|\): the mean log-probability of all tokens."""
        return float(self.logp.mean())

    def told(self) -> Answer:
        """The answer without the end of the text; as it is if there is nothing else."""
        keep = ~self.ends
        if not keep.any():
            return self
        return Answer(self.logp[keep], self.right[keep], self.z[keep], self.ends[keep])


def once(
    subject: Subject, what: tuple[Any, ...], ids: Tensor, compute: Callable[[Tensor], list[T]]
) -> list[T]:
    """Results for samples, each computed once and kept with the whole subject.

    Args:
        subject: whose results they are; a part of a subject finds those of the whole.
        what: key of the quantity, with the split and all settings it depends on.
        ids: samples [n].
        compute: gives results for some of them.

    Returns:
        One result a sample, in the order of `ids`.
    """
    kept = subject.whole.__dict__.setdefault("_of_tokens", {}).setdefault(what, {})
    new = [i for i in ids.tolist() if i not in kept]
    if new:
        kept.update(zip(new, compute(torch.tensor(new)), strict=True))
    return [kept[i] for i in ids.tolist()]


def answers(subject: Subject, split: str, size: int, ids: Tensor | None = None) -> list[Answer]:
    """The answers of a split's samples, all or those with `ids`, read `size` at a time."""
    return once(
        subject,
        ("answers", split, size),
        subject.splits[split] if ids is None else ids,
        lambda ids: read(subject, rows_of(subject, split, ids), size),
    )


def rows_of(subject: Subject, split: str, ids: Tensor) -> list[Tokens]:
    """Sequences of some samples of a split."""
    data = subject.data_of(split)
    return [data.rows[p] for p in data.positions(ids).tolist()]


@torch.no_grad()
def read(subject: Subject, rows: Sequence[Tokens], size: int) -> list[Answer]:
    """Run the model over sequences, `size` of similar length at a time.

    Args:
        subject: its model, whatever is around or on it.
        rows: n sequences.
        size: sequences a forward pass.

    Returns:
        Their answers, in order.
    """
    problem, device = subject.problem, subject.runtime.device
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    ends = torch.tensor(end_tokens(subject))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), size):
        places = order[start : start + size]
        x, y = pad([rows[p] for p in places], subject.data_of("train").filler)
        batch = Batch(x, y, torch.arange(len(places)), len(places)).to(device)
        assert batch.y is not None
        logits = answered(problem.capability("token_logits")(subject.model, batch), batch.y)
        following, mask = targets(y)
        tokens = following[mask]
        logp, right, z = said(logits, tokens.to(device))
        counts = mask.sum(1).tolist()
        columns = [t.split(counts) for t in (logp, right, z, torch.isin(tokens, ends))]
        for place, *parts in zip(places, *columns, strict=True):
            found[place] = Answer(*(p.numpy() for p in parts))
    return [found[n] for n in range(len(rows))]


def said(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability, whether it is the largest, and z [n] of tokens [n] under logits [n, V]."""
    parts = []
    step = max(1, HELD // logits.shape[-1])
    for some, wanted in zip(logits.split(step), tokens.split(step), strict=True):
        log_p = some.double().log_softmax(-1)
        p = log_p.exp()
        finite = torch.where(p > 0, log_p, 0.0)  # 0 · log 0 is 0
        mu = (p * finite).sum(-1)
        variance = (p * (finite - mu[:, None]).square()).sum(-1)
        logp = log_p.gather(-1, wanted[:, None])[:, 0]
        z = (logp - mu) / variance.clamp(min=FLOOR).sqrt()
        parts.append((logp.cpu(), (log_p.argmax(-1) == wanted).cpu(), z.cpu()))
    empty = torch.zeros(0, dtype=torch.float64)
    if not parts:
        return empty, empty.bool(), empty
    logp, right, z = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, right, z


def end_tokens(subject: Subject) -> list[int]:
    """Token ids that end a text, as far as the problem knows them."""
    problem = subject.problem
    return list(problem.capability("ends")()) if problem.can("ends") else []


def unread(subjects: Sequence[Subject], split: str, size: int) -> str | None:
    """Why the answers of a split cannot be scored, or None."""
    why = missing(subjects[0], split)
    if why:
        return why
    if not isinstance(subjects[0].data_of(split), TokenData):
        return "the data is not made of tokens"
    for subject in subjects:
        if any(np.isnan(a.logp).any() for a in answers(subject, split, size)):
            return f"a model gives NaN outputs on {split}"
    return None


NO_ALTERNATES = "the data has no alternate answers to be wrong; give samples a column `alternate`"


def alternates_of(subject: Subject, split: str, ids: Tensor) -> list[list[Tokens]]:
    """Alternates of some samples of a split whose data has some."""
    data = subject.data_of(split)
    return [data.alternates[p] for p in data.positions(ids).tolist()]


def with_alternates(
    subjects: Sequence[Subject], split: str, size: int
) -> tuple[Tensor, str | None]:
    """Ids of the first subject's samples of a split that have alternates; why there are none, or None."""
    why, subject = unread(subjects, split, size), subjects[0]
    if why or subject.data_of(split).alternates is None:
        return torch.empty(0), why or NO_ALTERNATES
    ids = subject.splits[split]
    ids = ids[torch.tensor([bool(a) for a in alternates_of(subject, split, ids)])]
    return ids, None if len(ids) else NO_ALTERNATES


def share_finding(
    name: str,
    measure: Callable[[Subject], np.ndarray],
    subject: Subject,
    references: Sequence[Subject],
    label: str,
    detail: Mapping[str, Any] | None = None,
) -> Finding:
    """Mean over samples of a quantity in 0 … 1, beside the original's and the references'.

    Args:
        name: of the finding.
        measure: values [n] of a subject.
        subject: the model under audit.
        references: retrained models.
        label: what one sample's value is called.
        detail: more than the number of samples.

    Returns:
        The finding, with Student's t interval over samples, cut at 0 and 1.
    """
    each = measure(subject)
    low, high = share_interval(each)
    return Finding(
        name,
        float(each.mean()),
        low=low,
        high=high,
        original=float(measure(subject.original()).mean()),
        detail={"n": len(each), **(detail or {})},
        per_sample={label: each},
        **against([float(measure(r).mean()) for r in references]),
    )

"""Why a split cannot be measured: in one place, so that every audit says it in the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expunge.core.audit import Subject

SPLITS = ("forget-train", "retain-train", "forget-test", "retain-test")
"""What audits measure on, in the order of their findings."""
NO_REFERENCE = "no retrained reference to compare with"
NO_TEST = "there is no test data"
ONE_CLASS = "the model knows one class only, so nothing can be told from its outputs"
ONE_LABEL = "the training data has one class alone: every model says it of every sample"
FEWEST = 10
"""Fewer samples than this say nothing."""


def missing(subject: Subject, split: str, *, labels: bool = True) -> str | None:
    """Why there is nothing to predict on a split, or None.

    Args:
        subject: the model under audit.
        split: e.g. `forget-test`.
        labels: whether true labels are needed.

    Returns:
        One clause for `Finding.reason`.
    """
    if split not in subject.splits:
        return NO_TEST
    if not len(subject.splits[split]):
        if split != "forget-test":
            return "no sample is left on this side"
        if subject.problem.kind == "causal-lm":
            return "no test sample belongs to the request"
        regression = subject.problem.kind == "regression"
        what = "range of targets" if regression else "whole class"
        if not subject.request.about_labels:
            return f"no {what} was forgotten, so no test sample belongs to the request"
        return f"the test data has no sample of the forgotten {what.removeprefix('whole ')}"
    if labels and not subject.data_of(split).labelled:
        return f"the {'test' if split.endswith('test') else 'training'} data has no labels"
    return None


def unusable(
    subjects: Sequence[Subject],
    split: str,
    *,
    labels: bool = True,
    finite: bool = True,
    outputs: Callable[[Subject, str], Tensor] = Subject.logits,
) -> str | None:
    """Why predictions on a split cannot be scored, or None.

    Args:
        subjects: the model under audit and those it is compared with.
        split: e.g. `forget-train`.
        labels: whether true labels are needed.
        finite: whether infinite outputs are in the way too, not only NaN.
        outputs: what is looked at: `Subject.logits` or `Subject.predictions`.

    Returns:
        One clause for `Finding.reason`.
    """
    why = missing(subjects[0], split, labels=labels)
    if why:
        return why
    for subject in subjects:
        found = outputs(subject, split)
        if bool(torch.isnan(found).any()) or (finite and not bool(torch.isfinite(found).all())):
            return f"a model gives NaN{' or infinite' if finite else ''} outputs on {split}"
    return None


def one_class(subject: Subject) -> str | None:
    """Why a classifier's outputs say nothing where there is one class alone, or None."""
    if subject.logits("forget-train").shape[1] < 2:
        return ONE_CLASS
    labels = subject.problem.train.labels
    if labels is not None and len(labels.unique()) < 2:
        return ONE_LABEL
    return None

"""Which classes of a model are most like another data set: the hardest ones to forget for its sake."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from expunge.core.data import Data
from expunge.core.errors import DataError, SettingError
from expunge.core.problem import Problem


@torch.no_grad()
def similar_classes(
    problem: Problem, downstream: Data, count: int, over: Literal["max", "mean"] = "max"
) -> list[int]:
    r"""Rank the problem's classes by likeness to another data set's, and take the first.

    \(\mathrm{score}(c) = \max_s \cos(\bar z_c, \bar z_s)\) over the classes s of the other data, with mean
    features \(\bar z\) (input of the last layer) of the original model; of equal scores the smaller label
    is first. After "Are We Truly Forgetting?" (2025, arXiv 2503.06991), whose lists are published without
    the rule that made them.

    Args:
        problem: a classifier; its training data is read.
        downstream: labelled data with inputs that the model takes.
        count: how many classes.
        over: the best of the other classes, or their mean.

    Returns:
        Labels, the most similar first: `xp.forget(label=similar_classes(…))`.

    Raises:
        DataError: the other data has no labels.
        SettingError: there are not so many classes.
    """
    if not downstream.labelled:
        raise DataError("classes are compared by their labels, and the other data has none")
    labels, own = _means(problem, problem.train)
    if not 0 < count <= len(labels):
        raise SettingError(f"{count} classes were asked for; the training data has {len(labels)}")
    _, theirs = _means(problem, downstream)
    cosine = normalize(own, dim=1) @ normalize(theirs, dim=1).T
    scores = cosine.amax(1) if over == "max" else cosine.mean(1)
    order = torch.sort(scores, descending=True, stable=True).indices
    return [int(label) for label in labels[order[:count]]]


def _means(problem: Problem, data: Data) -> tuple[Tensor, Tensor]:
    """Labels [C] in ascending order and the mean feature [C, d] of each."""
    read: Any = problem.capability("penultimate")
    device = next(problem.model.parameters()).device
    modes = [(m, m.training) for m in problem.model.modules()]
    problem.model.eval()
    try:
        parts = [
            read(problem.model, batch.to(device)).flatten(1).double().cpu()
            for batch in data.batches(256)
        ]
    finally:
        for module, training in modes:
            module.training = training
    names, places = data.labels_of(data.ids).unique(return_inverse=True)
    found = torch.cat(parts)
    total = torch.zeros(len(names), found.shape[1], dtype=torch.double)
    return names, total.index_add(0, places, found) / places.bincount()[:, None]

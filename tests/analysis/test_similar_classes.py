from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.analysis.similar_classes import similar_classes
from expunge.core.data import Data
from expunge.core.errors import DataError, SettingError
from expunge.problems.classification import Classification


@pytest.fixture
def problem():
    torch.manual_seed(0)
    y = torch.arange(100) % 5
    x = 3 * torch.randn(5, 8)[y] + torch.randn(100, 8)
    return Classification(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), (x, y))


def images_of(problem, *labels):
    """The training samples of some classes under other labels."""
    data = problem.train
    ids = data.ids[torch.isin(data.labels, torch.tensor(labels))]
    batch = data.fetch(ids)
    return Data((batch.x, batch.y + 40))


def test_truly_forgetting_invariant_6_the_same_images_come_first(problem):
    found = similar_classes(problem, images_of(problem, 3), 5)
    assert found[0] == 3
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert set(similar_classes(problem, images_of(problem, 1, 4), 2)) == {1, 4}


def test_scores_are_the_best_or_the_mean_over_the_other_classes(problem):
    other = images_of(problem, 0, 1, 2)
    batch, layers = problem.train.fetch(problem.train.ids), problem.model[:2]
    with torch.no_grad():
        z = layers(batch.x)
    means = torch.stack([z[batch.y == c].mean(0) for c in range(5)])
    cosine = torch.nn.functional.cosine_similarity(means[:, None], means[None, :3], dim=-1)
    wanted = cosine.mean(1).argsort(descending=True).tolist()
    assert similar_classes(problem, other, 5, "mean") == wanted
    best = cosine.amax(1)
    found = similar_classes(problem, other, 5)
    assert found[:3] == [0, 1, 2]  # each is itself there: 1, and ties go to the smaller label
    assert found[3:] == sorted((3, 4), key=lambda c: -best[c])


def test_the_model_stays_as_it_was(problem):
    problem.model.train()
    similar_classes(problem, images_of(problem, 3), 1)
    assert problem.model.training


def test_bad_questions(problem):
    with pytest.raises(SettingError, match="has 5"):
        similar_classes(problem, images_of(problem, 3), 6)
    with pytest.raises(DataError, match="labels"):
        similar_classes(problem, Data(torch.randn(4, 8)), 1)

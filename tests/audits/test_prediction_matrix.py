from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from expunge.audits.accuracy import Accuracy
from expunge.audits.prediction_matrix import PredictionMatrix
from expunge.core.request import Request
from expunge.core.runtime import Runtime

Y, Y_TEST = [0, 1, 2, 3], [0, 0, 1, 1, 2, 2]  # class 3 has no test sample


def predicting(*test):
    return one_hot(torch.tensor([0, 1, 2, 3, *test]), 4).float() * 3


@pytest.fixture
def subjects(tables):
    return tables(
        Y, Y_TEST, Request(label=2),
        predicting(0, 0, 1, 1, 2, 2), predicting(0, 1, 1, 1, 0, 0),
        predicting(0, 0, 1, 1, 0, 0), predicting(0, 0, 1, 1, 0, 1),
    )  # fmt: skip


def test_matrix_and_distances_by_hand(subjects):
    _, released, *references = subjects
    (found,) = PredictionMatrix().run(released, references, Runtime())
    assert found.name == "prediction-matrix/test" and found.direction == "down"
    assert found.detail["matrix"] == [[0.5, 0.5, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0] * 4]
    assert found.detail["counts"] == [[1, 1, 0, 0], [0, 2, 0, 0], [2, 0, 0, 0], [0] * 4]
    assert found.detail["reference_matrix"] == [[1, 0, 0, 0], [0, 1, 0, 0], [0.75, 0.25, 0, 0], [0] * 4]  # fmt: skip
    # total variation of rows 0, 1, 2: 1/2, 0, 1/4; class 3 does not count
    assert found.value == pytest.approx(0.25)
    assert found.original == pytest.approx(1 / 3)
    assert found.reference == pytest.approx(
        (0.5 + 0.5) / 2 / 3
    )  # each against the other: 0, 0, 1/2
    assert found.floor == pytest.approx(0.5 / 3)


def test_without_references_the_matrix_stays(subjects):
    (found,) = PredictionMatrix().run(subjects[1], [], Runtime())
    assert found.value is None and found.reason == "no retrained reference to compare with"
    assert found.detail["counts"][2] == [2, 0, 0, 0]
    (found,) = PredictionMatrix().run(subjects[1], subjects[2:3], Runtime())
    assert found.value is not None and found.reference is None and "one reference" in found.reason


def test_without_test_data(tables):
    (subject,) = tables(Y, None, Request(label=2), predicting())
    (found,) = PredictionMatrix().run(subject, [], Runtime())
    assert found.value is None and found.reason == "there is no test data"


def test_comparator_invariant_4_rows_are_shares_and_the_diagonal_is_the_accuracy(subjects):
    released = subjects[1]
    (found,) = PredictionMatrix().run(released, subjects[2:], Runtime())
    matrix = torch.tensor(found.detail["matrix"])
    assert torch.equal(matrix[:3].sum(1), torch.ones(3))
    said = {f.name: f.value for f in Accuracy().run(released, subjects[2:], Runtime())}
    assert said["accuracy/forget-test"] == matrix[2, 2]
    assert said["accuracy/retain-test"] == matrix.diagonal()[:2].mean() == 0.75  # not 1/2 nor 1

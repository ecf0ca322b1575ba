from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from expunge.audits.accuracy import Accuracy
from expunge.core.data import Data
from expunge.core.request import Request
from expunge.core.runtime import Runtime

Y = [0, 0, 1, 1, 2, 2, 2, 2]
Y_TEST = [0, 1, 2, 2]


def predicting(classes):
    return one_hot(torch.tensor(classes), 3).float() * 3


@pytest.fixture
def subjects(tables):
    perfect = predicting(Y + Y_TEST)
    released = predicting([0, 0, 1, 1, 2, 0, 0, 0, 0, 1, 0, 2])
    first = predicting([0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0])
    second = predicting([0, 0, 1, 0, 2, 2, 0, 0, 0, 0, 0, 0])
    return tables(Y, Y_TEST, Request(label=2), perfect, released, first, second)


def test_shares_references_and_classes_by_hand(subjects, by_name):
    _, released, *references = subjects
    found = by_name(Accuracy().run(released, references, Runtime()))
    got = {n: (f.value, f.reference, f.floor, f.original) for n, f in found.items()}
    assert got == {
        "accuracy/forget-train": (0.25, 0.25, 0.5, 1.0),
        "accuracy/retain-train": (1.0, 0.875, 0.25, 1.0),
        "accuracy/forget-test": (0.5, 0.0, 0.0, 1.0),
        "accuracy/retain-test": (1.0, 0.75, 0.5, 1.0),
    }
    assert found["accuracy/retain-train"].detail == {
        "per_class": {"0": [2, 2], "1": [2, 2]},
        "n": 4,
    }
    assert found["accuracy/forget-train"].detail == {"per_class": {"2": [1, 4]}, "n": 4}
    assert found["accuracy/forget-train"].per_sample["correct"].tolist() == [True, False, False, False]  # fmt: skip
    assert all(f.direction == "reference" and f.low < f.high for f in found.values())


def test_without_a_whole_class_no_test_sample_is_to_forget(tables, by_name, some_ids):
    logits = predicting(Y + Y_TEST)
    (subject,) = tables(Y, Y_TEST, some_ids(2), logits)
    found = by_name(Accuracy().run(subject, [], Runtime()))
    absent = found["accuracy/forget-test"]
    assert absent.value is None and "no whole class was forgotten" in absent.reason
    assert found["accuracy/forget-train"].reason == "no retrained reference to compare with"


def test_class_without_test_samples(tables, by_name):
    (subject,) = tables(Y, [0, 1, 1, 1], Request(label=2), predicting([*Y, 0, 1, 1, 1]))
    reason = by_name(Accuracy().run(subject, [], Runtime()))["accuracy/forget-test"].reason
    assert reason == "the test data has no sample of the forgotten class"


def test_without_test_data_or_test_labels(tables, by_name):
    (subject,) = tables(Y, None, Request(label=2), predicting(Y))
    found = by_name(Accuracy().run(subject, [], Runtime()))
    assert found["accuracy/retain-test"].value is None
    assert found["accuracy/retain-test"].reason == "there is no test data"
    (subject,) = tables(Y, Y_TEST, Request(label=2), predicting(Y + Y_TEST))
    subject.problem.test = Data(torch.arange(8.0, 12)[:, None])
    found = by_name(Accuracy().run(subject, [], Runtime()))
    assert found["accuracy/retain-test"].reason == "the test data has no labels"
    assert found["accuracy/retain-train"].value == 1.0


def test_a_broken_model_gets_a_reason_not_a_number(tables, by_name):
    broken = predicting(Y + Y_TEST)
    broken[0, 0] = torch.nan
    broken[-1, 0] = -torch.inf
    subjects = tables(Y, Y_TEST, Request(label=2), predicting(Y + Y_TEST), broken)
    found = by_name(Accuracy().run(subjects[1], [], Runtime()))
    assert found["accuracy/retain-train"].value is None
    assert "NaN" in found["accuracy/retain-train"].reason
    assert found["accuracy/forget-test"].value == 1.0  # a class ruled out by −∞ is a prediction


def test_order_of_storage_does_not_matter(tables, by_name):
    rng = np.random.default_rng(0)
    y, y_test = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
    logits = torch.from_numpy(rng.normal(size=(100, 3)))
    order = {"order": torch.from_numpy(rng.permutation(60)),
             "order_test": torch.from_numpy(rng.permutation(40))}  # fmt: skip
    (plain,) = tables(y, y_test, Request(label=2), logits)
    (mixed,) = tables(y, y_test, Request(label=2), logits, **order)
    a, b = (by_name(Accuracy().run(s, [], Runtime())) for s in (plain, mixed))
    assert a == b

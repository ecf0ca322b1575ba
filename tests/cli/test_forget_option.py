"""Labels in a forget list may be names of the model's classes; without a model, only numbers."""

from __future__ import annotations

import json

import pytest

from expunge.cli.common import request_from
from expunge.core.errors import ModelError, RequestError
from expunge.core.request import Request


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    names = {"model_type": "vit", "id2label": {"0": "cat", "1": "dog", "2": "7"}}
    (folder / "config.json").write_text(json.dumps(names))
    return str(folder)


def request(tmp_path, text, model):
    (tmp_path / "forget.csv").write_text(text)
    return request_from(str(tmp_path / "forget.csv"), None, None, None, None, model=model)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("label\ndog\n", Request(label=(1,))),
        ("label\n0\ndog\n", Request(label=(0, 1))),
        ("label\n7\n", Request(label=(2,))),
        ("id\n7\n", Request(ids=(7,))),
        ("name\ndog\n", Request(ids=("dog",))),
    ],
)
def test_names_of_classes(tmp_path, model, text, wanted):
    assert request(tmp_path, text, model) == wanted


def test_names_that_the_model_lacks(tmp_path, model):
    with pytest.raises(RequestError, match=r"'bird' is not a class number or name \(cat, dog, 7\)"):
        request(tmp_path, "label\nbird\n", model)


def test_without_a_model_labels_are_numbers(tmp_path):
    assert request(tmp_path, "label\n1\n", None) == Request(label=(1,))
    with pytest.raises(RequestError, match=r"'dog' is not a class number or name$"):
        request(tmp_path, "label\ndog\n", None)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="no model folder"):
        request(tmp_path, "label\ndog\n", "./nowhere/x")

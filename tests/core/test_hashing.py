"""Canonical JSON and content hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from expunge.core.hashing import (
    beside_weights,
    canonical,
    content_key,
    hash_array,
    hash_model,
    hash_tensors,
    plain,
)


def test_canonical_json_is_one_text():
    assert canonical({"b": 1, "a": (1, 2.5, None, True, "ü")}) == (
        b'{"a":[1,2.5,null,true,"\\u00fc"],"b":1}'
    )
    assert content_key([1]) == hashlib.sha256(b"[1]").hexdigest()


def test_plain_takes_what_records_hold():
    @dataclasses.dataclass
    class Pair:
        left: int
        right: tuple[int, ...]

    value = {
        "pair": Pair(1, (2, 3)),
        "set": {3, 1, 2},
        "array": np.array([[1, 2]]),
        "scalar": np.float32(0.5),
        "tensor": torch.tensor([1, 2]),
        "half": torch.tensor([0.5, float("inf")], dtype=torch.bfloat16),
        "path": Path("a") / "b",
        "nan": float("nan"),
        3: "number key",
    }
    assert json.loads(canonical(value)) == {
        "pair": {"left": 1, "right": [2, 3]},
        "set": [1, 2, 3],
        "array": [[1, 2]],
        "scalar": 0.5,
        "tensor": [1, 2],
        "half": [0.5, None],
        "path": "a/b",
        "nan": None,
        "3": "number key",
    }
    with pytest.raises(TypeError, match="no JSON form for object"):
        plain(object())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=5), st.randoms())
def test_the_order_of_keys_does_not_matter(value, random):
    keys = list(value)
    random.shuffle(keys)
    assert content_key({k: value[k] for k in keys}) == content_key(value)
    assert plain(json.loads(canonical(value))) == plain(value)


def test_tensors_hash_by_name_kind_shape_and_bits_only():
    a, b = torch.arange(6.0), torch.arange(3)
    base = hash_tensors({"a": a, "b": b})
    assert hash_tensors({"b": b, "a": a}) == base
    wide = torch.stack([a, a], 1)[:, 0]
    assert not wide.is_contiguous()
    assert hash_tensors({"a": wide, "b": b}) == base
    assert hash_tensors({"a": a.clone().requires_grad_(True), "b": b}) == base
    bit = a.clone().view(torch.int32)
    bit[5] ^= 1
    others = [
        {"a": bit.view(torch.float32), "b": b},
        {"a": a.view(2, 3), "b": b},
        {"a": a.view(3, 2), "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a.double(), "b": b},
        {"b": a, "a": b},
        {"a": a},
        {"a": a, "b": b, "c": torch.empty(0)},
        {},
    ]
    assert len({hash_tensors(o) for o in others} | {base}) == len(others) + 1


def test_zero_and_minus_zero_differ_and_nan_equals_itself():
    zero = torch.tensor([0.0])
    assert hash_tensors({"a": zero}) != hash_tensors({"a": -zero})
    nan = torch.tensor([float("nan")])
    assert hash_tensors({"a": nan}) == hash_tensors({"a": nan.clone()})


@pytest.mark.parametrize(
    "kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.complex64]
)
def test_every_kind_of_tensor_is_hashed(kind):
    tensor = torch.tensor([0, 1, 1]).to(kind)
    scalar = torch.tensor(1).to(kind)
    assert hash_tensors({"a": tensor}) != hash_tensors({"a": torch.zeros_like(tensor)})
    assert hash_tensors({"a": scalar}) != hash_tensors({"a": scalar.view(1)})


def test_a_models_hash_covers_buffers():
    model = nn.BatchNorm1d(3)
    before = hash_model(model)
    model.num_batches_tracked += 1
    assert hash_model(model) != before


def test_arrays_of_any_kind_are_hashed_by_content():
    values = [np.array([1, 2]), np.array([1.0, 2.0]), np.array(["a", "b"]), np.array(["a", None], object)]  # fmt: skip
    keys = [hash_array(v) for v in values]
    assert len(set(keys)) == 4 and keys == [hash_array(v.copy()) for v in values]
    assert hash_array(np.array([[1, 2]])) != keys[0] != hash_array(np.array([2, 1]))
    assert hash_array(torch.tensor([1, 2])) != hash_array(torch.tensor([1, 3]))


def test_what_a_model_computes_with_beside_its_weights():
    class Scaled(nn.Module):
        def __init__(self, scale, unsaved, table=0.0):
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.scale, self.table = scale, torch.tensor([table])
            self.register_buffer("shift", torch.tensor([unsaved]), persistent=False)
            self.anything = object()

    def key(*settings):
        torch.manual_seed(0)
        model = Scaled(*settings)
        return hash_model(model), content_key(beside_weights(model))

    first = key(1.0, 0.0)
    assert key(1.0, 0.0) == first
    for other in ((2.0, 0.0), (1.0, 3.0), (1.0, 0.0, 1.0)):
        weights, beside = key(*other)
        assert weights == first[0] and beside != first[1]
    model = Scaled(1.0, 0.0)
    assert beside_weights(model) == beside_weights(model.train()) == beside_weights(model.eval())

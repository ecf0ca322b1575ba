"""Canonical JSON and content hashes."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import leaky_relu, relu

from expunge.core.hashing import (
    beside_weights,
    canonical,
    content_key,
    hash_array,
    hash_function,
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


def test_arrays_of_objects_are_hashed_by_what_they_hold():
    days = [datetime.date(2024, 1, d) for d in (1, 2, 3)]
    kinds = [days, days[::-1], [Decimal(1)] * 3, [{1, 2}, None, "a"], [object()] * 3, [0, 1, 2]]
    keys = [hash_array(np.array(k, dtype=object)) for k in kinds]
    assert len(set(keys)) == len(kinds)
    assert keys == [hash_array(np.array(k, dtype=object)) for k in kinds]
    words = np.array(["a word that is too long to be kept in place"], np.dtypes.StringDType())
    assert hash_array(words) == hash_array(np.array(words.tolist(), dtype=object))


def test_sparse_tensors_are_hashed_by_their_entries():
    eye = torch.eye(3).to_sparse()
    assert hash_tensors({"a": eye}) == hash_tensors({"a": torch.eye(3).to_sparse()})
    assert len({hash_tensors({"a": t}) for t in (eye, 2 * eye, eye.to_dense())}) == 3


class Holding(nn.Module):
    """A layer beside anything."""

    def __init__(self, **held):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        vars(self).update(held)


class Squashed(Holding):
    """The same, computed otherwise."""

    def forward(self, x):
        """Squash."""
        return self.inner(x).tanh()


def beside(model):
    return content_key(beside_weights(model))


def test_functions_and_whatever_has_content_count_among_attributes():
    held = [
        {"act": torch.relu}, {"act": torch.tanh}, {"act": relu}, {"act": leaky_relu}, {"act": lambda x: x + 1},
        {"act": lambda x: x + 2}, {"act": functools.partial(leaky_relu, negative_slope=0.2)}, {"kind": torch.float16},
        {"part": slice(0, 2)}, {"part": slice(0, 1)}, {"parts": [2, object()]}, {"parts": [3, object()]},
        {"graph": torch.eye(3).to_sparse()}, {"graph": 2 * torch.eye(3).to_sparse()}, {"_scale": 1.0}, {"_scale": 2.0},
        {"days": np.array([datetime.date(2024, 1, 1)])}, {"tables": [torch.ones(2)]}, {"tables": [torch.zeros(2)]},
    ]  # fmt: skip
    keys = [beside(Holding(**h)) for h in held]
    assert len(set(keys)) == len(held)
    assert keys == [beside(Holding(**h)) for h in held]
    knot: dict = {}
    knot["itself"] = knot
    assert beside(Holding(odd=knot)) == beside(Holding())


def test_what_a_class_of_one_s_own_does_is_part_of_a_model():
    named, other = type("Net", (Holding,), {}), type("Net", (Squashed,), {})
    assert str(named()) == str(other()) and beside(named()) != beside(other())
    assert beside(named()) == beside(type("Net", (Holding,), {})())


IN_ANOTHER = """
import torch
from expunge.core.hashing import beside_weights, content_key, hash_function

class Chosen(torch.nn.Module):
    def forward(self, x):
        return x if x.shape in {"one", "two", "three", "four"} else -x

model = Chosen()
model.choices, model.act = {"one", "two", "three", "four"}, torch.tanh
print(hash_function(Chosen.forward), content_key(beside_weights(model)))
"""


def test_sets_are_hashed_alike_in_another_interpreter():
    said = {
        subprocess.run(
            [sys.executable, "-c", IN_ANOTHER], env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(said) == 1
    assert hash_function(torch.tanh) != hash_function(torch.relu)


def test_a_saved_and_loaded_transformer_is_the_same_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 50}, vision_config=small | {"image_size": 16, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    fresh = beside(model)
    model.save_pretrained(tmp_path)
    found = beside_weights(transformers.CLIPModel.from_pretrained(tmp_path))
    assert content_key(found) == beside(model) == fresh
    said = json.dumps(found)
    assert str(tmp_path) not in said and transformers.__version__ not in said
    config.vision_config.layer_norm_eps = 0.5
    assert beside(model) != fresh

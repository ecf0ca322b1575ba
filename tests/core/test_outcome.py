"""Changes go there and back to the bit; what was saved is checked when it is read."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from expunge.core.errors import ExpungeError, ModelError, StoreError
from expunge.core.hashing import hash_model
from expunge.core.outcome import Cost, Delta, Outcome, Weights, load
from expunge.problems.classification import Classification


class Mixed(nn.Module):
    """Tensors of every awkward kind: half precision, scalars, integers, truth values, tied, empty."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.short = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.linear.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("counts", torch.arange(4))
        self.register_buffer("nothing", torch.empty(0))

    def forward(self, x):
        return self.norm(self.linear(x)) * self.scale


@pytest.fixture
def models():
    torch.manual_seed(0)
    before = Mixed()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.linear.weight[1, 2] = float("nan")
        after.short[3] *= -1
        after.scale += 1
        after.norm.num_batches_tracked += 7
        after.norm.running_var[0] = 0.1
        after.mask[1] = True
        after.counts[2] = -5
    return before, after


CHANGED = {
    "linear.weight", "short", "scale", "norm.num_batches_tracked", "norm.running_var", "tied.weight",
    "mask", "counts",
}  # fmt: skip


@pytest.mark.parametrize("kind", [Weights, Delta])
def test_changes_hold_what_differs_and_rebuild_it(models, kind):
    before, after = models
    change = kind.between(before, after)
    assert set(change.tensors) == CHANGED
    assert hash_model(change.apply(copy.deepcopy(before))) == hash_model(after)


def test_a_delta_undone_gives_the_original_to_the_bit(models):
    before, after = models
    delta = Delta.between(before, after)
    there = delta.apply(copy.deepcopy(before))
    assert hash_model(delta.undo(there)) == hash_model(before)
    assert hash_model(delta.apply(copy.deepcopy(after))) == hash_model(before)


def test_a_delta_is_the_exclusive_or_of_the_bits():
    before, after = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(before.weight, 1.0)
    nn.init.constant_(after.weight, -1.0)
    (bits,) = Delta.between(before, after).tensors.values()
    assert bits.tolist() == [0, 0, 0, 0x80]  # the sign bit of a little-endian float


def test_weights_hold_nothing_of_the_old_values(models):
    before, after = models
    change = Weights.between(before, after)
    for name, tensor in change.tensors.items():
        new = after.state_dict()[name]
        assert torch.equal(tensor.view(-1).view(torch.uint8), new.view(-1).view(torch.uint8))
        assert tensor.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()


def test_equal_models_have_an_empty_change(models):
    before, _ = models
    for kind in (Weights, Delta):
        assert not kind.between(before, copy.deepcopy(before)).tensors


def test_a_change_for_another_architecture_is_refused(models):
    before, after = models
    change = Weights.between(before, after)
    with pytest.raises(ModelError, match="no tensor 'counts'"):
        change.apply(nn.Linear(4, 3))
    with pytest.raises(ModelError, match=r"shape \(3,\), the model's has \(2,\)"):
        Weights({"bias": torch.zeros(3)}).apply(nn.Linear(4, 2))


# ------------------------------------------------------------------ save and load


def saved(models, folder, kind=Weights):
    before, after = models
    outcome = Outcome(
        after,
        kind.between(before, after),
        curve=[{"step": 1, "loss": 0.5}, {"step": 2, "loss": float("nan")}],
        cost=Cost(1.25, 10, 20, 30),
        details={"note": "x"},
        record={"fingerprint": {"model": hash_model(before)}, "source": {}},
    )
    return outcome.save(folder)


@pytest.mark.parametrize("kind", [Weights, Delta])
def test_saving_and_loading_gives_the_same_outcome(models, tmp_path, kind):
    before, after = models
    folder = saved(models, tmp_path / "deep" / "run", kind)
    found = load(folder, model=before)
    assert hash_model(found.runnable()) == hash_model(after)
    assert not found.runnable().training
    assert found.cost == Cost(1.25, 10, 20, 30)
    assert found.curve == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert found.details == {"note": "x"}
    assert found.change.kind == kind.kind
    again = found.save(tmp_path / "again")
    for name in ("record.json", "change.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_loading_leaves_the_given_model_alone(models, tmp_path):
    before, _ = models
    wanted = hash_model(before)
    load(saved(models, tmp_path), model=before)
    assert hash_model(before) == wanted


def test_without_an_architecture_it_loads_but_does_not_run(models, tmp_path):
    found = load(saved(models, tmp_path))
    assert set(found.change.tensors) == CHANGED
    with pytest.raises(ModelError, match="loaded without a model"):
        found.runnable()


def test_altered_tensors_are_refused(models, tmp_path):
    folder = saved(models, tmp_path)
    path = folder / "change.safetensors"
    tensors = load_file(path)
    tensors["scale"] = tensors["scale"] + 1e-6
    save_file(tensors, path)
    with pytest.raises(StoreError, match="not what its record describes"):
        load(folder, model=models[0])
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[:-3])
    with pytest.raises(StoreError, match="no saved outcome"):
        load(folder)


def test_the_wrong_original_is_refused(models, tmp_path):
    folder = saved(models, tmp_path)
    with pytest.raises(ModelError, match="not the original"):
        load(folder, model=Mixed())
    with pytest.raises(ModelError, match="not the original"):
        load(folder, model=models[1])


@pytest.mark.parametrize(
    "record", ["", "[]", "null", "{}", '{"change": null}', '{"change": {"kind": "pickle"}}', "\xff"]
)
def test_a_record_that_is_none_is_refused(models, tmp_path, record):
    folder = saved(models, tmp_path)
    (folder / "record.json").write_bytes(record.encode("latin-1"))
    with pytest.raises(StoreError, match="no saved outcome"):
        load(folder)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no saved outcome"):
        load(tmp_path / "nothing")


def test_an_outcome_without_a_change_cannot_be_saved(tmp_path):
    with pytest.raises(ExpungeError, match="no change to save"):
        Outcome(nn.Linear(1, 1)).save(tmp_path)


def test_records_are_json_that_people_can_read(models, tmp_path):
    record = json.loads((saved(models, tmp_path) / "record.json").read_text())
    assert record["change"]["kind"] == "weights"
    assert record["cost"]["samples"] == 10


# ------------------------------------------------------------------ released


def outcome_of(before, after, change=None):
    problem = Classification(before, (torch.zeros(4, 4), [0, 1, 2, 0]))
    return Outcome(after, change or Weights.between(before, after), problem=problem)


def test_the_released_model_is_rebuilt_from_the_change(models):
    before, after = models
    released = outcome_of(before, after).released()
    assert released is not after
    assert hash_model(released) == hash_model(after)
    empty = outcome_of(before, copy.deepcopy(before))
    assert hash_model(empty.released()) == hash_model(before)


def test_a_change_that_does_not_give_the_model_is_not_released(models):
    before, after = models
    half = Weights({"scale": after.scale.detach().clone()})
    with pytest.raises(ExpungeError, match="does not rebuild"):
        outcome_of(before, after, half).released()

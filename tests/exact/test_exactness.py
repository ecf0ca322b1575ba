"""Sharded training: what a stage depends on, held against trainings on other data."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharded_world import Blocky, problem_of, small_data, train
from torch import nn

import expunge as xp
from expunge.exact import adapters, stages, trainer
from expunge.exact.chains import prefixes
from expunge.exact.manifest import digests_of
from expunge.exact.manifest import stages as stages_of
from expunge.exact.settings import Settings


def garbage(data, ids):
    """The data with other inputs and labels at some ids."""
    batch = data.fetch(data.ids)
    chosen = torch.isin(data.ids, torch.tensor(ids))
    x, y = batch.x.clone(), batch.y.clone()
    x[chosen] = 10 * torch.randn(int(chosen.sum()), *x.shape[1:])
    y[chosen] = (y[chosen] + 1) % 3
    return xp.Data((x, y), ids=data.ids)


def slices_of(sharded):
    index = sharded._now.index
    return lambda s, j: index.ids[(index.shard == s) & (index.piece == j)].tolist()


def check_garbage(first, second, shard, piece):
    """Stages that never saw the slice have the same bits, all others do not."""
    old, new = digests_of(first.manifest), digests_of(second.manifest)
    assert old.keys() == new.keys()
    for (s, prefix), digest in old.items():
        saw = s == shard and piece in prefix
        assert (new[s, prefix] != digest) == saw, (s, prefix)
    for digest in set(old.values()) & set(new.values()):  # the hashes are those of the files
        a, b = first._folder.get(digest), second._folder.get(digest)
        assert all(torch.equal(a[n], b[n]) for n in a)


@st.composite
def plans(draw):
    slices = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["cyclic", "matching"]))
    most = {1: 1, 2: 2, 3: 6, 4: 6}[slices] if kind == "cyclic" else slices
    orders = draw(st.integers(1, most))
    shards = draw(st.integers(1, 2))
    prior = None
    if kind == "matching":
        parts = draw(st.lists(st.integers(1, 9), min_size=slices, max_size=slices))
        prior = tuple(p / sum(parts) for p in parts)
    return {
        "shards": shards, "slices": slices, "orders": orders, "sequences": kind, "prior": prior,
        "adapter": draw(st.sampled_from(["lora(1)", "lora(2)", "whole"])),
        "data": draw(st.sampled_from(["cumulative", "own"])),
        "blocks": draw(st.sampled_from(["top-down", "all"])),
        "seed": draw(st.integers(0, 3)),
    }, draw(st.integers(0, shards - 1)), draw(st.integers(0, slices - 1))  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(plans())
def test_s3t_invariant_1_garbage_in_a_slice_changes_no_bit_of_what_never_saw_it(drawn):
    how, shard, piece = drawn
    data = small_data(24)
    with tempfile.TemporaryDirectory() as at:
        first = train(Path(at) / "a", problem_of(data), **how)
        other = problem_of(garbage(data, slices_of(first)(shard, piece)))
        check_garbage(first, train(Path(at) / "b", other, **how), shard, piece)


def test_s3t_invariant_1_stages_before_the_slice_are_the_same_and_those_from_it_on_differ(tmp_path):
    how = {"shards": 1, "slices": 4, "orders": 1}
    first = train(tmp_path / "a", **how)
    other = problem_of(garbage(small_data(), slices_of(first)(0, 2)))
    second = train(tmp_path / "b", other, **how)
    old, new = digests_of(first.manifest), digests_of(second.manifest)
    whole = (0, 1, 2, 3)
    assert [old[0, whole[:k]] == new[0, whole[:k]] for k in (1, 2, 3, 4)] == [True, True, False, False]  # fmt: skip
    # and with the first slices gone from the served model, predictions are the same too
    for sharded in (first, second):
        sharded.forget(slices_of(sharded)(0, 2)[:1])
    x = small_data(9, 3).fetch(small_data(9, 3).ids).x
    assert torch.equal(first.predict(x), second.predict(x))


@pytest.mark.parametrize("adapter", sorted(adapters.ADAPTERS))
def test_s3t_invariant_1_holds_for_every_kind_of_adapter(tmp_path, adapter):
    how = {"shards": 1, "slices": 2, "orders": 2, "adapter": adapter, "blocks": "all"}
    data = small_data(24)
    first = train(tmp_path / "a", problem_of(data), **how)
    other = problem_of(garbage(data, slices_of(first)(0, 1)))
    check_garbage(first, train(tmp_path / "b", other, **how), 0, 1)
    x = data.fetch(data.ids).x
    before = first.predict(x)
    first.forget(slices_of(first)(0, 1)[:1])
    assert not torch.equal(first.predict(x), before) and first.verify() == []


class Normed(nn.Module):
    """A small convolution with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x[:, None, None].expand(-1, 1, 5, 5))))
        return self.head(self.drop(torch.relu(self.b(x)).mean((2, 3))))


@pytest.mark.parametrize("how", [{"adapter": "lora(2)"}, {"adapter": "whole", "norm": "train"}])
def test_s3t_invariant_1_holds_with_batch_norm_and_dropout(tmp_path, how):
    def problem(data):
        torch.manual_seed(1)
        return xp.Classification(Normed(), data, roles={"last layer": ["head"]})

    how |= {"shards": 1, "slices": 2, "orders": 2}
    data = small_data(24)
    first = train(tmp_path / "a", problem(data), **how)
    second = train(tmp_path / "b", problem(garbage(data, slices_of(first)(0, 1))), **how)
    check_garbage(first, second, 0, 1)
    statistics = first.module().state_dict()["members.0.norm.running_mean"]
    moved = not torch.equal(statistics, problem(data).model.norm.running_mean)
    assert moved == (how["adapter"] == "whole")  # then it is part of each stage


# --- invariant 2 ----------------------------------------------------------------------------------


def test_s3t_invariant_2_a_prefix_says_what_a_model_without_the_later_groups_says(trained):
    known, how, slots = digests_of(trained.manifest), trained.settings, trained._slots
    x = small_data(7, 5).fetch(small_data(7, 5).ids).x
    for sequence in how.chosen():
        tensors = [trained._folder.get(known[0, sequence[:k]]) for k in (1, 2, 3)]
        every = stages.assemble(trained._base, how, slots, tensors).eval()
        for k in (1, 2, 3):
            alone = stages.served(trained._base, how, slots, tensors[:k])
            adapters.activate(every, [stages.group(i) for i in range(k)])
            head = {n.removeprefix("head/"): t for n, t in tensors[k - 1].items() if "head/" in n}
            every.load_state_dict(head, strict=False)
            assert torch.equal(alone(x), every(x))
            assert not hasattr(alone.blocks[0], "slice_maps")
    plain = stages.served(trained._base, how, slots, [])
    assert torch.equal(plain(x), problem_of().model(x))


def test_what_is_served_is_what_was_trained(trained):
    """The score taken of the network in training is that of the network put together from its files."""
    known = digests_of(trained.manifest)
    for s, prefix, stage in stages_of(trained.manifest):
        tensors = [trained._folder.get(known[s, prefix[:k]]) for k in range(1, len(prefix) + 1)]
        again = stages.served(trained._base, trained.settings, trained._slots, tensors)
        assert stages.score(problem_of(), again) == stage["score"]


def test_untrained_groups_change_no_bit_and_the_first_slice_is_nearest_the_output(trained):
    modules = trained._slots.modules
    assert modules == (("blocks.3",), ("blocks.2",), ("blocks.1",))  # four blocks, three slices
    assert trained._slots.head == ("head.weight", "head.bias")
    served = trained.module().members[0]
    base = problem_of().model
    for name in ("stem.weight", "blocks.0.weight"):  # in nobody's share
        assert torch.equal(served.state_dict()[name], base.state_dict()[name])
        assert dict(served.named_parameters())[name].data_ptr() == dict(trained._base.named_parameters())[name].data_ptr()  # fmt: skip
    assert not torch.equal(served.blocks[3].weight, base.blocks[3].weight)
    heads = [
        stage["head/head.weight"] for stage in (trained._folder.get(d) for d in digests_of(trained.manifest).values())
    ]  # fmt: skip
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(heads, 2))


# --- the trie, seeds, invariant 7 -----------------------------------------------------------------


def test_chains_share_stages_whatever_their_number(tmp_path, trained):
    one = train(tmp_path / "one", shards=2, slices=3, orders=1, epochs=2)
    every = train(tmp_path / "all", shards=2, slices=3, orders=6, epochs=2)
    few, more, most = (digests_of(s.manifest) for s in (one, trained, every))
    assert len(few) == 2 * 3 and len(more) == 2 * 9 and len(most) == 2 * (3 + 6 + 6)
    assert few.items() <= more.items() <= most.items()
    assert few != digests_of(train(tmp_path / "s", shards=2, slices=3, orders=1, epochs=2, seed=1).manifest)  # fmt: skip


def test_s3t_invariant_7_nothing_but_stored_tensors_goes_from_stage_to_stage(tmp_path, trained):
    """A stage trained alone in a new process' state, from the files of its parents, has the same bits."""
    entry = trained.manifest["shards"][1]
    known = {tuple(s["prefix"]): s for s in entry["stages"]}
    prefix = (1, 2, 0)
    before = [trained._folder.get(known[prefix[:k]]["tensors"]) for k in (1, 2)]
    ids = torch.cat([torch.tensor(slices_of(trained)(1, j)) for j in prefix])
    torch.manual_seed(12345)  # of no importance
    alone, _ = stages.train_stage(
        trained._base, problem_of(), trained.settings, trained._slots, before, ids,
        known[prefix]["seed"], xp.Runtime(seed=99), "alone",
    )  # fmt: skip
    stored = trained._folder.get(known[prefix]["tensors"])
    assert all(torch.equal(alone[n], stored[n]) for n in stored) and alone.keys() == stored.keys()
    assert all(stage["carries"] == [] for stage in entry["stages"])
    assert len({s["seed"] for shard in trained.manifest["shards"] for s in shard["stages"]}) == 18


def test_an_interrupted_training_goes_on_with_what_is_missing(tmp_path, trained, monkeypatch):
    real, calls = trainer.train_stage, []

    def counted(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(args[-1])
        return real(*args)

    how = {"shards": 2, "slices": 3, "orders": 3, "epochs": 2}
    monkeypatch.setattr(trainer, "train_stage", counted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, **how)
    with pytest.raises(xp.ExpungeError, match="interrupted"):
        xp.Sharded.load(tmp_path, problem_of())
    # a file that was cut off is trained again
    noted = [json.loads(p.read_text()) for p in tmp_path.glob("records/*.json")]
    some = tmp_path / "stages" / f"{next(n['tensors'] for n in noted if 'prefix' in n)}.safetensors"
    some.write_bytes(some.read_bytes()[:-3])
    again = []
    monkeypatch.setattr(trainer, "train_stage", lambda *a: (again.append(a[-1]), real(*a))[1])
    sharded = train(tmp_path, **how)
    assert len(again) == 18 - 5 + 1
    assert digests_of(sharded.manifest) == digests_of(trained.manifest)
    assert sharded.verify() == [] and not (tmp_path / "records").exists()


def test_other_data_is_not_taken_for_what_was_trained_before(tmp_path, monkeypatch):
    real = trainer.train_stage
    how = {"shards": 1, "slices": 2, "orders": 1}
    monkeypatch.setattr(trainer, "train_stage", lambda *a: _stop_at_second(real, a))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", **how)
    monkeypatch.setattr(trainer, "train_stage", real)
    data = garbage(small_data(), small_data().ids.tolist())
    found = train(tmp_path / "a", problem_of(data), **how)
    assert digests_of(found.manifest) == digests_of(train(tmp_path / "b", problem_of(data), **how).manifest)  # fmt: skip


def _stop_at_second(real, args):
    if len(args[4]):
        raise KeyboardInterrupt
    return real(*args)


def test_sisa_is_one_order_of_whole_models(tmp_path):
    how = {"shards": 2, "slices": 2, "orders": 1, "adapter": "whole", "start": "fresh"}
    sharded = train(tmp_path, problem_of(model=Blocky()), **how)
    assert sharded._slots.modules == () and len(digests_of(sharded.manifest)) == 4
    before = {n: p.clone() for n, p in sharded.module().members[0].named_parameters()}
    base = dict(sharded._base.named_parameters())
    assert all(not torch.equal(before[n], base[n]) for n in base)
    # what it started from lies in the folder, so any network of the architecture will do
    again = xp.Sharded.load(tmp_path, Blocky())
    x = small_data(5, 2).fetch(small_data(5, 2).ids).x
    assert torch.equal(again.predict(x), sharded.predict(x))


def test_sequences_of_settings_are_those_of_the_manifest():
    how = Settings(slices=3, orders=2, sequences="matching", prior=(0.6, 0.3, 0.1))
    assert len(prefixes(how.chosen())) == 6 and how.chosen()[-1][0] != 0


class Twice(nn.Module):
    """The same layer at two places of a list, a weight of its own, and a head that lends its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.first.weight = self.head.weight
        layer = nn.Linear(8, 8)
        self.layers = nn.ModuleList([layer, layer])
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = torch.relu(self.first(nn.functional.pad(x, (0, 3)))) * self.scale
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x)[:, :3]


@pytest.mark.parametrize("adapter", ["lora(2)", "sparse(0.5)"])
def test_what_is_served_is_what_was_trained_where_modules_and_weights_have_two_names(tmp_path, adapter):  # fmt: skip
    torch.manual_seed(0)
    problem = xp.Classification(
        Twice(), small_data(), valid=small_data(40, 1, 0), roles={"last layer": ["head"]}
    )
    layers = ("layers.0",) if adapter == "lora(2)" else ()
    how = {"shards": 1, "slices": 2, "orders": 1, "blocks": "all", "layers": layers}
    sharded = train(tmp_path, problem, adapter=adapter, **how)
    known = digests_of(sharded.manifest)
    for s, prefix, stage in stages_of(sharded.manifest):
        tensors = [sharded._folder.get(known[s, prefix[:k]]) for k in range(1, len(prefix) + 1)]
        again = stages.served(sharded._base, sharded.settings, sharded._slots, tensors)
        assert stages.score(problem, again) == stage["score"]
        assert again.layers[0] is again.layers[1]
        # a map on one of two modules that share a weight unties them, in training as afterwards
        assert (again.first.weight is again.head.weight) == (adapter == "lora(2)")
        assert not torch.equal(again.head.weight, sharded._base.head.weight)

"""Amnesiac unlearning by stored updates: the formula of the card baselines-vision, and its log."""

from __future__ import annotations

import contextlib
import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import expunge as xp
from expunge.core.errors import DataError, ExpungeError, ModelError, NeedsError, StoreError
from expunge.core.hashing import hash_model
from expunge.methods.general.amnesiac_updates import AmnesiacUpdates
from expunge.suite.bench import Bench
from expunge.train import updates
from expunge.train.updates import UpdateLog, UpdateRecorder

ONE_THREAD = xp.Runtime(threads=1)
HALF_ULP = 2.0**-24  # of float32, relative


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


@functools.cache
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=generator)
    return xp.Data((x, x[:, :3].argmax(1)), ids=range(100, 160))


def recipe(**more):
    settings = {"epochs": 3, "batch_size": 8, "lr": 0.05} | more
    return xp.ClassifierRecipe(network, data(), **settings)


def trained(ids=None, seed=0, folder=None, sensitive=None, storage="float32", **more):
    """A model, the log of its training, and the weights before each step with the batch's ids."""
    recorder = UpdateRecorder(folder, sensitive=sensitive, storage=storage)
    seen = []

    @contextlib.contextmanager
    def around(model, batch):
        seen.append((batch.ids, copy.deepcopy(dict(model.named_parameters()))))
        with recorder.step(model, batch.ids):
            yield

    ids = data().ids if ids is None else ids
    model, _ = recipe(**more).train(ids, seed, around=around)
    return model, recorder.finish(model), seen


def problem(model, **more):
    return xp.Classification(model, data(), recipe=recipe(**more))


def run(of, request, method, **options):
    return xp.unlearn(of, request, method, runtime=ONE_THREAD, **options)


def weights(model):
    return {n: p.detach() for n, p in model.named_parameters()}


# ------------------------------------------------------------------ invariants of the formula


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_all_updates_and_the_initial_weights_add_up_to_the_final_ones(storage):
    model, log, seen = trained(storage=storage)
    assert len(log) == log.steps == len(seen) == 3 * 8
    start, end = seen[0][1], weights(model)
    near = 1e-6 if storage == "float32" else 1e-3
    for name, total in log.total(data().ids):
        assert not torch.equal(start[name], end[name])
        torch.testing.assert_close(start[name].double() + total, end[name].double(), rtol=0, atol=near)  # fmt: skip


def test_a_whole_class_touches_every_batch_and_leaves_the_initialisation(digits):
    outcome = run(digits, xp.forget(label=3), AmnesiacUpdates(epochs=0))
    assert outcome.details["steps_taken_back"] == outcome.details["steps_trained"] == 20 * 19
    start = digits.recipe.initial(0)
    for name, value in weights(outcome.model).items():
        torch.testing.assert_close(value, dict(start.named_parameters())[name], rtol=0, atol=1e-6)


def test_a_sample_of_the_last_batch_alone_gives_the_model_before_that_step():
    """To the half ulp that an update in float32 may be off."""
    model, log, seen = trained(epochs=1)
    last, before = seen[-1]
    request = xp.forget(ids=last[:2].tolist())
    for method in (AmnesiacUpdates(epochs=0), AmnesiacUpdates(epochs=0, seed=0)):
        outcome = run(problem(model, epochs=1), request, method)
        assert outcome.details["steps_taken_back"] == 1
        for name, value in weights(outcome.model).items():
            away = (value.double() - before[name].double()).abs()
            bound = HALF_ULP * ((model.get_parameter(name) - before[name]).abs() + before[name].abs())  # fmt: skip
            assert bool((away <= bound).all())
            assert value.eq(before[name]).float().mean() > 0.9
    assert log.touching(last).tolist() == [len(seen) - 1]


def test_only_batches_with_forget_samples_are_taken_back_and_each_once():
    model, log, seen = trained()
    ids = torch.tensor([103, 117, 118])
    touching = [k for k, (batch, _) in enumerate(seen) if set(batch.tolist()) & set(ids.tolist())]
    assert log.touching(ids).tolist() == touching and 3 <= len(touching) < len(seen)
    ends = [before for _, before in seen[1:]] + [weights(model)]
    for name, total in log.total(ids):
        wanted = sum(ends[k][name].double() - seen[k][1][name].double() for k in touching)
        torch.testing.assert_close(total, wanted, rtol=0, atol=1e-6)


def test_ids_never_seen_leave_the_weights_unchanged(tmp_path):
    kept, unseen = data().ids[:50], data().ids[50:]
    model, log, _ = trained(kept, folder=tmp_path)
    assert all(not total.any() for _, total in log.total(unseen))
    of = xp.Classification(model, data())
    outcome = run(of, xp.forget(ids=unseen.tolist()), AmnesiacUpdates(log=str(tmp_path)))
    assert outcome.details["unchanged"] and outcome.details["steps_taken_back"] == 0
    assert outcome.record["weights"] == of.model_hash()
    seen = run(of, xp.forget(ids=[100]), AmnesiacUpdates(log=str(tmp_path)))
    assert seen.record["weights"] != of.model_hash()


def test_a_log_of_another_training_is_refused(tmp_path, digits):
    model, _, _ = trained(seed=0)
    trained(seed=1, folder=tmp_path)
    request, log = xp.forget(ids=[100, 101]), str(tmp_path)
    with pytest.raises(ModelError, match="is of another training") as found:
        run(problem(model), request, AmnesiacUpdates(log=log))
    assert "\n" not in str(found.value)
    with pytest.raises(ModelError, match="another training"):
        xp.prepare(problem(model), AmnesiacUpdates(log=log))
    for others in (digits.model, nn.Sequential(nn.Linear(6, 3))):
        assert UpdateLog.open(log).distance(others) == float("inf")
    # the recipe run again must end at the original, too
    with pytest.raises(ModelError, match=r"recipe with seed 1 .* ends elsewhere.*seed="):
        run(problem(model), request, AmnesiacUpdates(seed=1))
    with pytest.raises(ModelError, match="ends elsewhere"):
        run(problem(model, lr=0.051), request, AmnesiacUpdates())


def test_the_seed_is_that_of_the_workload_unless_it_is_given(tmp_path):
    model, _, _ = trained(seed=5)
    request = xp.forget(ids=[100])
    with pytest.raises(ModelError, match="seed 0"):
        run(problem(model), request, AmnesiacUpdates())
    known = xp.Classification(model, data(), recipe=recipe(), source={"seed": 5})
    given = run(problem(model), request, AmnesiacUpdates(seed=5))
    assert run(known, request, AmnesiacUpdates()).record["weights"] == given.record["weights"]
    # the runtime's seed is that of the repair, never that of the training
    other = xp.unlearn(known, request, AmnesiacUpdates(epochs=0), runtime=xp.Runtime(seed=9))
    plain = run(known, request, AmnesiacUpdates(epochs=0))
    assert other.record["weights"] == plain.record["weights"]


def test_a_stated_tolerance_lets_a_training_end_near_the_original():
    model, _, _ = trained()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-4
    request = xp.forget(ids=[100])
    with pytest.raises(ModelError, match=r"differs by 0\.0001"):
        run(problem(model), request, AmnesiacUpdates())
    assert run(problem(model), request, AmnesiacUpdates(tolerance=2e-4)).record["forgotten"] == 1


def test_recording_changes_neither_the_training_nor_the_original(digits):
    before = hash_model(digits.model)
    model, _, _ = trained(seed=3)
    assert hash_model(model) == hash_model(recipe()(data().ids, 3))
    run(digits, xp.forget(ids=digits.train.ids[:3].tolist()), AmnesiacUpdates(epochs=1))
    assert hash_model(digits.model) == before


# ------------------------------------------------------------------ the log


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_only_batches_with_sensitive_samples_are_stored(storage, tmp_path):
    sensitive = torch.tensor([103, 117])
    _, whole, seen = trained()
    _, log, _ = trained(sensitive=sensitive, storage=storage, folder=tmp_path)
    touching = [batch for batch, _ in seen if bool(torch.isin(batch, sensitive).any())]
    assert len(log) == len(touching) < len(seen) == log.steps
    assert set(log.index["members"].tolist()) == {103, 117}  # nothing on who else was there
    size = sum(p.numel() for p in network().parameters()) * (4 if storage == "float32" else 2)
    stored = sum(f.stat().st_size for f in tmp_path.glob("updates-*"))
    assert size * len(log) <= stored < size * len(log) + 5000
    near = 1e-12 if storage == "float32" else 1e-3
    for (name, some), (_, all_) in zip(log.total(sensitive), whole.total(sensitive), strict=True):
        torch.testing.assert_close(some, all_, rtol=0, atol=near, msg=name)
    with pytest.raises(DataError, match="104 is not among them"):
        log.touching(torch.tensor([103, 104]))


def test_a_request_beyond_the_sensitive_samples_is_refused_before_any_work(tmp_path):
    model, _, _ = trained(sensitive=torch.tensor([103]), folder=tmp_path)
    method = AmnesiacUpdates(log=str(tmp_path), epochs=0)
    of = problem(model)
    with pytest.raises(DataError, match="not among them"):
        method.check(of, xp.forget(ids=[103, 104]))
    assert run(of, xp.forget(ids=[103]), method).details["steps_taken_back"] == 3


def test_on_disk_and_in_memory_and_in_many_files_are_the_same(tmp_path, monkeypatch):
    ids = data().ids[::7]
    wanted = dict(trained()[1].total(ids))
    again = UpdateLog.of(trained()[1].tensors())
    assert all(torch.equal(t, wanted[n]) for n, t in again.total(ids))
    monkeypatch.setattr(updates, "CHUNK", 5000)
    trained(folder=tmp_path / "log")
    log = UpdateLog.open(tmp_path / "log")
    assert len(log.shards) > 3 and all(shard.is_file() for shard in log.shards)
    assert all(torch.equal(t, wanted[n]) for n, t in log.total(ids))
    assert all(torch.equal(t, wanted[n]) for n, t in UpdateLog.of(log.tensors()).total(ids))


def test_half_precision_keeps_updates_below_its_smallest_number():
    model = nn.Linear(3, 2)
    totals = []
    for storage in ("float32", "float16"):
        other, recorder = copy.deepcopy(model), UpdateRecorder(storage=storage)
        with torch.no_grad(), recorder.step(other, torch.tensor([1])):
            other.weight.zero_().add_(1e-9)
        with torch.no_grad(), recorder.step(other, torch.tensor([2])):
            other.weight.mul_(-1)
        totals.append(dict(recorder.finish(other).total(torch.tensor([2])))["weight"])
    assert totals[0].abs().min() > 1e-9
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-3, atol=0)


def test_weights_that_move_only_later_are_recorded_from_then_on():
    model, recorder = network(), UpdateRecorder()
    model[0].requires_grad_(False)
    start = copy.deepcopy(weights(model))
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
        with torch.no_grad(), recorder.step(model, torch.tensor([step])):
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(1.0)
    log = recorder.finish(model)
    assert len(log.shards) == 2
    for name, total in log.total(torch.arange(4)):
        assert torch.allclose(start[name] + total, weights(model)[name].double())
        steps = 2.0 if name.startswith("0.") else 4.0
        assert torch.allclose(total, torch.full_like(total, steps), rtol=0, atol=1e-5)
    assert all(not total.any() for n, total in log.total(torch.tensor([1])) if n.startswith("0."))


def test_logs_that_are_broken_or_taken_say_so(tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="no finished log"):
        UpdateLog.open(tmp_path / "nothing")
    monkeypatch.setattr(updates, "CHUNK", 5000)
    model, _, _ = trained(folder=tmp_path)
    with pytest.raises(StoreError, match="another folder"):
        UpdateRecorder(tmp_path)
    (tmp_path / "updates-00001.safetensors").unlink()
    with pytest.raises(StoreError, match="lacks some files"):
        UpdateLog.open(tmp_path)
    (tmp_path / "updates-00000.safetensors").write_bytes(b"12345678")
    with pytest.raises(StoreError, match="no finished log") as found:
        run(problem(model), xp.forget(ids=[100]), AmnesiacUpdates(log=str(tmp_path)))
    assert "\n" not in str(found.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        UpdateRecorder(tmp_path / "file" / "log")


def test_an_update_that_is_not_finite_is_refused():
    model, recorder = nn.Linear(3, 2), UpdateRecorder()
    with (
        pytest.raises(ExpungeError, match="step 1 is not finite"),
        torch.no_grad(),
        recorder.step(model, torch.tensor([1])),
    ):
        model.weight.fill_(float("nan"))


def test_a_step_that_fails_is_not_recorded():
    model, recorder = nn.Linear(3, 2), UpdateRecorder()
    with pytest.raises(ValueError, match="lost"), recorder.step(model, torch.tensor([1])):
        raise ValueError("lost")
    log = recorder.finish(model)
    assert len(log) == log.steps == 0
    assert all(not total.any() for _, total in log.total(torch.tensor([1])))


# ------------------------------------------------------------------ the method around it


def test_a_training_loop_of_ones_own(tmp_path):
    """No recipe, an optimiser with momentum and decay, ids from the loader."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    recorder = UpdateRecorder(tmp_path / "updates")
    for epoch in range(4):
        for batch in data().batches(20, shuffle=torch.Generator().manual_seed(epoch)):
            with recorder.step(model, batch.ids):
                nn.functional.cross_entropy(model(batch.x), batch.y).backward()
                optimizer.step()
                optimizer.zero_grad()
    recorder.finish(model)
    of = xp.Classification(model, data())
    method = AmnesiacUpdates(log=str(tmp_path / "updates"), epochs=2, lr=0.01)
    assert not method.needs.recipe
    outcome = run(of, xp.forget(ids=[100]), method)
    assert outcome.details["steps_taken_back"] == 4 and outcome.details["steps_trained"] == 12
    assert len(outcome.curve) == 1 and outcome.cost.gradients == 2 * 59
    assert outcome.details["preparation"]["samples"] == 0


def test_without_a_log_the_training_must_be_one_that_can_be_watched():
    model, _, _ = trained()
    of = xp.Classification(model, data(), recipe=lambda keep_ids, seed: model)
    with pytest.raises(NeedsError, match="log="):
        run(of, xp.forget(ids=[100]), AmnesiacUpdates())
    with pytest.raises(NeedsError, match="log="):
        xp.prepare(of, AmnesiacUpdates())


def test_running_statistics_are_not_taken_back_but_by_the_repair():
    model, _, _ = trained()
    of, request = problem(model), xp.forget(ids=[100, 101])
    made = {
        (epochs, norm): run(of, request, AmnesiacUpdates(epochs=epochs, norm=norm)).model[1]
        for epochs in (0, 2)
        for norm in ("train", "frozen", "recalibrate")
    }
    stay = {key for key, layer in made.items() if torch.equal(layer.running_mean, of.model[1].running_mean)}  # fmt: skip
    assert stay == {(0, "train"), (0, "frozen"), (2, "frozen")}


@pytest.mark.parametrize("train", ["last(1)", "saliency(0.3)"])
def test_weights_outside_train_keep_every_bit(train):
    model, log, _ = trained()
    of, request = problem(model), xp.forget(ids=[100, 101])
    outcome = run(of, request, AmnesiacUpdates(train=train, epochs=2, norm="frozen"))
    moved = sum(int((a != b).sum()) for a, b in zip(outcome.model.parameters(), of.model.parameters(), strict=True))  # fmt: skip
    share = outcome.details["trained_share"]
    assert 0 < moved <= round(share * sum(p.numel() for p in model.parameters()))
    bare = run(of, request, AmnesiacUpdates(train="last(1)", epochs=0)).model
    taken = dict(log.total(torch.tensor([100, 101])))
    torch.testing.assert_close(bare[3].bias.double(), model[3].bias.double() - taken["3.bias"])
    assert torch.equal(bare[0].weight, of.model[0].weight)


def test_it_reads_what_its_settings_make_it_read():
    words = [
        (AmnesiacUpdates(), ["forget data", "retain data", "retain labels", "recipe"]),
        (AmnesiacUpdates(epochs=0), ["forget data", "recipe"]),
        (AmnesiacUpdates(epochs=0, norm="recalibrate", log="x"), ["forget data", "retain data"]),
        (AmnesiacUpdates(epochs=0, train="saliency(0.5)", log="x"), ["forget data", "forget labels"]),
        (AmnesiacUpdates(train="saliency(0.5)", log="x"), ["forget data", "retain data", "labels"]),
    ]  # fmt: skip
    assert all(method.needs.words() == wanted for method, wanted in words)
    model, _, _ = trained()
    of, request = problem(model), xp.forget(ids=[100, 101])
    assert run(of, request, AmnesiacUpdates(epochs=0)).cost.samples == 0
    assert run(of, request, AmnesiacUpdates(epochs=2)).cost.samples == 2 * 58


def test_the_repair_follows_its_schedule():
    model, _, _ = trained()
    of, request = problem(model), xp.forget(ids=[100, 101])
    ends = [
        run(of, request, AmnesiacUpdates(epochs=2, schedule=schedule, batch_size=8))
        for schedule in ("constant", "cosine")
    ]
    assert ends[0].curve[0] == ends[1].curve[0]
    assert ends[0].curve[-1]["lr"] == 0.05 and ends[1].curve[-1]["lr"] == pytest.approx(0.025)


def test_one_preparation_serves_all_requests_and_is_kept_in_the_store(tmp_path):
    jobs = []
    bench = Bench(xp.Store.open(tmp_path / "store"), ONE_THREAD, lambda *job: jobs.append(job))
    of = bench.workload("digits-class")
    some = of.train.ids[:10].tolist()
    for request, method in (
        (xp.forget(label=3), AmnesiacUpdates(epochs=1)),
        (xp.forget(ids=some), AmnesiacUpdates(epochs=1, lr=0.1)),
    ):
        bench.unlearn(of, request, method, 0)
    assert [job[2] for job in jobs if "prepares" in job[0]] == [False, True]
    recorder = UpdateRecorder(tmp_path / "log", sensitive=torch.tensor(some))
    of.recipe.train(of.train.ids, 0, around=lambda m, b: recorder.step(m, b.ids))
    with pytest.raises(StoreError, match="no finished log"):
        AmnesiacUpdates(log=str(tmp_path / "log")).check(of, xp.forget(ids=some))
    recorder.finish(of.model)
    logged = AmnesiacUpdates(epochs=1, lr=0.1, log=str(tmp_path / "log"))
    first, _ = bench.unlearn(of, xp.forget(ids=some), logged, 0)
    again, _ = bench.unlearn(of, xp.forget(ids=some), replace(logged, log=None), 0)
    assert first.record["weights"] == again.record["weights"]


def test_a_result_is_not_the_end_of_the_log_so_requests_are_joined(tmp_path):
    model, log, _ = trained(folder=tmp_path)
    method = AmnesiacUpdates(log=str(tmp_path), epochs=0)
    first = run(problem(model), xp.forget(ids=[100]), method).model
    with pytest.raises(ModelError, match="another training"):
        run(problem(first), xp.forget(ids=[101]), method)
    both = run(problem(model), xp.forget(ids=[100, 101]), method).details["steps_taken_back"]
    single = [len(log.touching(torch.tensor([i]))) for i in (100, 101)]
    assert max(single) <= both <= sum(single)

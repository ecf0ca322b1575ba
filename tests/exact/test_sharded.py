"""Sharded: deletion, retraining, what is on disk, and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sharded_world import Blocky, of, problem_of, small_data, train

import expunge as xp
from expunge.core.errors import ModelError, NeedsError, RequestError, SettingError, StoreError
from expunge.exact import folder as folders
from expunge.exact import trainer
from expunge.exact.manifest import digests_of
from expunge.exact.verify import verify_folder

X = small_data(11, 9).fetch(small_data(11, 9).ids).x


# --- deletion ------------------------------------------------------------------------------------


def test_deleting_serves_what_never_saw_the_sample(sharded):
    before, hash_before = sharded.predict(X), sharded.weights_hash()
    victim = of(sharded, 0, 1)[0]
    planned = sharded.plan(victim)
    assert torch.equal(sharded.predict(X), before)  # planning changes nothing
    done = sharded.forget(xp.forget(ids=[victim]))
    assert done.plan == planned and done.changed and done.seconds > 0
    assert done.weights_before == hash_before != done.weights_after == sharded.weights_hash()
    served = sharded.status().served
    assert 1 not in served[0] and len(served[0]) == 2 and len(served[1]) == 3
    known = digests_of(sharded.manifest)
    for (s, prefix), digest in known.items():
        gone = s == 0 and 1 in prefix
        assert sharded._folder.file(digest).exists() != gone
    assert sharded.verify() == [] and not torch.equal(sharded.predict(X), before)
    assert planned.collateral == 7 and planned.seconds == 0 and planned.ids == (victim,)
    assert json.dumps(done.to_dict()) and json.dumps(sharded.status().to_dict())


def test_s3t_invariant_3_other_shards_are_untouched(sharded):
    members = sharded._ensemble().members
    sharded.forget(of(sharded, 0, 0)[0])
    after = sharded._ensemble().members
    assert after[1] is members[1] and after[0] is not members[0]
    assert all(torch.equal(a, b) for a, b in zip(members[1].parameters(), after[1].parameters(), strict=True))  # fmt: skip


def test_s3t_invariant_4_the_same_twice_changes_nothing(sharded):
    ids = of(sharded, 1, 2)
    first = sharded.forget(ids[0])
    raw = (sharded.folder / "live.json").read_bytes()
    again = sharded.forget(ids[0])
    assert not again.changed and again.plan.already == (ids[0],) and again.plan.ids == ()
    assert again.weights_before == again.weights_after == first.weights_after
    assert (sharded.folder / "live.json").read_bytes() == raw
    other = sharded.forget(ids[1])  # the slice is dead already: deleted, and nothing to switch off
    assert other.changed and other.plan.off == {} and other.weights_after == first.weights_after
    assert sharded.status().deleted == 2


def test_what_is_not_there_is_told_apart(sharded):
    gone, more = of(sharded, 0, 0)[:2]
    sharded.forget(gone)
    sharded._problem = SimpleNamespace(train=small_data(60))  # the data has grown
    found = sharded.plan([gone, more, 150, 999, "nobody", more, str(10**40), "999"])
    assert (found.ids, found.already, found.outside) == ((more,), (gone,), (150,))
    assert found.unknown == ("nobody", str(10**40), 999)
    nothing = sharded.forget([999])
    assert not nothing.changed and nothing.plan.unknown == (999,)
    for bad in ([], [1.5], [True], torch.tensor([True, False]), torch.tensor([0.5])):
        with pytest.raises(RequestError):
            sharded.plan(bad)


def test_requests_by_label_name_and_condition(tmp_path):
    plain = small_data()
    batch = plain.fetch(plain.ids)
    data = xp.Data((batch.x, batch.y), ids=plain.ids, names=[f"p{i}" for i in range(48)])
    sharded = train(tmp_path, problem_of(data), shards=1, slices=2, orders=2)
    wanted = data.ids[batch.y == 2].tolist()
    assert sharded.plan(xp.forget(label=2)).ids == tuple(wanted)
    assert sharded.plan(xp.forget(where="id < 103")).ids == (100, 101, 102)
    assert sharded.plan(["p1", "p3"]).ids == (101, 103) == sharded.plan(xp.forget(ids=["p1", 103])).ids  # fmt: skip
    with pytest.raises(RequestError, match="all 48"):
        sharded.plan(xp.forget(where="id > 0"))
    alone = xp.Sharded.load(tmp_path, problem_of().model)
    with pytest.raises(NeedsError, match="load the model with its problem"):
        alone.plan(xp.forget(label=2))
    assert alone.plan([101]).ids == (101,) and alone.plan(["p1"]).unknown == ("p1",)


def test_a_name_of_digits_is_not_taken_for_the_id_of_another_sample(tmp_path):
    plain = small_data()
    batch = plain.fetch(plain.ids)
    data = xp.Data((batch.x, batch.y), ids=plain.ids, names=[str(147 - i) for i in range(48)])
    sharded = train(tmp_path, problem_of(data), shards=1, slices=2, orders=1)
    assert sharded.plan(["100"]).ids == (147,) and sharded.plan([100]).ids == (100,)
    alone = xp.Sharded.load(tmp_path, problem_of().model)
    with pytest.raises(NeedsError, match="give ids as numbers"):
        alone.plan(["100"])
    assert alone.plan([100]).ids == (100,)


def test_all_the_data_stops_the_service_and_says_so(sharded):
    done = sharded.forget(sharded._now.index.ids)
    assert done.plan.stops and done.plan.dies == (0, 1) and done.plan.remaining == 0
    assert done.plan.seconds > 0 and sharded.status().dead == (0, 1)
    with pytest.raises(xp.ExpungeError, match="retrain"):
        sharded.predict(X)
    with pytest.raises(xp.UserError, match="0 samples left"):
        sharded.retrain()


def test_a_dead_shard_leaves_the_ensemble(sharded):
    alone = sharded.module().members[1](X)
    for j in range(3):
        done = sharded.forget(of(sharded, 0, j)[0])
    assert done.plan.dies == (0,) and sharded.status().served[0] is None
    assert torch.equal(sharded.predict(X), alone.detach())
    assert len(sharded.module().members) == 1


def test_predictions_under_way_finish_on_the_old_weights(sharded):
    old = sharded.module()
    wanted = old(X)
    sharded.forget(of(sharded, 0, 0)[0])
    assert torch.equal(old(X), wanted) and not torch.equal(sharded.module()(X), wanted)


def test_what_is_done_to_a_module_is_not_done_to_the_model(sharded):
    wanted, first, other = sharded.predict(X), sharded.module(), sharded.module()
    first.half()
    assert torch.equal(sharded.predict(X), wanted) and torch.equal(other(X), wanted)
    assert sharded.verify() == [] and first(X.half()).dtype == torch.half
    used, base = sharded._ensemble().members[0].stem.weight, sharded._base.stem.weight
    assert other.members[0].stem.weight.data_ptr() == used.data_ptr() == base.data_ptr()  # no copy


def test_mean_of_logits_or_of_probabilities(sharded, tmp_path):
    members = sharded.module().members
    assert torch.allclose(sharded.predict(X), torch.stack([m(X) for m in members]).mean(0))
    other = train(tmp_path / "p", shards=2, slices=2, orders=1, aggregate="probabilities")
    members = other.module().members
    wanted = torch.stack([m(X).softmax(-1) for m in members]).mean(0)
    assert torch.allclose(other.predict(X).exp(), wanted, atol=1e-6)
    assert torch.allclose(other.predict(X, batch_size=2), other.predict(X), atol=1e-6)
    data = small_data(11, 9)
    problem = xp.Classification(other.module(), small_data(), data)  # an ordinary model to audits
    assert problem.logits(problem.model, data.fetch(data.ids)).shape == (11, 3)


# --- retraining ----------------------------------------------------------------------------------


def kill(sharded, shard):
    gone = [of(sharded, shard, j)[0] for j in range(3)]
    sharded.forget(gone)
    return gone


def test_retraining_uses_undeleted_samples_only(sharded, monkeypatch):
    gone, seen = kill(sharded, 0), []
    real = trainer.train_stage
    monkeypatch.setattr(
        trainer, "train_stage", lambda *a: (seen.append(a[5].tolist()), real(*a))[1]
    )
    old = sharded.manifest
    keep = sharded.weights_hash()
    status = sharded.retrain()
    used = {i for ids in seen for i in ids}
    index = sharded._now.index
    assert used == set(index.ids[index.shard == 0].tolist()) - set(gone) and len(seen) == 9
    assert status.served[0] is not None and status.collateral == 0 and status.weights != keep
    new = sharded.manifest
    assert new["previous"] is not None and new["shards"][0]["generation"] == 1
    assert new["shards"][1] == old["shards"][1]
    assert sharded.verify() == []
    assert {p.stem for p in sharded._folder.stages.glob("*")} == {*digests_of(new).values(), new["index"]["tensors"]}  # fmt: skip
    # what was deleted before stays deleted, and stays known
    found = sharded.forget(gone)
    assert not found.changed and found.plan.already == tuple(sorted(gone))
    assert sharded.forget(next(iter(used))).changed


def test_keeping_slices_trains_only_what_is_dead(sharded, monkeypatch):
    calls = []
    real = trainer.train_stage
    monkeypatch.setattr(trainer, "train_stage", lambda *a: (calls.append(a[5]), real(*a))[1])
    victim = of(sharded, 1, 2)[0]
    whole = sharded.status().served[1]
    off = sharded.forget(victim).plan.off[1]
    sharded.retrain([1], keep_slices=True)
    assert len(calls) == len(off) and all(victim not in ids.tolist() for ids in calls)
    assert len(sharded.status().served[1]) == len(whole) == 3
    assert sharded.verify() == [] and sharded.manifest["shards"][1]["generation"] == 0


def test_what_is_deleted_during_a_retraining_is_deleted_in_it(sharded, monkeypatch):
    kill(sharded, 0)
    other = xp.Sharded.load(sharded.folder, problem_of().model)
    late = of(other, 0, 0)[0]
    real = trainer.train_stage
    monkeypatch.setattr(trainer, "train_stage", lambda *a: (other.forget(late), real(*a))[1])
    sharded.retrain()
    shard, piece = (int(v[sharded._now.index.ids == late][0]) for v in (sharded._now.index.shard, sharded._now.index.piece))  # fmt: skip
    assert (shard, piece in sharded._now.state[0].dead) == (0, True)
    assert piece not in (sharded.status().served[0] or ()) and sharded.verify() == []


def test_one_training_at_a_time(sharded, monkeypatch):
    kill(sharded, 0)
    real, other = trainer.train_stage, xp.Sharded.load(sharded.folder, problem_of())

    def nested(*args):
        with pytest.raises(xp.ExpungeError, match="training in"):
            other.retrain()
        return real(*args)

    monkeypatch.setattr(trainer, "train_stage", nested)
    sharded.retrain()
    with pytest.raises(NeedsError, match="needs the data"):
        xp.Sharded.load(sharded.folder, problem_of().model).retrain()
    with pytest.raises(SettingError, match="numbered 0 to 1"):
        sharded.retrain([2])


# --- on disk -------------------------------------------------------------------------------------


def test_save_and_load_give_the_same_model(sharded, tmp_path):
    sharded.forget(of(sharded, 0, 2)[0])
    copied = xp.Sharded.load(sharded.save(tmp_path / "copy"), problem_of().model)
    assert copied.status() == sharded.status() and torch.equal(
        copied.predict(X), sharded.predict(X)
    )
    assert copied.verify() == []
    for wrong, words in ((Blocky(), "another backbone"), (Blocky(width=4), "another backbone")):
        with pytest.raises(ModelError, match=words):
            xp.Sharded.load(sharded.folder, wrong)
    with pytest.raises(StoreError, match="holds no sharded model"):
        xp.Sharded.load(tmp_path / "nowhere", Blocky())
    with pytest.raises(SettingError, match="another folder"):
        sharded.save(tmp_path / "copy")
    with pytest.raises(SettingError, match="load it"):
        train(sharded.folder)


def test_several_processes_lose_no_deletion(sharded):
    others = [xp.Sharded.load(sharded.folder, problem_of().model) for _ in range(3)]
    ids = sharded._now.index.ids.tolist()
    parts = [ids[k:30:3] for k in range(3)]

    def work(one, part):
        for i in part:
            one.forget(i)

    threads = [threading.Thread(target=work, args=p) for p in zip(others, parts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sharded.status().deleted == 30 and sharded.verify() == []
    assert all(o.status() == sharded.status() for o in others)


class Stop(BaseException):
    """The power fails."""


@pytest.mark.parametrize("at", range(12))
def test_an_interruption_anywhere_leaves_the_old_or_the_new_state(sharded, monkeypatch, at):
    old, ids = sharded.status(), of(sharded, 0, 0)[:1]
    calls = []

    def failing(real):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) > at:
                raise Stop
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(folders.os, name, failing(getattr(os, name)))
        patch.setattr(folders.Folder, "erase", failing(folders.Folder.erase))
        with contextlib.suppress(Stop):
            sharded.forget(ids)
    again = xp.Sharded.load(sharded.folder, problem_of())
    assert again.verify() == []
    status = again.status()
    assert status.weights == old.weights if not status.deleted else status.deleted == 1
    done = again.forget(ids)
    assert done.changed == (status.deleted == 0) and again.status().deleted == 1


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_an_interrupted_retraining_leaves_the_old_or_the_new_model(sharded, monkeypatch, at):
    kill(sharded, 0)
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) > at:
            raise Stop
        return os.rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "replace", failing)
        with contextlib.suppress(Stop):
            sharded.retrain()
    again = xp.Sharded.load(sharded.folder, problem_of())
    assert again.verify() == []
    if again.status().dead:
        again.retrain()
    assert again.verify() == [] and again.status().dead == ()
    assert not (again.folder / "manifest.next.json").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_flipped_byte_is_found_and_named(trained, data):
    files = [p for p in sorted(trained.folder.rglob("*")) if p.is_file() and p.suffix != ".lock"]
    # the small files as often as the many large ones
    small = [p for p in files if p.suffix == ".json"]
    path = data.draw(st.sampled_from(data.draw(st.sampled_from([files, small]))))
    raw = path.read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:place] + bytes([raw[place] ^ data.draw(st.integers(1, 255))]) + raw[place + 1 :]
    path.write_bytes(changed)
    try:
        said = verify_folder(trained.folder)
    finally:
        path.write_bytes(raw)
    assert len(said) == 1 and path.name in said[0]


def test_a_file_with_the_same_tensors_and_other_bytes_is_found(sharded):
    digest = digests_of(sharded.manifest)[0, (0,)]
    path = sharded._folder.file(digest)
    save_file(sharded._folder.get(digest), path, metadata={"note": "harmless"})
    (said,) = sharded.verify()
    assert digest in said and "bytes" in said


def test_missing_files_are_named(sharded, tmp_path):
    stage = next(iter(digests_of(sharded.manifest).values()))
    sharded._folder.file(stage).unlink()
    assert "is missing" in sharded.verify()[0] and stage in sharded.verify()[0]
    (sharded.folder / "manifest.json").unlink()
    assert sharded.verify() == ["manifest.json is missing"]
    assert "holds no sharded model" in verify_folder(tmp_path / "nowhere")[0]


def test_a_stage_that_saw_deleted_samples_must_be_gone(sharded):
    digest = digests_of(sharded.manifest)[0, (0,)]
    raw = sharded._folder.file(digest).read_bytes()
    sharded.forget(of(sharded, 0, 0)[0])
    sharded._folder.file(digest).write_bytes(raw)
    (said,) = sharded.verify()
    assert digest in said and "not erased" in said
    assert xp.Sharded.load(sharded.folder, problem_of()).verify() == []  # opening finishes the work


def test_the_backbone_in_memory_is_checked(sharded):
    with torch.no_grad():
        sharded._base.stem.weight[0, 0] += 1
    assert sharded.verify() == ["the backbone in memory is not the one the manifest names"]


def test_the_manifest_says_where_everything_comes_from(trained):
    manifest = trained.manifest
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["settings"]["epochs"] == 2 and manifest["seed"] == 0
    stage = manifest["shards"][0]["stages"][-1]
    assert stage["samples"] == 24 and len(stage["saw"]) == 3 and stage["seconds"] > 0
    parents = {s["tensors"] for s in manifest["shards"][0]["stages"]}
    assert stage["parent"] in parents and len(stage["score"]) == 2 and 0 <= stage["score"][0] <= 1
    index = trained._now.index
    ids = index.members(0, 1, np.zeros(48, dtype=bool)).tolist()
    assert manifest["shards"][0]["slices"][1]["ids"] == index.commit(ids)
    text = (trained.folder / "manifest.json").read_text()
    assert index.salt.hex() not in text  # commitments say nothing without it


# --- what breaks exactness -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fitted": {"normaliser": "data"}}, "normaliser"),
        ({"fitted": {"deduplication": "data"}}, "deduplication"),
        ({"fitted": {"early stopping": "data"}}, "early stopping"),
        ({"norm": "train"}, "running statistics"),
        ({"runtime": xp.Runtime(budget=xp.core.runtime.Budget(steps=3))}, "no budget"),
        ({"fitted": {"weather": "data"}}, "names are"),
        ({"accept": ["weather"]}, "there is no 'weather'"),
        ({"shards": 30, "slices": 4}, "cannot fill"),
        ({"slices": 5}, "too few for 5 slices"),
        ({"adapter": "glue"}, "is no adapter"),
        ({"orders": 9, "slices": 2}, "between 1 and 2"),
        ({"prior": (0.5, 0.5), "slices": 3, "sequences": "matching"}, "one probability a slice"),
        ({"banana": 1}, "no setting"),
    ],
)  # fmt: skip
def test_what_breaks_exactness_or_cannot_be_is_refused(tmp_path, change, words):
    with pytest.raises(xp.UserError, match=words):
        train(tmp_path, **change)


def test_a_backbone_that_was_trained_on_the_data_is_refused(tmp_path):
    data = small_data()
    recipe = xp.ClassifierRecipe(Blocky, data, epochs=1)
    with pytest.raises(NeedsError, match="start='fresh'"):
        train(tmp_path, problem_of(data, recipe=recipe))
    fresh = {"adapter": "whole", "start": "fresh", "shards": 1, "slices": 2, "orders": 1}
    assert train(tmp_path / "f", problem_of(data, recipe=recipe), **fresh).exact


def test_validation_samples_must_not_be_training_samples(tmp_path):
    data = small_data()
    problem = problem_of(data, valid=data.only(data.ids[:5]))
    with pytest.raises(NeedsError, match="validation"):
        train(tmp_path, problem)
    found = train(tmp_path, problem, accept=["validation"], shards=1, slices=1, orders=1)
    assert not found.exact and "validation" in found.manifest["exactness"]["breaks"]


def test_validation_data_of_a_later_problem_are_looked_at_too(tmp_path, sharded, monkeypatch):
    data = small_data()
    among = problem_of(data, valid=data.only(data.ids[:5]))
    kill(sharded, 0)
    with pytest.raises(NeedsError, match="validation"):
        xp.Sharded.load(sharded.folder, among).retrain()
    # nor do scores of an interrupted training, which were taken on training samples, live on
    how = {"shards": 1, "slices": 2, "orders": 2}
    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        stopped_after(patch, 2)
        train(tmp_path / "v", among, accept=["validation"], **how)
    resumed = train(tmp_path / "v", **how)
    clean = train(tmp_path / "w", **how)
    assert resumed.exact and resumed._now.state[0].scores == clean._now.state[0].scores


def test_copies_in_other_slices_are_warned_of(tmp_path):
    x = torch.randn(1, 5).expand(12, 5).clone()
    problem = xp.Classification(Blocky(), (x, torch.zeros(12).long()))
    found = train(tmp_path, problem, shards=1, slices=2, orders=1, blocks="all")
    assert any("copies" in w for w in found.manifest["exactness"]["warnings"]) and found.exact
    averaged = torch.optim.swa_utils.AveragedModel(Blocky())
    with pytest.raises(NeedsError, match="average"):
        train(tmp_path / "a", xp.Classification(averaged, small_data()), blocks="all")


# --- copies that no deletion would reach -----------------------------------------------------------


def stopped_after(monkeypatch, count):
    real, calls = trainer.train_stage, []

    def call(*args):
        calls.append(args)
        if len(calls) > count:
            raise Stop
        return real(*args)

    monkeypatch.setattr(trainer, "train_stage", call)


def test_a_training_leaves_no_checkpoint_and_no_stage_of_one_that_was_given_up(
    tmp_path, monkeypatch
):
    how = {"shards": 1, "slices": 2, "orders": 1}
    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        stopped_after(patch, 1)
        train(tmp_path / "m", **how)
    data = small_data()  # one is withdrawn before the training is started again
    runtime = xp.Runtime(checkpoint=tmp_path / "c", checkpoint_every=1)
    sharded = train(tmp_path / "m", problem_of(data.only(data.ids[1:])), runtime=runtime, **how)
    named = {*digests_of(sharded.manifest).values(), sharded.manifest["index"]["tensors"]}
    assert {p.stem for p in sharded._folder.stages.glob("*")} == named
    assert (tmp_path / "c").exists() and not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("during", [False, True])
def test_stages_of_an_interrupted_retraining_go_with_the_next_deletion(
    sharded, monkeypatch, during
):
    kill(sharded, 0)
    late = of(sharded, 0, 0)[0]
    before = {p.stem for p in sharded._folder.stages.glob("*")}
    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        stopped_after(patch, 3)
        sharded.retrain()
    assert {p.stem for p in sharded._folder.stages.glob("*")} > before
    if during:  # deleted while it was under way; it ended afterwards
        other = xp.Sharded.load(sharded.folder, problem_of().model)
        with other._folder.locked("training"):
            other.forget(late)
        assert sharded._folder.records.exists()
        xp.Sharded.load(sharded.folder, problem_of().model)
    else:
        sharded.forget(late)
    assert {p.stem for p in sharded._folder.stages.glob("*")} == before
    assert not sharded._folder.records.exists() and sharded.verify() == []
    assert sharded.retrain().dead == ()


# --- other processes -------------------------------------------------------------------------------


def test_looking_at_a_model_while_another_process_commits_takes_nothing_away(sharded, monkeypatch):
    """The new manifest is on disk and not yet in force when another process verifies and loads."""
    kill(sharded, 0)
    real, seen = folders.Folder.put_live, []

    def put_live(self, live):
        # the committing process holds the lock, so whoever opens the model does not wait for it here
        seen.append(verify_folder(self.path))
        seen.append(folders.Folder(self.path).live().number)
        real(self, live)

    monkeypatch.setattr(folders.Folder, "put_live", put_live)
    sharded.retrain()
    assert len(seen) == 2 and seen[0] == []
    assert xp.Sharded.load(sharded.folder, problem_of()).verify() == []
    assert sharded.status().dead == ()


def test_a_state_that_is_replaced_while_it_is_read_is_read_again(sharded, monkeypatch):
    other, ids = xp.Sharded.load(sharded.folder, problem_of()), of(sharded, 0, 0)
    kill(sharded, 1)
    real, calls = folders.Folder.manifest, []

    def manifest(self, digest):
        if not calls:
            calls.append(digest)
            other.retrain()  # the manifest just named is no longer there
        return real(self, digest)

    monkeypatch.setattr(folders.Folder, "manifest", manifest)
    assert xp.Sharded.load(sharded.folder, problem_of()).status().dead == () and calls
    monkeypatch.undo()
    other.forget(ids[0])  # and a plan knows what others have deleted
    assert sharded.plan(ids[:2]).already == (ids[0],)


# --- what users bring ------------------------------------------------------------------------------


def test_models_that_adapters_cannot_serve_are_refused_in_a_sentence(tmp_path):
    def refused(words, model, roles=None, **how):
        made = xp.Classification(model, small_data(), roles=roles or {"last layer": ["head"]})
        with pytest.raises(SettingError, match=words):
            train(tmp_path, made, shards=1, slices=1, orders=1, **how)

    refused("no module 'hed'", Blocky(), {"last layer": ["hed"]}, blocks="all")
    tied = Blocky(classes=8)
    tied.head.weight, tied.head.bias = tied.blocks[0].weight, tied.blocks[0].bias
    refused("no weights of its own", tied, blocks="all")
    pruned = Blocky()
    xp.core.pruned.keep_only(pruned, {"stem.weight": torch.rand(8, 5) > 0.5})
    refused("would fill its zeros", pruned, adapter="lora(2)", blocks="all")
    plain = small_data().fetch(small_data().ids)
    regression = xp.Regression(Blocky(classes=1), (plain.x, plain.x[:, 0]))
    with pytest.raises(SettingError, match="no probabilities"):
        train(tmp_path, regression, shards=1, slices=1, orders=1, aggregate="probabilities")


def test_a_layer_whose_weight_is_computed_is_passed_over(tmp_path):
    model = Blocky()
    model.blocks[1] = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(8, 8))
    how = {"shards": 1, "slices": 1, "orders": 1, "blocks": "all"}
    sharded = train(tmp_path, problem_of(model=model), **how)
    assert "blocks.1" not in sharded._slots.modules[0] and "blocks.0" in sharded._slots.modules[0]
    assert sharded.predict(X[:0]).shape == (0, 3)


def test_retraining_without_the_data_it_needs_says_so(tmp_path):
    how = {"shards": 1, "slices": 2, "orders": 1, "data": "own"}
    sharded = train(tmp_path, **how)
    data, mine = small_data(), of(sharded, 0, 1)
    sharded.forget(mine[:-1])
    part = data.only(torch.tensor(of(sharded, 0, 0)))
    with pytest.raises(xp.core.errors.DataError, match="lacks 1 samples"):
        xp.Sharded.load(tmp_path, problem_of(part)).retrain([0])
    sharded.forget(mine)
    with pytest.raises(xp.core.errors.DataError, match="slice 1 of shard 0 has no samples"):
        sharded.retrain([0], keep_slices=True)
    assert xp.Sharded.load(tmp_path, problem_of(part)).retrain([0]).served == ((0, 1),)


def test_a_score_that_json_cannot_hold_is_the_worst(trained):
    from expunge.exact.manifest import state_of

    manifest = json.loads(json.dumps(trained.manifest))
    for stage in manifest["shards"][0]["stages"]:
        stage["score"] = [0.5, None if stage["prefix"][0] == 0 else -1.0]
    nothing = np.zeros(48, dtype=bool)
    state = state_of(manifest, trained._now.index, nothing)
    assert state[0].served[0] != 0 and len(state[0].served) == 3

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from expunge.core.errors import ExpungeError, StoreError, UserError
from expunge.store import Store, blobs
from expunge.store.blobs import Blobs

TENSORS = {"w": torch.arange(64.0), "b": torch.tensor([1, 2])}


@pytest.fixture
def stored(tmp_path):
    store = Store.open(tmp_path / "s")
    run = store.put_run(kind="original", key="k", record={}, tensors=TENSORS)
    return store, run, next(store.folder.glob("blobs/*/*"))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-8])


def emptied(path):
    path.write_bytes(b"")


def one_bit_flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def renamed_tensor(path):
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))


def other_tensors(path):
    save_file({"w": torch.zeros(2)}, path)


def a_pickle(path):
    torch.save(TENSORS, path)


def removed(path):
    path.unlink()


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        emptied,
        one_bit_flipped,
        renamed_tensor,
        other_tensors,
        a_pickle,
        removed,
        a_folder,
    ],
)
def test_a_damaged_blob_is_never_handed_out_nor_exported(stored, tmp_path, damage):
    store, run, path = stored
    damage(path)
    with pytest.raises(StoreError, match="missing" if damage is removed else "truncated|altered"):
        store.tensors(run)
    with pytest.raises(StoreError):
        store.export([run], tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()
    assert store.get(run).key == "k"


@pytest.mark.parametrize("damage", [truncated, one_bit_flipped, removed])
def test_putting_the_same_tensors_again_mends_the_blob(stored, damage):
    store, run, path = stored
    damage(path)
    store.put_run(kind="original", key="other", record={}, tensors=TENSORS)
    assert torch.equal(store.tensors(run)["w"], TENSORS["w"])


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_no_row_and_no_file(tmp_path, monkeypatch, error):
    store = Store.open(tmp_path / "s")
    first = store.put_run(kind="original", key="a", record={})

    def full(tensors, path):
        path.write_bytes(b"half a blob")
        raise error

    monkeypatch.setattr(blobs, "save_file", full)
    with pytest.raises(ExpungeError, match="No space left") as caught:
        store.put_run(kind="original", key="b", record={}, tensors=TENSORS)
    assert caught.value.exit_code == 1
    assert [r.id for r in store.runs()] == [first]
    assert not list(store.folder.rglob("*.safetensors"))


def test_a_failure_between_blob_and_row_leaves_garbage_but_no_run(tmp_path, monkeypatch):
    store = Store.open(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr("expunge.store.queries.insert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            store.put_run(kind="original", key="a", record={}, tensors=TENSORS)
    assert store.runs() == []
    assert len(store.gc()) == 1
    run = store.put_run(kind="original", key="a", record={}, tensors=TENSORS)
    assert set(store.tensors(run)) == {"w", "b"}


def test_garbage_is_not_collected_while_a_run_is_being_written(tmp_path, monkeypatch):
    monkeypatch.setattr(blobs, "BUSY_SECONDS", 0.05)
    folder = Blobs(tmp_path)

    def enter(lock):
        with lock():
            return True

    with folder.writing():
        assert enter(folder.writing)
        with pytest.raises(ExpungeError, match="another process"):
            enter(folder.alone)
    with folder.alone():
        with pytest.raises(ExpungeError, match="another process") as caught:
            enter(folder.writing)
        assert not isinstance(caught.value, UserError)
    assert enter(folder.writing)


def test_sparse_tensors_have_no_safetensors_form(tmp_path):
    store = Store.open(tmp_path / "s")
    with pytest.raises(ExpungeError):
        store.put_run(kind="original", key="a", record={}, tensors={"w": torch.eye(3).to_sparse()})
    assert store.runs() == []

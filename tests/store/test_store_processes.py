"""Several processes on one store, some of them killed at any moment."""

import sqlite3
import subprocess
import sys
import time
from collections import Counter

import torch

from expunge.store import Store

WRITER = """
import sys, torch
from expunge.store import Store
torch.set_num_threads(1)
store = Store.open(sys.argv[1])
me = sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    shared = store.put_run(kind="original", key=f"shared {i}", record={"by": me},
                           tensors={"w": torch.full((20_000,), float(i))})
    own = store.put_run(kind="unlearn", key=f"{me} {i}", record={"i": i}, parents=[shared],
                        tensors={"w": torch.full((20_000,), 1000.0 * int(me) + i)})
    if i % 5 == 4:
        store.gc()
    print(own, flush=True)
"""


def start(folder, count, rounds):
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, str(folder), str(i), str(rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    return writers


def end(writer):
    printed = writer.stdout.read().split()
    writer.stdout.close()
    writer.stdin.close()
    return printed, writer.wait()


def test_two_processes_fill_one_new_store_without_losing_or_repeating_anything(tmp_path):
    folder = tmp_path / "s"
    ends = [end(writer) for writer in start(folder, 2, 15)]
    assert [code for _, code in ends] == [0, 0]

    store = Store.open(folder)
    runs = store.runs()
    assert {r.id for r in runs if r.kind == "unlearn"} == {i for ids, _ in ends for i in ids}
    assert max(Counter((r.kind, r.key) for r in runs).values()) == 1
    assert len(runs) == 15 + 2 * 15
    for run in runs:
        assert store.tensors(run)["w"].shape == (20_000,)
    assert store.gc() == []


def test_a_store_survives_processes_killed_at_any_moment(tmp_path):
    folder = tmp_path / "s"
    printed = []
    writers = start(folder, 3, 10_000)
    for writer in writers:
        time.sleep(0.37)
        writer.kill()
        ids, code = end(writer)
        assert code == -9
        # the last line may have been cut short with its process
        printed += [i for i in ids if len(i) == 26]
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

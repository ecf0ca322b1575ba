"""A fleet in the store: jobs as data, nothing trained twice, killed halfway and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from fleet_recipes import LOG, failing, jobs_of, logged, problem_of, recipe_of

import expunge as xp
from expunge.core.errors import NeedsError, SettingError, StoreError, UserError
from expunge.core.hashing import content_key, hash_tensors
from expunge.core.runtime import Runtime
from expunge.fleet.jobs import Job, random_halves
from expunge.fleet.references import reference_key, references
from expunge.fleet.subsets import train_on_subsets
from expunge.fleet.train import members, progress, train_fleet
from expunge.store import Store
from expunge.suite.bench import Bench


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Seeds of the trainings that ended, whichever process they ran in."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv(LOG, str(log))
    return lambda: [int(line) for line in log.read_text().split()]


@pytest.mark.parametrize("engine", ["one-by-one", "processes:2"])
def test_only_what_is_missing_is_trained(counted, engine):
    problem, store = problem_of(logged), Store.temporary()
    jobs = jobs_of(problem.train, 5)
    first = train_fleet(problem, jobs[:2], store, executor=engine)
    assert sorted(counted()) == [11, 12] and first.reused == (False, False)
    whole = train_fleet(problem, jobs, store, executor=engine)
    assert sorted(counted()) == [11, 12, 13, 14, 15]
    assert whole.reused == (True, True, False, False, False)
    again = train_fleet(problem, jobs, store, executor=engine)
    assert len(counted()) == 5 and again.runs == whole.runs and again.run == whole.run
    for model, job in zip(again, jobs, strict=True):
        wanted = recipe_of()(job.keep, job.seed).state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())
        assert not model.training
    assert len(again[1:3]) == 2 and len(again.costs) == 5


def test_a_failure_keeps_what_was_done(counted):
    store = Store.temporary()
    jobs = jobs_of(recipe_of().data)
    with pytest.raises(RuntimeError, match="seed 13"):
        train_fleet(problem_of(failing), jobs, store)
    kept = store.runs(kind="shadow")
    assert sorted(run.seed for run in kept) == [11, 12]
    rows = progress(store, store.runs(kind="fleet")[0])
    assert [row["run"] is not None for row in rows] == [True, True, False, False]


SCRIPT = """
from fleet_recipes import jobs_of, logged, problem_of
from expunge.fleet.train import train_fleet
from expunge.store import Store

if __name__ == "__main__":
    problem = problem_of(logged)
    train_fleet(problem, jobs_of(problem.train, 6), Store.open({store!r}), executor={engine!r})
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:1]


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("engine", ["one-by-one", "processes:2"])
def test_killed_halfway_and_gone_on_with(tmp_path, counted, engine):
    """SIGKILL after two models: the rest is trained, those in the store are not, workers end."""
    (tmp_path / "main.py").write_text(
        textwrap.dedent(SCRIPT).format(store=str(tmp_path / "store"), engine=engine)
    )
    here = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
        "FLEET_TEST_SECONDS": "0.5",
    }
    process = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environment)
    store = Store.open(tmp_path / "store")
    deadline = time.monotonic() + 120
    while len(store.runs(kind="shadow")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
        assert process.poll() is None, "the fleet ended before it could be killed"
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers)), "a worker outlived the process that started it"

    kept = {run.seed for run in store.runs(kind="shadow")}
    assert 2 <= len(kept) < 6
    rows = progress(store, store.runs(kind="fleet")[0])  # what is to be done was written first
    assert {row["seed"] for row in rows if row["run"]} == kept and len(rows) == 6
    before = counted()
    problem = problem_of(logged)
    jobs = jobs_of(problem.train, 6)
    fleet = train_fleet(problem, jobs, store)
    new = counted()[len(before) :]
    assert sorted(new) == sorted({11, 12, 13, 14, 15, 16} - kept)
    assert [job.seed for job, old in zip(jobs, fleet.reused, strict=True) if old] == sorted(kept)
    for model, job in zip(fleet, jobs, strict=True):
        wanted = recipe_of()(job.keep, job.seed).state_dict()
        assert all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())


def test_equal_jobs_are_trained_once(counted):
    problem = problem_of(logged)
    job = jobs_of(problem.train, 1)[0]
    fleet = train_fleet(problem, [job, job, Job(job.keep, 99)])
    assert sorted(counted()) == [11, 99]
    assert fleet.runs[0] == fleet.runs[1] != fleet.runs[2]


def test_keys_tell_jobs_apart():
    problem = problem_of(recipe_of())
    ids = problem.train.ids
    job = Job(ids[:9], 1)
    others = [
        Job(ids[:9], 2),
        Job(ids[:8], 1),
        Job(ids[:9].flip(0), 1),  # batches are drawn from this order
        Job(ids[:9], 1, "reference"),
    ]
    keys = {j.key(problem) for j in (job, *others)}
    assert len(keys) == 5 and job.key(problem) == Job(ids[:9].clone(), 1).key(problem)
    assert job.key(problem, "cuda") not in keys
    assert job.key(problem_of(recipe_of(lr=0.06))) not in keys
    # a reference is known by what it must not have seen
    flipped = Job(ids[:9].flip(0), 1, "reference")
    assert flipped.key(problem) == others[-1].key(problem)
    assert torch.equal(flipped.keep, ids[:9])


def test_a_reference_has_the_key_it_always_had():
    problem, request = problem_of(recipe_of()), xp.forget(ids=[5, 8])
    wanted = content_key([
        "reference", xp.__version__, problem.recipe_key(), problem.train.fingerprint(),
        hash_tensors({"ids": torch.tensor([5, 8])}), 1001, "cpu",
    ])  # fmt: skip
    assert reference_key(problem, request, 1001) == wanted
    store = Store.temporary()
    made = next(references(problem, request, [1001], store, Runtime()))
    found = store.get(made.run)
    assert found.key == wanted and found.kind == "reference" and not made.reused
    assert found.record["request"]["ids"] == [5, 8] and found.record["engine"] == "one-by-one"
    fleet = train_fleet(
        problem, [Job(problem.train.without(torch.tensor([5, 8])), 1001, "reference")], store
    )
    assert fleet.reused == (True,) and fleet.runs == (made.run,)


@pytest.mark.parametrize("engine", [None, "together"])
def test_references_come_in_order_and_one_at_a_time(counted, engine):
    problem, request, store = problem_of(logged), xp.forget(ids=[5, 8]), Store.temporary()
    list(references(problem, request, [3], store, Runtime()))
    runtime = Runtime(engine=engine)
    found = references(problem, request, [1, 2, 3, 4], store, runtime)
    first = next(found)
    if engine is None:
        assert counted() == [3, 1], "the loop trains what is asked for"
    rest = list(found)
    assert [r.seed for r in (first, *rest)] == [1, 2, 3, 4]
    assert [r.reused for r in (first, *rest)] == [False, False, True, False]
    assert sorted(counted()) == [1, 2, 3, 4]
    for made in (first, *rest):
        wanted = recipe_of()(problem.train.without(torch.tensor([5, 8])), made.seed)
        assert torch.equal(made.model.state_dict()["1.weight"], wanted.state_dict()["1.weight"])
    again = list(references(problem, request, [4, 1], store, runtime))
    assert all(r.reused for r in again) and len(counted()) == 4


def test_what_is_ready_early_is_read_again():
    """An engine that ends in another order: the models still come in that of the jobs."""

    class Backwards:
        name = "backwards"

        def run(self, problem, jobs, runtime):
            from expunge.fleet.executors import OneByOne

            yield from sorted(OneByOne().run(problem, jobs, runtime), key=lambda d: -d.index)

    problem, store = problem_of(recipe_of()), Store.temporary()
    jobs = jobs_of(problem.train)
    made = list(members(problem, jobs, store, Runtime(), Backwards()))
    for member, job in zip(made, jobs, strict=True):
        wanted = recipe_of()(job.keep, job.seed).state_dict()
        assert torch.equal(member.model.state_dict()["1.weight"], wanted["1.weight"])
        assert not member.reused and store.get(member.run).seed == job.seed


def test_the_bench_trains_references_with_the_engine_of_its_runtime():
    problem, request = problem_of(recipe_of()), xp.forget(ids=[5, 8])
    made = {}
    for engine in (None, "together"):
        seen = []
        bench = Bench(
            Store.temporary(),
            Runtime(engine=engine),
            lambda *job: seen.append(job),  # noqa: B023
        )
        made[engine] = list(bench.references(problem, request, 3))
        assert [job[0] for job in seen] == [
            f"fleet test: reference {s}" for s in (1001, 1002, 1003)
        ]
        assert [bench.store.find("reference", job[1]).id for job in seen] == [j[3] for j in seen]
        assert {bench.store.get(r.run).record["engine"] for r in made[engine]} == {
            engine or "one-by-one"
        }
    for a, b in zip(made["together"], made[None], strict=True):
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_the_list_of_jobs_is_in_the_store():
    problem, store = problem_of(recipe_of()), Store.temporary()
    jobs = jobs_of(problem.train)
    fleet = train_fleet(problem, jobs, store, name="shadows")
    run = store.get(fleet.run)
    assert run.kind == "fleet" and run.record["name"] == "shadows"
    rows = progress(store, run)
    assert [row["run"] for row in rows] == list(fleet.runs)
    assert [row["samples"] for row in rows] == [13] * 4
    assert [row["key"] for row in rows] == [job.key(problem) for job in jobs]
    kept = store.tensors(run)
    for job, mask in zip(jobs, kept["kept"], strict=True):
        assert torch.equal(kept["ids"][mask], job.keep.sort().values)
    with pytest.raises(StoreError, match="not a fleet"):
        progress(store, fleet.runs[0])


def test_progress_counts_what_was_there():
    class Counting:
        def __init__(self):
            self.events = []

        def start(self, task, total):
            self.events.append((task, total))

        def advance(self, task, steps=1):
            if task == "shadows":
                self.events.append(steps)

        def finish(self, task):
            pass

        say = finish

    problem, store = problem_of(recipe_of()), Store.temporary()
    jobs = jobs_of(problem.train)
    train_fleet(problem, jobs[:3], store)
    reporter = Counting()
    train_fleet(problem, jobs, store, Runtime(reporter=reporter), name="shadows")
    assert reporter.events[0] == ("shadows", 4)
    assert [e for e in reporter.events if isinstance(e, int)] == [3, 1]


def test_random_halves():
    problem = problem_of(recipe_of())
    jobs = random_halves(problem, 4, seed=1)
    assert [len(job.keep) for job in jobs] == [15] * 4
    assert [job.seed for job in jobs] == [1, 2, 3, 4] and jobs[0].role == "shadow"
    assert torch.equal(random_halves(problem, 2, seed=1)[1].keep, jobs[1].keep)
    assert not torch.equal(jobs[0].keep, jobs[1].keep)


def test_bad_input():
    problem = problem_of(recipe_of())
    with pytest.raises(UserError, match="role is one of"):
        Job(problem.train.ids, 0, "teacher")
    with pytest.raises(UserError, match="at least one sample"):
        Job(problem.train.ids[:0], 0)
    with pytest.raises(SettingError, match="engine 'loop'"):
        train_fleet(problem, jobs_of(problem.train), executor="loop")
    bare = xp.Classification(problem.model, problem.train)
    with pytest.raises(NeedsError, match="pass recipe="):
        train_fleet(bare, jobs_of(problem.train))
    assert len(train_fleet(problem, [])) == 0


@pytest.mark.parametrize("engine", [None, "one-by-one"])
def test_subsets_keep_outputs_and_go_on(counted, engine):
    problem, store = problem_of(logged), Store.temporary()
    runtime = Runtime()
    part = train_on_subsets(problem, 2, 0.5, Runtime(), store=store, executor=engine)
    assert len(counted()) == 2
    whole = train_on_subsets(problem, 4, 0.5, runtime, store=store, executor=engine)
    assert len(counted()) == 4
    assert torch.equal(whole.outputs[:2], part.outputs)
    plain = train_on_subsets(problem, 4, 0.5, Runtime())
    torch.testing.assert_close(whole.outputs, plain.outputs)
    assert torch.equal(whole.masks, plain.masks)
    # weights are not kept, only what they say
    assert {run.kind for run in store.runs()} == {"outputs"} and len(store.runs()) == 4


def test_difficulty_is_the_same_whatever_the_engine():
    problem = problem_of(recipe_of())
    plain = xp.difficulty(problem, "el2n", runs=3, epoch=2)
    found = xp.difficulty(problem, "el2n", runs=3, epoch=2, runtime=Runtime(engine="together"))
    torch.testing.assert_close(found.runs, plain.runs, rtol=0, atol=1e-9)
    model = recipe_of().train(problem.train.ids, Runtime().seed_for("difficulty", 1), last=2)[0]
    with torch.no_grad():
        batch = problem.train.fetch(problem.train.ids)
        p = model(batch.x).softmax(1) - torch.nn.functional.one_hot(batch.y, 3)
    torch.testing.assert_close(plain.runs[1], p.norm(dim=1))

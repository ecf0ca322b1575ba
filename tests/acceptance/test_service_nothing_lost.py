"""Nothing lost: 200 requests from several clients, workers killed with -9, the database restarted.

On SQLite and on a real Postgres, with a stand-in and with a sharded model, whose files must never be in
a half state. Writes benchmarks/results/service_nothing_lost.json and .md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from _results import must_be_seen, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "service"))

import kill_story
import postgres
import small_problem

pytestmark = pytest.mark.acceptance

REQUESTS, KILLS = 200, 54


def fake(folder: Path, database: str, restart=None) -> dict:
    jobs = kill_story.fake_jobs(REQUESTS)
    result = kill_story.run(
        folder, kill_story.fake_policy(database), "fake", jobs, clients=4, workers=3, kills=KILLS,
        restart=restart, seconds=900,
    )  # fmt: skip
    kill_story.nothing_lost(result, jobs)
    wanted = sorted(i for _, ids in jobs for i in ids)
    result["whole"] = kill_story.fake_deleted(result) == wanted
    return result


def sharded(folder: Path, database: str, restart=None) -> dict:
    from expunge.exact.verify import verify_folder

    small_problem.train(folder / "model")
    jobs = [(f"key-{n}", [n]) for n in range(REQUESTS)]
    result = kill_story.run(
        folder, small_problem.policy("model", database), "small", jobs, clients=4, workers=3,
        kills=KILLS, restart=restart, seconds=900, seed=1,
    )  # fmt: skip
    kill_story.nothing_lost(result, jobs)
    import expunge as xp

    model = xp.Sharded.load(result["version"], small_problem.problem())
    now = model._now
    gone = now.index.ids[now.live.deleted].tolist()
    result["whole"] = verify_folder(result["version"]) == [] and gone == list(range(REQUESTS))
    result["whole"] &= verify_folder(folder / "model") == []
    return result


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    def folder():
        return tmp_path_factory.mktemp("story")

    found = {
        "SQLite, stand-in": fake(folder(), "service.db"),
        "SQLite, sharded": sharded(folder(), "service.db"),
    }
    with postgres.running() as server:
        found["Postgres, stand-in"] = fake(folder(), server.database(), server.crash)
        found["Postgres, sharded"] = sharded(folder(), server.database(), server.crash)
    kept = ("requests", "states", "kills", "restarts", "seconds", "entries", "versions", "errors", "whole")  # fmt: skip
    table = [
        "| database, model | requests | released | failed | kills | restarts | deletions | seconds |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {r['requests']} | {r['states'].get('released', 0)} | {r['states'].get('failed', 0)} "
            f"| {r['kills']} | {r['restarts']} | {r['versions']} | {r['seconds']:.0f} |"
            for name, r in found.items()
        ),
    ]
    data = {"stories": {n: {k: r[k] for k in kept} for n, r in found.items()}}
    write("service_nothing_lost", data, expected(found), "\n".join(table))
    return found


def expected(found: dict) -> list[tuple[str, str, bool]]:
    rows = []
    for name, r in found.items():
        ends = [h[-1] for h in r["histories"].values()]
        once = all(sum(s in kill_story.FINAL for s in h) == 1 for h in r["histories"].values())
        rows += [
            (
                f"{name}: ≥ 50 kills with -9 and a restarted database",
                f"{r['kills']} kills, {r['restarts']} restarts",
                r["kills"] >= 50 and r["restarts"] >= 2,
            ),
            (
                f"{name}: each of {REQUESTS} requests ends released or failed, once",
                str(r["states"]),
                len(ends) == REQUESTS and once and set(ends) <= {"released", "failed"},
            ),
            (
                f"{name}: the ledger verifies, with one end for each request",
                f"{r['entries']} entries",
                not r["ledger"] and set(r["ends"].values()) == {1},
            ),
            (
                f"{name}: the model is whole, without exactly what was asked",
                f"{r['versions']} versions",
                bool(r["whole"]) and not r["left"],
            ),
        ]
    return rows


each, whole = must_be_seen(expected, 16)
test_each, test_whole = each, whole

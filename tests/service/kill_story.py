"""Nothing lost: clients submit, workers are killed with -9 at random, the database is restarted.

Shared by the small run of the suite and the long one of the acceptance tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
FINAL = {"released", "rejected", "failed", "cancelled"}


def _ready() -> None:
    sys.path.insert(0, str(HERE))
    import torch

    torch.set_num_threads(1)


def work(policy: str) -> None:
    """A worker, until it is killed."""
    _ready()
    from expunge.service import logs
    from expunge.service.service import Service
    from expunge.service.worker import Worker

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure("error")
    worker = Worker(Service(policy, patience=600))
    worker.start()
    worker.run()


def submit(policy: str, model: str, jobs: list[tuple[str, list[int]]], pause: float) -> None:
    """A client: submits each job until it has an answer, every third one twice."""
    _ready()
    from expunge.core.request import forget
    from expunge.service.service import Service

    service = Service(policy, patience=600)
    for number, (key, ids) in enumerate(jobs):
        for _ in range(2 if number % 3 == 0 else 1):
            service.submit(model, forget(ids=ids), key=key)
        time.sleep(pause)
    service.close()


def context():
    found = multiprocessing.get_context("forkserver")
    # the server that forks has imported all this, so that a worker starts at once
    found.set_forkserver_preload(["expunge.service.worker", "expunge.core.data", "torch.nn"])
    return found


def run(
    folder: Path,
    policy: str,
    model: str,
    jobs: list[tuple[str, list[int]]],
    *,
    clients: int = 4,
    workers: int = 3,
    kills: int = 50,
    between: tuple[float, float] = (0.05, 0.4),
    restart=None,
    restarts: int = 2,
    seed: int = 0,
    seconds: float = 300.0,
) -> dict:
    """Let it happen; returns what was counted, with every request's history."""
    from expunge.service import ledger, requests
    from expunge.service.service import Service

    file = folder / "service.toml"
    file.write_text(policy)
    draw, fork = random.Random(seed), context()
    service = Service(file, patience=120)
    started = time.monotonic()

    def start():
        process = fork.Process(target=work, args=(str(file),), daemon=True)
        process.start()
        return process

    living = [start() for _ in range(workers)]
    shares = [jobs[n::clients] for n in range(clients)]
    span = kills * sum(between) / 2
    talking = [
        fork.Process(
            target=submit,
            args=(str(file), model, share, 0.7 * span / max(len(share), 1)),
            daemon=True,
        )
        for share in shares
    ]
    for process in talking:
        process.start()
    done, restarted = 0, 0
    try:
        while done < kills:
            time.sleep(draw.uniform(*between))
            number = draw.randrange(workers)
            os.kill(living[number].pid, signal.SIGKILL)
            living[number].join()
            living[number] = start()
            done += 1
            if restarted < restarts and done >= (restarted + 1) * kills // (restarts + 1):
                if restart is not None:
                    restart()
                else:  # a file has no server: everybody who has it open dies at once
                    for process in living:
                        os.kill(process.pid, signal.SIGKILL)
                        process.join()
                    living, done = [start() for _ in range(workers)], done + workers
                restarted += 1
        deadline = time.monotonic() + seconds
        for process in talking:
            process.join(max(1.0, deadline - time.monotonic()))
        while time.monotonic() < deadline:
            rows = service.database.read(lambda c: requests.listed(c, limit=10_000))
            ended = len(rows) >= len(jobs) and all(r["state"] in FINAL for r in rows)
            # a batch removes what it superseded after its requests have ended
            if ended and len(list(service.versions(model).iterdir())) == 1:
                break
            time.sleep(0.2)
    finally:
        for process in [*living, *talking]:
            process.kill()
            process.join()
    rows = service.database.read(lambda c: requests.listed(c, limit=10_000))
    histories = {
        r["id"]: [
            h["state"]
            for h in service.database.read(lambda c, r=r: requests.history_of(c, r["id"]))
        ]
        for r in rows
    }
    with service.database.engine.connect() as connection:
        entries = [(e.kind, e.request) for e in ledger.entries(connection)]
    wrong = ledger.verify(service.database.engine)
    current = service.current(model)
    version = service.current_folder(current)
    result = {
        "requests": len(rows),
        "states": dict(Counter(r["state"] for r in rows)),
        "kills": done,
        "restarts": restarted,
        "seconds": round(time.monotonic() - started, 1),
        "keys": sorted(r["key"] for r in rows),
        "histories": histories,
        "ends": Counter(request for kind, request in entries if kind in FINAL),
        "ledger": wrong,
        "entries": len(entries),
        "versions": current["version"] if current else 0,
        "version": version,
        "left": sorted(p.name for p in service.versions(model).iterdir() if p != version),
        "errors": [r["error"] for r in rows if r["error"]],
    }
    service.close()
    return result


def nothing_lost(result: dict, jobs: list[tuple[str, list[int]]]) -> None:
    """Every request ended exactly once, in rows, history and ledger alike."""
    assert result["keys"] == sorted(key for key, _ in jobs)
    assert set(result["states"]) <= {"released", "failed"}
    for identifier, history in result["histories"].items():
        assert sum(state in FINAL for state in history) == 1, history
        assert history[-1] in FINAL
        assert result["ends"][identifier] == 1
    assert result["ledger"] == []
    assert result["left"] == []


def fake_policy(database: str, seconds: float = 0.02, samples: int = 2000) -> str:
    return f"""
[service]
database = "{database}"
poll_seconds = 0.05
[models.fake]
kind = "custom"
deleter = "fakes:make"
settings = {{ seconds = {seconds}, samples = {samples} }}
limits = {{ "fake/auc" = {{ gap = 0.1 }} }}
"""


def fake_jobs(count: int) -> list[tuple[str, list[int]]]:
    return [(f"key-{n}", [3 * n, 3 * n + 1]) for n in range(count)]


def fake_deleted(result: dict) -> list[int]:
    return json.loads((result["version"] / "gone.json").read_text())

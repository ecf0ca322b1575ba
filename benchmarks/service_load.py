"""Load of the deletion service: status requests per second while 50 clients submit; writes service_load.json.

A server process, a worker process, 50 threads that each submit a request and then ask for its state, as
clients do. Run it with nothing else on the machine: `python benchmarks/service_load.py`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from expunge import __version__

HERE = Path(__file__).resolve().parent
POLICY = """
[service]
database = "{database}"
per_second = 1000000
burst = 1000000
[models.fake]
kind = "custom"
deleter = "fakes:make"
settings = {{ samples = 100000 }}
"""


class Client(threading.Thread):
    """Submits, then asks for states until time is up; keeps its connection."""

    def __init__(self, number: int, port: int, until: float, submissions: int) -> None:
        super().__init__(daemon=True)
        self.number, self.port, self.until, self.submissions = number, port, until, submissions
        self.status: list[float] = []
        self.submit: list[float] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        every = (self.until - time.monotonic()) / self.submissions
        last, mine = 0.0, None
        while (now := time.monotonic()) < self.until:
            try:
                if mine is None or (now - last > every and len(self.submit) < self.submissions):
                    last = now
                    sample = self.number * 1000 + len(self.submit)
                    body = json.dumps({"model": "fake", "ids": [sample]})
                    headers = {"Content-Type": "application/json", "Idempotency-Key": f"{sample}"}
                    self.submit.append(self._time(connection, "POST", "/requests", body, headers))
                    mine = json.loads(self.answer)["id"]
                else:
                    self.status.append(self._time(connection, "GET", f"/requests/{mine}"))
            except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                connection.close()

    def _time(self, connection, method, path, body=None, headers=None) -> float:
        start = time.perf_counter()
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        self.answer = response.read()
        if response.status not in (200, 202):
            self.wrong.append(f"{method} {path}: {response.status} {self.answer[:200]!r}")
        return time.perf_counter() - start


def measured(database: str, clients: int, seconds: float, submissions: int) -> dict:
    """Run one load and return its figures."""
    with tempfile.TemporaryDirectory(prefix="expunge-load-") as folder:
        file = Path(folder) / "service.toml"
        file.write_text(POLICY.format(database=database))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        paths = [str(HERE.parent / "tests" / "service"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "expunge", "serve", "--policy", str(file), "--port", str(port), "--workers", "1", "--log", "error"]  # fmt: skip
        server = subprocess.Popen(command, env=env)
        try:
            _until_ready(port, server)
            load = os.getloadavg()[0]
            began = time.monotonic()
            crowd = [Client(n, port, began + seconds, submissions) for n in range(clients)]
            for one in crowd:
                one.start()
            for one in crowd:
                one.join()
            took = time.monotonic() - began
        finally:
            server.terminate()
            server.wait(60)
    status = np.array([s for one in crowd for s in one.status])
    submit = np.array([s for one in crowd for s in one.submit])
    return {
        "seconds": took, "clients": clients, "load_before": load,
        "status": len(status), "status_per_second": len(status) / took,
        "submitted": len(submit), "submitted_per_second": len(submit) / took,
        "errors": [e for one in crowd for e in one.wrong][:20],
        "milliseconds": {
            name: {p: 1000 * float(np.percentile(values, q)) for p, q in (("p50", 50), ("p95", 95), ("p99", 99))}
            for name, values in (("status", status), ("submit", submit))
        },
    }  # fmt: skip


def _until_ready(port: int, server: subprocess.Popen) -> None:
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                time.sleep(3)  # the worker starts too
                return
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
        time.sleep(0.2)
    raise SystemExit("the server does not answer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--submissions", type=int, default=10, help="of each client")
    parser.add_argument("--database", default="service.db", help="a file or a Postgres address")
    options = parser.parse_args()
    found = measured(options.database, options.clients, options.seconds, options.submissions)
    document = {
        "command": "python benchmarks/service_load.py", "expunge": __version__,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "database": "SQLite" if "://" not in options.database else "Postgres", **found,
    }  # fmt: skip
    folder = HERE / "results"
    (folder / "service_load.json").write_text(json.dumps(document, indent=1) + "\n")
    ms = found["milliseconds"]
    rows = [
        "| | per second | p50 ms | p95 ms | p99 ms |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {rate:.0f} | {ms[name]['p50']:.1f} | {ms[name]['p95']:.1f} | {ms[name]['p99']:.1f} |"
            for name, rate in (
                ("status", found["status_per_second"]),
                ("submit", found["submitted_per_second"]),
            )
        ),
    ]
    text = (
        f"Made by `python benchmarks/service_load.py` (expunge {__version__}): {found['clients']} clients "
        f"for {found['seconds']:.0f} s on {os.cpu_count()} cores, server, worker and clients together; "
        f"{len(found['errors'])} errors; load average before the start {found['load_before']:.1f}.\n\n"
    )
    (folder / "service_load.md").write_text(text + "\n".join(rows) + "\n")
    print(text + "\n".join(rows))
    for error in found["errors"]:
        print(error)


if __name__ == "__main__":
    main()

"""`expunge requests`, `worker` and `serve` from a shell: a whole life, and sentences for mistakes."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVICE = Path(__file__).resolve().parents[1] / "service"
POLICY = """
[service]
poll_seconds = 0.05
[models.fake]
kind = "custom"
deleter = "fakes:make"
hold_above = 2
"""


@pytest.fixture
def policy(tmp_path):
    (tmp_path / "service.toml").write_text(POLICY)
    return tmp_path / "service.toml"


def environment():
    paths = [str(SERVICE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def shell(*words, policy=None):
    """A command in this process: starting another takes seconds."""
    from expunge.cli.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["expunge", *words, *(["--policy", str(policy)] if policy else [])]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        return subprocess.CompletedProcess(words, stop.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("a command ends with an exit code")


def call(port, method, path, body=None):
    headers = {"Content-Type": "application/json"}
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    ) as connection:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")


def _until_it_listens(port, server):
    while server.poll() is None:
        try:
            return call(port, "GET", "/health")
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_a_request_from_a_shell_to_its_certificate(policy, tmp_path):
    """One story, since every command takes seconds to start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "expunge",
        "serve",
        "--policy",
        str(policy),
        "--port",
        str(port),
    ]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(command, env=environment(), stderr=log)
    try:
        _until_it_listens(port, server)
        done = shell("requests", "submit", "fake", "--ids", "1,2", "--key", "k", "--wait", "200", "--json", policy=policy)  # fmt: skip
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout)
        assert row["state"] == "released" and row["history"][-1]["state"] == "released"
        assert call(port, "GET", f"/requests/{row['id']}")[1]["state"] == "released"
        file = tmp_path / "certificate.json"
        shown = shell("requests", "show", row["id"][:20], "--certificate", str(file), policy=policy)
        assert "released, 2 samples: deleted, version 1" in shown.stdout and file.exists()
        keys = tmp_path / "service" / "keys" / "keys.json"
        checked = shell("certificate", "verify", str(file), "--keys", str(keys))
        assert checked.returncode == 0, checked.stdout + checked.stderr
        held = call(port, "POST", "/requests", {"model": "fake", "ids": [3, 4, 5]})[1]["id"]
        deadline = time.monotonic() + 60
        while call(port, "GET", f"/requests/{held}")[1]["state"] != "planned":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "waits for approval" in shell("requests", "list", policy=policy).stdout
        said = shell("requests", "approve", held, policy=policy)
        assert said.returncode == 0 and "approved" in said.stdout
        # a body that is announced as large is refused before it is sent
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.settimeout(30)
            raw.sendall(
                b"POST /requests HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n\r\n"
            )
            assert raw.recv(100).startswith(b"HTTP/1.1 413")
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    log.close()
    lines = [
        json.loads(line)
        for line in (tmp_path / "log").read_text().splitlines()
        if line.startswith("{")
    ]
    events = [line["event"] for line in lines]
    assert code == 0 and "worker started" in events and "worker stopped" in events
    assert not any("[1, 2]" in str(line) for line in lines)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("requests", "list", "--policy", "none.toml"), "cannot read the policy none.toml"),
        (("requests", "submit", "other", "--ids", "1"), "there is no model 'other'"),
        (("requests", "submit", "fake"), "exactly one of --ids"),
        (("requests", "show", "abcdefgh"), "no request begins"),
        (("requests", "list", "--state", "gone"), "there is no state 'gone'"),
        (("serve", "--host", "0.0.0.0"), "give a token"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(policy, words, says):
    done = shell(*words, policy=None if "--policy" in words else policy)
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

"""The whole story on the digits: train, serve, ask to delete, verify the certificate; for `demo --service`."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError, UserError

POLICY = """# Policy of the deletion service; see docs/guides/deletion-requests.md

[service]
database = "service.db"
folder = "service"

[models.digits]                          # exact: adapters are switched off
kind = "sharded"
folder = "model"
problem = "workload:digits-class"
hold_above = 100                         # more samples than that in a day wait for somebody's approval
audits = ["accuracy"]
limits = { "accuracy/retain-test" = { low = 0.7 } }
"""
SETTINGS: dict[str, Any] = {
    "shards": 3, "slices": 3, "orders": 3, "adapter": "lora(8)", "blocks": "all", "start": "fresh",
    "epochs": 5, "lr": 0.01,
}  # fmt: skip
PATIENCE = 1000.0
Say = Callable[[str], None]


def tell(folder: Path, say: Say) -> dict[str, Any]:
    """Run the story in a folder and leave a certificate there.

    Args:
        folder: new or empty.
        say: takes a line for people.

    Returns:
        Paths and figures, as JSON types.

    Raises:
        UserError: the folder is in use.
        ExpungeError: something in the story did not end as it should.
    """
    import torch

    from expunge.core.runtime import Runtime
    from expunge.exact.sharded import Sharded
    from expunge.report import certificate
    from expunge.report.keys import KeySet
    from expunge.service import ledger
    from expunge.service.policy import read_policy
    from expunge.service.service import Service
    from expunge.service.sharded_deleter import backbone_of
    from expunge.service.supervise import Workers

    began = time.monotonic()
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "service.toml"
    file.write_text(POLICY)
    torch.set_num_threads(1)
    policy = read_policy(file)
    problem: Any = backbone_of(policy, "workload:digits-class")
    say("training the digits in 3 shards of 3 slices, 3 orders each …")
    model = Sharded.train(problem, folder=folder / "model", runtime=Runtime(), **SETTINGS)
    test = problem.test.fetch(problem.test.ids)
    before = float((model.predict(test.x).argmax(1) == test.y).float().mean())
    trained = time.monotonic() - began
    say(f"trained in {trained:.0f} s; accuracy on test digits {before:.3f}")

    service = Service(policy)
    crew = Workers(str(file), 1, level="error", patience=0)
    try:
        with _Server(service) as base:
            say(f"serving on {base}, one worker beside it")
            picture = problem.train.fetch(problem.train.ids[:1]).x.tolist()
            first = _call(base, "POST", "/predict", {"model": "digits", "inputs": picture})
            some = problem.train.ids[5:8].tolist()
            sent = _call(base, "POST", "/requests", {"model": "digits", "ids": some}, key="demo-1")
            again = _call(base, "POST", "/requests", {"model": "digits", "ids": some}, key="demo-1")
            if again["id"] != sent["id"]:
                raise ExpungeError("the same request was taken twice")
            say(f"asked to delete 3 samples: request {sent['id']}")
            done = _wait(base, sent["id"], began, say)
            plan = _call(base, "GET", f"/requests/{sent['id']}/plan")["plan"]
            say(f"plan: {plan['sentence']}")
            unknown = _call(base, "POST", "/requests", {"model": "digits", "ids": [10**6]})
            say(
                f"asked for a sample that nobody knows: {_wait(base, unknown['id'], began, say)['error']}"
            )
            held = _call(base, "POST", "/requests", {"model": "digits", "label": [3]})
            _wait(base, held["id"], began, say)
            say("asked for all threes: more than 100 samples wait for approval, which we withdraw")
            _call(
                base, "POST", f"/requests/{held['id']}/cancel", {"reason": "only a demonstration"}
            )
            second = _call(base, "POST", "/predict", {"model": "digits", "inputs": picture})
            envelope = _call(base, "GET", f"/requests/{sent['id']}/certificate")
    finally:
        crew.stop()
    weights = service.current_folder(service.current("digits"))
    assert weights is not None
    paths = {
        "weights": weights,
        "certificate": folder / "certificate.json",
        "keys": service.keys / "keys.json",
        "ledger": folder / "ledger.jsonl",
    }
    paths["certificate"].write_text(certificate.text(envelope))
    ledger.export(service.database.engine, paths["ledger"], sign=service.key())
    verdict = certificate.verify(envelope, KeySet.read(paths["keys"]), paths["weights"])
    wrong = ledger.verify(service.database.engine)
    service.close()
    if not verdict.ok or wrong or done["state"] != "released":
        raise ExpungeError("the story did not end well: " + "; ".join([*verdict.faults, *wrong]))
    for sentence in verdict.sentences:
        say(f"  {sentence}")
    return {
        **{name: str(path) for name, path in paths.items()},
        "policy": str(file), "request": sent["id"], "accuracy": before,
        "versions": [first["version"], second["version"]],
        "weights_before": first["weights"], "weights_after": second["weights"],
        "train_seconds": round(trained, 1), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


class _Server:
    """The HTTP interface in a thread, on a free port of this machine."""

    def __init__(self, service: Any) -> None:
        import uvicorn

        from expunge.service.api import create_app

        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(service), log_config=None, access_log=False, proxy_headers=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()


def _call(base: str, method: str, path: str, body: Any = None, key: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
    asked = urllib.request.Request(base + path, data, headers, method=method)
    for left in (2, 1, 0):
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ExpungeError(f"{path}: {json.loads(error.read())['detail']}") from error
        except urllib.error.URLError as error:  # the server has just been started
            if not left:
                raise ExpungeError(f"{path}: {error.reason}") from error
            time.sleep(0.5)
    return None


def _wait(base: str, request: str, began: float, say: Say) -> dict[str, Any]:
    """Wait until a request ends, or waits for approval."""
    state = ""
    while time.monotonic() - began < PATIENCE:
        row: dict[str, Any] = _call(base, "GET", f"/requests/{request}")
        if row["state"] != state:
            state = row["state"]
            say(f"  {request[:12]}… {state}")
        if state in ("released", "rejected", "failed", "cancelled"):
            return row
        if state == "planned" and row["hold"]:
            return row
        time.sleep(0.1)
    raise ExpungeError(f"request {request} is still {state}; is the machine very busy?")

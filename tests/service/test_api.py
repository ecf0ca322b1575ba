"""The HTTP interface in process: answers, authentication, limits, and what a fuzzer finds."""

from __future__ import annotations

import json

import httpx
import pytest
from stepping import step_until_done

from expunge.service.api import create_app

LOOPBACK = ("127.0.0.1", 5000)
ELSEWHERE = ("203.0.113.9", 5000)
TOKEN = "a-token-that-is-long-enough"


def client(app, address=LOOPBACK, **headers):
    return Called(app, address, headers)


class Called:
    """A synchronous client over ASGI from an address."""

    def __init__(self, app, address, headers):
        self._transport = httpx.ASGITransport(app, client=address, raise_app_exceptions=True)
        self._headers = headers

    def __getattr__(self, verb):
        def call(path, **more):
            import asyncio

            async def go():
                async with httpx.AsyncClient(
                    transport=self._transport, base_url="http://127.0.0.1", headers=self._headers
                ) as one:
                    return await getattr(one, verb)(path, **more)

            return asyncio.run(go())

        return call


@pytest.fixture
def app(service):
    return create_app(service)


def test_a_request_from_submission_to_certificate(service, app, tmp_path):
    call = client(app)
    sent = {"model": "fake", "ids": [1, 2, 3], "reason": "asked by mail"}
    first = call.post("/requests", json=sent, headers={"Idempotency-Key": "one"})
    assert first.status_code == 202 and first.headers["location"].endswith(first.json()["id"])
    again = call.post("/requests", json=sent, headers={"Idempotency-Key": "one"})
    assert again.status_code == 200 and again.json()["id"] == first.json()["id"]
    other = call.post("/requests", json=sent | {"ids": [4]}, headers={"Idempotency-Key": "one"})
    assert other.status_code == 422 and "idempotency key" in other.json()["detail"]
    path = f"/requests/{first.json()['id']}"
    assert call.get(path + "/certificate").status_code == 404
    step_until_done(service)
    found = call.get(path).json()
    assert found["state"] == "released" and found["samples"] == 3 and found["certificate"]
    assert call.get(path[:-10]).json() == found  # by a unique beginning
    assert call.get(path + "/plan").json()["plan"]["samples"] == 3
    envelope = call.get(path + "/certificate").json()
    from expunge.report.certificate import read, verify
    from expunge.report.keys import KeySet, PublicKey

    keys = KeySet(tuple(PublicKey(**k) for k in call.get("/keys").json()["keys"]))
    assert verify(envelope, keys).ok
    file = tmp_path / "certificate.json"  # as curl writes it
    file.write_bytes(call.get(path + "/certificate").content)
    assert read(file) == envelope
    assert [r["id"] for r in call.get("/requests?state=released").json()] == [found["id"]]
    assert call.get("/requests?state=failed").json() == []


HTML, PDF, JSON = "text/html; charset=utf-8", "application/pdf", "application/json"


@pytest.mark.parametrize(("suffix", "accept", "kind"), [
    ("", "*/*", JSON), ("", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", HTML),
    ("", "application/pdf", PDF), ("", "application/json;q=0.4, application/pdf;q=0.5", PDF),
    ("", "text/*", HTML), ("", "*/*;q=0.1, application/json;q=0, text/html", HTML), ("", "image/png", JSON),
    ("", "text/html;q=x, application/pdf;q=0.001", PDF), (".html", "application/json", HTML), (".pdf", "*/*", PDF),
])  # fmt: skip
def test_a_certificate_is_a_page_for_people_too(service, app, suffix, accept, kind):
    pytest.importorskip("typst") if kind == PDF else None
    call = client(app)
    one = call.post("/requests", json={"model": "fake", "ids": [1, 2]}).json()["id"]
    path = f"/requests/{one}/certificate{suffix}"
    assert call.get(path, headers={"Accept": accept}).status_code == 404  # not released yet
    step_until_done(service)
    found = call.get(path, headers={"Accept": accept})
    assert found.status_code == 200 and found.headers["content-type"] == kind
    assert (
        found.headers["vary"] == "Accept" and found.headers["x-content-type-options"] == "nosniff"
    )
    closed = found.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in closed
    # a browser's viewer of PDFs is a page of its own, which neither of these would let work
    assert all((part in closed) == (kind != PDF) for part in ("default-src 'none'", "sandbox"))
    ending = {HTML: "html", PDF: "pdf", JSON: "json"}[kind]
    assert found.headers["content-disposition"].endswith(f'"certificate-{one}.{ending}"')
    if kind == PDF:
        assert found.content.startswith(b"%PDF-")
    if kind == HTML:
        assert one in found.text and "<script" not in found.text and "verify FILE" in found.text
        from expunge.report.certificate import fingerprint

        assert fingerprint(service.get(one)["certificate"]) in found.text  # drawn from this one


@pytest.mark.parametrize("path", ["certificate", "certificate.html", "certificate.pdf"])
def test_its_pages_need_the_token_as_it_does(service, path):
    app = create_app(service, TOKEN)
    right = client(app, ELSEWHERE, Authorization=f"Bearer {TOKEN}")
    one = right.post("/requests", json={"model": "fake", "ids": [1]}).json()["id"]
    step_until_done(service)
    for address in (LOOPBACK, ELSEWHERE):
        answer = client(app, address).get(f"/requests/{one}/{path}")
        assert answer.status_code == 401 and one not in answer.text
    assert client(create_app(service), ELSEWHERE).get(f"/requests/{one}/{path}").status_code == 401
    assert right.get(f"/requests/{one}/{path}").status_code == 200
    assert right.get(f"/requests/../{path}").status_code in (404, 422)


def test_without_typst_a_pdf_is_not_acceptable(service, app, monkeypatch):
    import sys

    from expunge.service import pages

    pages._drawn.cache_clear()
    monkeypatch.setitem(sys.modules, "typst", None)
    call = client(app)
    one = call.post("/requests", json={"model": "fake", "ids": [1]}).json()["id"]
    step_until_done(service)
    answer = call.get(f"/requests/{one}/certificate.pdf")
    assert answer.status_code == 406 and "expunge[pdf]" in answer.json()["detail"]
    assert call.get(f"/requests/{one}/certificate.html").status_code == 200


def test_what_was_asked_is_nowhere_in_the_answers(service, app):
    call = client(app)
    sent = {"model": "fake", "ids": ["Alice Smith", 987654]}
    one = call.post("/requests", json=sent).json()["id"]
    step_until_done(service)
    texts = [call.get(p).text for p in (f"/requests/{one}", "/requests", "/ledger", f"/requests/{one}/plan", f"/requests/{one}/events", "/metrics")]  # fmt: skip
    assert not any(word in text for text in texts for word in ("Alice", "987654"))
    raw = b"".join(p.read_bytes() for p in service.policy.file.parent.glob("service.db*"))
    assert one.encode() in raw and b"2 of the 2 samples" in raw
    # the entry of the workflow engine holds the request's identifier alone
    import sqlalchemy as sa

    with service.database.engine.connect() as connection:
        tables = connection.execute(sa.text("SELECT name FROM sqlite_master WHERE type='table'")).scalars().all()  # fmt: skip
        for table in tables:
            rows = connection.execute(sa.text(f'SELECT * FROM "{table}"')).all()
            assert "Alice" not in str(rows) and "987654" not in str(rows), table


def test_approval_and_withdrawal(service, app):
    call = client(app)
    held, gone = (call.post("/requests", json={"model": "held", "ids": [n]}).json()["id"] for n in (1, 2))  # fmt: skip
    early = call.post(f"/requests/{held}/approve")
    assert early.status_code == 409 and "does not wait" in early.json()["detail"]
    step_until_done(service)
    assert call.get(f"/requests/{held}").json()["state"] == "planned"
    assert call.post(f"/requests/{gone}/cancel", json={"reason": "a mistake"}).json()["state"] == "cancelled"  # fmt: skip
    assert call.post(f"/requests/{gone}/cancel").json()["state"] == "cancelled"  # twice is once
    assert call.post(f"/requests/{gone}/approve").status_code == 409
    assert call.post(f"/requests/{held}/approve").json()["state"] == "approved"
    assert call.post(f"/requests/{held}/approve").json()["state"] == "approved"
    step_until_done(service)
    assert call.get(f"/requests/{held}").json()["state"] == "released"
    assert call.post(f"/requests/{held}/cancel").status_code == 409
    assert call.get(f"/requests/{gone}").json()["state"] == "cancelled"


def test_events_tell_every_state(service, app):
    call = client(app)
    one = call.post("/requests", json={"model": "fake", "ids": [5]}).json()["id"]
    step_until_done(service)
    text = call.get(f"/requests/{one}/events").text
    told = [
        json.loads(line[6:])["state"] for line in text.splitlines() if line.startswith("data: ")
    ]
    assert told == ["received", "resolved", "planned", "running", "audited", "released"]
    text = call.get(f"/requests/{one}/events", headers={"Last-Event-ID": "4"}).text
    told = [
        json.loads(line[6:])["state"] for line in text.splitlines() if line.startswith("data: ")
    ]
    assert told == ["audited", "released"]


def test_predictions_follow_the_release(service, app):
    call = client(app)

    def ask():
        return call.post("/predict", json={"model": "fake", "inputs": [[1.0], [2.0]]})

    assert ask().json()["outputs"] == [[1.0], [2.0]] and ask().json()["version"] == 0
    call.post("/requests", json={"model": "fake", "ids": [7, 8]})
    step_until_done(service)
    after = ask().json()
    assert after["outputs"] == [[3.0], [4.0]] and after["version"] == 1
    assert call.get("/models").json()[0]["weights"] == after["weights"]
    wrong = call.post("/predict", json={"model": "fake", "inputs": [[1.0], "x"]})
    assert wrong.status_code == 422


def test_without_a_token_only_this_machine_is_served(app):
    assert client(app).get("/requests").status_code == 200
    answer = client(app, ELSEWHERE).get("/requests")
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert client(app, ELSEWHERE).get("/health").status_code == 200
    assert client(app, None).get("/requests").status_code == 401
    assert client(app, ELSEWHERE, **{"X-Forwarded-For": "127.0.0.1"}).get("/requests").status_code == 401  # fmt: skip


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "Via"])
def test_without_a_token_nobody_comes_in_through_a_proxy(service, app, header):
    through = client(app, LOOPBACK, **{header: "127.0.0.1"})
    assert through.get("/requests").status_code == 401  # whoever called the proxy may be anywhere
    assert through.get("/health").status_code == 200
    token = {"Authorization": f"Bearer {TOKEN}", header: "203.0.113.9"}
    assert client(create_app(service, TOKEN), LOOPBACK, **token).get("/requests").status_code == 200


def test_a_page_of_another_address_may_not_call(app):
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Origin": "https://evil.example"},
                    {"Host": "[::1]evil.example"}, {"Host": "127.0.0.1.evil.example"}, {"Origin": "null"},
                    {"Origin": "http://localhost@evil.example"}, {"Origin": "http://[::1"}):  # fmt: skip
        assert client(app, **headers).get("/requests").status_code == 403, headers
    for headers in ({"Host": "localhost:8077"}, {"Host": "[::1]:8077"}, {"Origin": "http://127.0.0.1:8077"},
                    {"Origin": "http://[::1]"}, {"Host": "localhost"}):  # fmt: skip
        assert client(app, **headers).get("/requests").status_code == 200, headers


def test_with_a_token_everybody_needs_it(service):
    app = create_app(service, TOKEN)
    for address in (LOOPBACK, ELSEWHERE):
        assert client(app, address).get("/requests").status_code == 401
        for wrong in ("Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", TOKEN):
            assert client(app, address, Authorization=wrong).get("/requests").status_code == 401
        right = client(app, address, Authorization=f"Bearer {TOKEN}")
        assert right.get("/requests").status_code == 200
        assert client(app, address).get("/metrics").status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/requests/../../etc/passwd", "/requests/..%2f..%2fetc%2fpasswd", "/requests/%2e%2e/certificate",
     "/requests/01%00/plan", "/requests/" + "a" * 5000, "/requests/..", "/requests/'; DROP TABLE x"],
)  # fmt: skip
def test_no_path_leads_elsewhere(app, path):
    assert 400 <= client(app).get(path).status_code < 500
    assert 400 <= client(app).post(path + "/cancel").status_code < 500


@pytest.mark.parametrize("model", ["../fake", "fake/../fake", "FAKE", "", "x" * 100, "none"])
def test_no_model_leads_elsewhere(app, model):
    for path, body in (("/requests", {"ids": [1]}), ("/predict", {"inputs": [[1]]})):
        answer = client(app).post(path, json={"model": model, **body})
        assert answer.status_code in (404, 422)
    answer = client(app).get("/requests", params={"model": model + "\0"})
    assert answer.status_code == 422  # Postgres holds no such text


def test_a_large_body_is_refused_by_its_length_and_while_it_comes(app):
    called = []

    async def body():
        for _ in range(100):
            called.append(1)
            yield b"x" * 1_000_000

    headers = {"Content-Type": "application/json"}
    answer = client(app).post("/requests", content=body(), headers={**headers, "Content-Length": "100000000"})  # fmt: skip
    assert answer.status_code == 413
    called.clear()
    answer = client(app).post("/requests", content=body(), headers=headers)
    assert answer.status_code == 413 and "1000000 bytes" in answer.json()["detail"]
    assert client(app).post("/requests", content=b"{}", headers={**headers, "Content-Length": "-5"}).status_code == 400  # fmt: skip


@pytest.mark.parametrize("body", [
    b"[" * 100_000 + b"]" * 100_000, b'{"model": "fake", "inputs": ' + b"[" * 90_000 + b"1" + b"]" * 90_000 + b"}",
    b'{"model": "fake", "inputs": [1e999]}', b'{"model": "fake", "ids": [1' + b"0" * 5000 + b"]}",
    b"\xff\xfe", b"{", b"null", b'{"model": "fake", "ids": [true]}', b'{"model": "fake", "ids": [1.5]}',
    b'{"model": "fake", "ids": []}', b'{"model": "fake"}', b'{"model": "fake", "ids": [1], "label": [2]}',
    b'{"model": "fake", "ids": ["\\u0000"]}', b'{"model": "fake", "where": "\\ud800"}',
])  # fmt: skip
def test_bodies_that_are_none_of_ours(app, body):
    for path in ("/requests", "/predict"):
        answer = client(app).post(path, content=body, headers={"Content-Type": "application/json"})
        assert 200 <= answer.status_code < 500, answer.text
        if not (path == "/predict" and b"1e999" in body) and b"u0000" not in body:
            assert answer.status_code >= 400


def test_who_calls_too_often_has_to_wait(policy, monkeypatch):
    from expunge.service.policy import read_policy
    from expunge.service.service import Service

    policy.write_text(policy.read_text().replace("per_second = 100000\nburst = 100000", "per_second = 0.5\nburst = 3"))  # fmt: skip
    made = Service(read_policy(policy), patience=5)
    call = client(create_app(made))
    codes = [call.get("/requests").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    assert int(call.get("/requests").headers["retry-after"]) >= 1
    assert call.get("/health").status_code == 200
    made.close()


def test_the_database_away_is_said(service, app, monkeypatch):
    import sqlalchemy as sa

    service.database.patience = 0.2

    def away(*_):
        raise sa.exc.OperationalError("", {}, Exception("connection refused"))

    monkeypatch.setattr(service.database._reader, "begin", away)
    answer = client(app).get("/requests")
    assert answer.status_code == 503 and "does not answer" in answer.json()["detail"]
    assert client(app).get("/ready").status_code == 503
    assert client(app).get("/health").status_code == 200


def test_metrics_speak_of_routes_not_of_identifiers(service, app):
    call = client(app)
    one = call.post("/requests", json={"model": "fake", "ids": [1]}).json()["id"]
    call.get(f"/requests/{one}")
    call.get("/nowhere/at/all")
    text = call.get("/metrics").text
    assert 'route="/requests/{identifier}",status="200"' in text and one not in text
    assert "nowhere" not in text and 'expunge_requests{model="fake",state="received"} 1.0' in text

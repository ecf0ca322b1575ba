"""The OpenAPI document, and a fuzzer that calls what it describes: no answer is a 5xx.

EXPUNGE_FUZZ sets the number of examples for each operation; the acceptance run takes more.
"""

from __future__ import annotations

import os

import pytest
from fakes import FakeDeleter  # noqa: F401  the policy imports it by name
from stepping import step_until_done

import expunge as xp
from expunge.service.api import create_app
from expunge.service.service import Service

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402

TOKEN = "a-token-for-the-fuzzer"
EXAMPLES = int(os.environ.get("EXPUNGE_FUZZ", "8"))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    from policy_text import POLICY

    file = tmp_path_factory.mktemp("fuzz") / "service.toml"
    file.write_text(POLICY)
    service = Service(file, patience=5)
    service.submit("fake", xp.forget(ids=[1]))
    step_until_done(service)
    yield schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(service, TOKEN), headers={"Authorization": f"Bearer {TOKEN}"}
    )
    service.close()


OPERATIONS = 17


@pytest.mark.parametrize("number", range(OPERATIONS))
def test_no_call_makes_a_server_error(fuzzed, number):
    operations = [found.ok() for found in fuzzed.get_all_operations()]
    assert len(operations) == OPERATIONS
    operation = operations[number]
    documented = {str(s) for s in operation.definition.raw["responses"]} | {"405"}

    @given(case=operation.as_strategy())
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)  # fmt: skip
    def call(case):
        answer = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
        assert answer.status_code < 500, answer.text
        assert str(answer.status_code) in documented, answer.text
        case.validate_response(answer, checks=[schemathesis.checks.not_a_server_error])

    call()


def test_the_document_describes_every_route(service):
    document = create_app(service).openapi()
    found = {(method, path) for path, verbs in document["paths"].items() for method in verbs}
    one = "/requests/{identifier}"
    assert found == {
        ("post", "/requests"), ("get", "/requests"), ("get", one), ("get", f"{one}/plan"),
        ("post", f"{one}/approve"), ("post", f"{one}/cancel"), ("get", f"{one}/events"),
        ("get", f"{one}/certificate"), ("get", f"{one}/certificate.html"),
        ("get", f"{one}/certificate.pdf"), ("get", "/ledger"), ("get", "/keys"), ("get", "/models"),
        ("post", "/predict"), ("get", "/health"), ("get", "/ready"), ("get", "/metrics"),
    }  # fmt: skip
    for path, verbs in document["paths"].items():
        for method, operation in verbs.items():
            assert operation.get("description"), f"{method} {path} is undocumented"

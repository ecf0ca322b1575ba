"""Certificates of the service: each says what was done and measured for its own request, and no more."""

from __future__ import annotations

from stepping import step_until_done

import expunge as xp
from expunge.report.certificate import statement_of
from expunge.service import ledger


def submit(service, **form):
    return service.submit("fake", xp.forget(**form))[0]["id"]


def predicate_of(service, one):
    return statement_of(service.get(one)["certificate"])["predicate"]


def test_a_repeated_request_is_not_credited_with_the_audits_of_another(service):
    submit(service, ids=[1])
    step_until_done(service)
    second = submit(service, ids=[2])
    step_until_done(service)
    again = submit(service, ids=[1])  # the version in force was made, and audited, for 2
    step_until_done(service)
    assert predicate_of(service, second)["findings"]
    predicate = predicate_of(service, again)
    assert predicate["findings"] == [] and predicate["verdict"] is None
    assert "No audit was run." in predicate["says"] and "nothing was done" in predicate["says"][1]
    assert "No audit was run for this request" in predicate["untested"][0]


def test_a_request_that_shared_a_batch_says_so(service):
    alone = submit(service, ids=[9])
    step_until_done(service)
    some = [submit(service, ids=[n]) for n in range(3)]
    step_until_done(service)
    assert predicate_of(service, alone)["untested"] == []
    for one in some:
        assert "looked at 3 at once" in predicate_of(service, one)["untested"][-1]


def test_commitments_cover_what_was_deleted_before_too(service):
    submit(service, ids=[1])
    step_until_done(service)
    one = submit(service, ids=[1, 2, 3])
    step_until_done(service)
    row, predicate = service.get(one), predicate_of(service, one)
    assert row["count"] == 2 and row["plan"]["samples"] == 2
    with service.database.engine.connect() as connection:
        salt = ledger.salt_of(connection, one)
    assert predicate["commitments"]["records"] == ledger.commitments(salt, [1, 2, 3])

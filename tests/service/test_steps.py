"""Steps of the workflows without their engine: every answer, and nothing changes when one runs again."""

from __future__ import annotations

from collections import Counter

import pytest
import sqlalchemy as sa
import stepping
from stepping import run_batch, step_until_done

import expunge as xp
from expunge.core.errors import ExpungeError, RequestError
from expunge.report.certificate import statement_of
from expunge.report.keys import Keys
from expunge.service import batches, ledger, requests, states, steps, tables, versions
from expunge.service.errors import Conflict, NotFound, Reused
from expunge.service.service import Service


def submit(service, model="fake", key=None, **form):
    return service.submit(model, xp.forget(**form), key=key)[0]["id"]


def history(service, one):
    return [h["state"] for h in service.database.read(lambda c: requests.history_of(c, one))]


def history_notes(service, one):
    return [h["note"] for h in service.database.read(lambda c: requests.history_of(c, one))]


def waiting(service):
    return service.database.read(stepping._look)[1]


def entries(service):
    with service.database.engine.connect() as connection:
        return list(ledger.entries(connection))


WHOLE = ["received", "resolved", "planned", "running", "audited", "released"]


@pytest.fixture
def with_settings(policy):
    made = []

    def opened(settings="", more=""):
        text = policy.read_text().replace(
            'deleter = "fakes:make"\n', f'deleter = "fakes:make"\nsettings = {{ {settings} }}\n{more}\n', 1
        )  # fmt: skip
        policy.write_text(text)
        made.append(Service(policy, patience=5))
        return made[-1]

    yield opened
    for one in made:
        one.close()


def test_requests_that_wait_are_carried_out_by_one_deletion(with_settings, tmp_path):
    service = with_settings(f'log = "{tmp_path / "log"}"')
    ones = [submit(service, ids=[n, n + 1]) for n in range(0, 20, 2)]
    step_until_done(service)
    assert all(history(service, one) == WHOLE for one in ones)
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    assert service.current("fake")["version"] == 1
    rows = [service.get(one) for one in ones]
    assert len({r["batch"] for r in rows}) == 1 and all(r["result"]["samples"] == 20 for r in rows)
    records = [statement_of(r["certificate"])["predicate"]["request"]["records"] for r in rows]
    assert records == [2] * 10  # each certificate speaks of its own request


def test_every_step_may_run_again(service, monkeypatch):
    for name in ("resolve", "plan", "claim", "forget", "audit", "release", "clean"):
        once = getattr(steps, name)

        def twice(*arguments, once=once, name=name):
            first = once(*arguments)
            second = once(*arguments)
            # a release has purged what was asked; what it answered first was written down
            assert second == first or name in ("resolve", "plan", "clean", "release")
            return first

        monkeypatch.setattr(steps, name, twice)
    ones = [submit(service, ids=[n]) for n in range(3)]
    step_until_done(service)
    assert all(history(service, one) == WHOLE for one in ones)
    kinds = Counter((e.kind, e.request) for e in entries(service) if e.kind in states.STATES)
    assert set(kinds.values()) == {1} and len(kinds) == 3 * len(WHOLE)
    assert service.current("fake")["version"] == 1


def test_the_second_of_two_requests_for_the_same_samples_is_answered(service):
    first, second = submit(service, ids=[1, 2]), submit(service, ids=[2, 1])
    step_until_done(service)  # both in one batch
    third = submit(service, ids=[1])
    step_until_done(service)
    assert [service.get(one)["state"] for one in (first, second, third)] == ["released"] * 3
    assert service.current("fake")["version"] == 1
    row = service.get(third)
    assert row["result"] == {"outcome": "already-deleted", "version": 1}
    statement = statement_of(row["certificate"])
    assert statement["subject"][-1]["digest"] == {
        "expungeTensors": service.current("fake")["weights"]
    }


def test_planned_beside_a_deletion_of_the_same_samples(service):
    first = submit(service, ids=[1, 2])
    steps.resolve(service, first), steps.plan(service, first)
    (batch,) = waiting(service)
    steps.claim(service, batch)
    second = submit(service, ids=[1])  # planned while the first is being deleted
    steps.resolve(service, second), steps.plan(service, second)
    made = steps.forget(service, batch, "policy")
    steps.release(service, batch, "policy", made, steps.audit(service, batch, "policy"))
    step_until_done(service)
    row = service.get(second)
    assert row["state"] == "released" and row["result"]["outcome"] == "already-deleted"
    assert service.current("fake")["version"] == 1
    assert statement_of(row["certificate"])["predicate"]["method"]["name"] == "fake"


def test_an_idempotency_key_asks_once(service):
    one = submit(service, ids=[1], key="k")
    assert submit(service, ids=[1], key="k") == one
    with pytest.raises(Reused):
        submit(service, ids=[2], key="k")
    with pytest.raises(Reused):
        submit(service, "held", ids=[1], key="k")
    step_until_done(service)
    # what it named was purged; the key still stands for it
    assert submit(service, ids=[1], key="k") == one
    assert Counter(e.kind for e in entries(service))["received"] == 1


def test_what_was_named_is_gone_when_a_request_ends(service):
    one, two, three = submit(service, ids=[41]), submit(service, ids=[10**9]), submit(service, "held", ids=[43])  # fmt: skip
    step_until_done(service)
    service.cancel(three)
    with service.database.engine.connect() as connection:
        for request in (one, two, three):
            assert ledger.kept(connection, request) is None
            assert ledger.salt_of(connection, request) is not None  # to show who was covered
            with pytest.raises(Conflict, match="has ended"):
                requests.selector_of(connection, request)
        assert batches.ids_of(connection, [one, two, three]) == []
        salt = ledger.salt_of(connection, one)
    predicate = statement_of(service.get(one)["certificate"])["predicate"]
    assert predicate["commitments"]["records"] == ledger.commitments(salt, [41])


@pytest.mark.parametrize(
    ("form", "says"),
    [({"ids": [10**6]}, "1 of the 1 samples it names are unknown"),
     ({"ids": [1, 10**6]}, "1 of the 2"), ({"ids": list(range(1000))}, "all the data"),
     ({"label": 55}, "no sample"), ({"where": "label == 77"}, "covers no sample"),
     ({"where": "name == 'Ann'"}, "no column"), ({"user": "u"}, "cannot be selected by user")],
)  # fmt: skip
def test_answers_that_are_no(service, form, says):
    one = submit(service, **form)
    step_until_done(service)
    row = service.get(one)
    assert row["state"] == "rejected" and says in row["error"], row["error"]
    assert history(service, one) == ["received", "rejected"]
    (entry,) = [e for e in entries(service) if e.kind == "rejected"]
    assert entry.content["why"] == row["error"] and "Ann" not in entry.body


@pytest.mark.parametrize(
    "where", ["Miller == 3", 'label == "Miller"', "a.Miller == 1", "Miller ==", "label == Miller", "Miller@x"]
)  # fmt: skip
def test_no_word_of_a_condition_stays_in_ledger_or_answer(service, where):
    one = submit(service, where=where)
    step_until_done(service)
    assert service.get(one)["state"] == "rejected"
    kept = "".join(e.body for e in entries(service)) + str(service.get(one)) + str(history_notes(service, one))  # fmt: skip
    assert "Miller" not in kept


def test_no_sample_stays_in_the_ledger_when_something_fails(service):
    one = submit(service, user="Miller")
    steps.fail_request(service, one, "KeyError: 'Miller'")
    two = submit(service, ids=[777])
    steps.resolve(service, two)
    steps.fail_request(service, two, "IndexError: no 777")
    three, batch, _ = written(service, 777)
    steps.give_back(service, batch, "IndexError: index 777 is out of bounds for size 600")
    assert service.get(three)["error"] == "IndexError: index … is out of bounds for size 600"
    kept = "".join(e.body for e in entries(service))
    assert "Miller" not in kept and "777" not in kept


def test_the_words_of_a_withdrawal_are_not_in_the_ledger(service):
    one = submit(service, "held", ids=[1])
    service.cancel(one, "Ann Miller changed her mind")
    assert history_notes(service, one)[-1] == {"why": "Ann Miller changed her mind"}
    assert "Miller" not in "".join(e.body for e in entries(service))


@pytest.mark.parametrize("form", [{"label": 10**30}, {"ids": [1], "reason": "a\0b"}])
def test_what_no_database_could_hold_is_refused_at_once(service, form):
    with pytest.raises(RequestError):
        submit(service, **form)
    assert entries(service) == []


def test_unknown_samples_may_be_reported_instead(with_settings):
    service = with_settings(more='unknown = "report"')
    one, none = submit(service, ids=[1, 10**6]), submit(service, ids=[10**6])
    step_until_done(service)
    row = service.get(one)
    assert row["state"] == "released" and row["count"] == 1
    note = service.database.read(lambda c: requests.history_of(c, one))[1]["note"]
    assert note["unknown"] == 1 and service.get(none)["state"] == "rejected"


def test_one_request_that_cannot_be_carried_out_harms_no_other(with_settings):
    service = with_settings("poison = [5]")
    ones = [submit(service, ids=[n]) for n in (4, 5, 6)]
    step_until_done(service)
    found = [service.get(one) for one in ones]
    assert [r["state"] for r in found] == ["released", "failed", "released"]
    assert "cannot be deleted" in found[1]["error"]
    assert history(service, ones[1]) == ["received", "resolved", "planned", "running", "planned", "running", "failed"]  # fmt: skip
    assert [r["attempt"] for r in found] == [2, 2, 2] and service.current("fake")["version"] == 2
    assert sorted(p.name for p in service.versions("fake").iterdir()) == [service.current("fake")["folder"]]  # fmt: skip
    assert ledger.verify(service.database.engine) == []


def test_a_held_request_that_failed_with_others_keeps_its_approval(with_settings):
    service = with_settings("poison = [5]", "hold = true")
    ones = [submit(service, ids=[n]) for n in (4, 5)]
    step_until_done(service)
    for one in ones:
        service.approve(one)
    step_until_done(service)
    assert [service.get(one)["state"] for one in ones] == ["released", "failed"]


AUDITED = 'limits = { "fake/auc" = { gap = 0.1 } }\nif_audits_fail = '


def test_audits_that_fail_lead_to_retraining(with_settings):
    service = with_settings("audits = { policy = 0.9, retrain = 0.5 }", AUDITED + '"retrain"')
    one = submit(service, ids=[1])
    step_until_done(service)
    assert history(service, one) == [*WHOLE[:4], "audited", "running", "audited", "released"]
    row = service.get(one)
    assert row["result"]["how"] == "retrain" and service.current("fake")["folder"].endswith(
        "-retrain"
    )
    assert len(list(service.versions("fake").iterdir())) == 1


def test_audits_that_fail_lead_to_a_rejection(with_settings):
    service = with_settings("audits = { policy = 0.9, retrain = 0.5 }", AUDITED + '"reject"')
    one = submit(service, ids=[1])
    step_until_done(service)
    row = service.get(one)
    assert row["state"] == "rejected" and "farther than 0.1" in row["error"]
    assert service.current("fake") is None and not list(service.versions("fake").iterdir())


def test_another_version_in_force_is_never_overwritten(service):
    one = submit(service, ids=[1])
    steps.resolve(service, one), steps.plan(service, one)
    (batch,) = waiting(service)
    steps.claim(service, batch)
    made = steps.forget(service, batch, "policy")
    found = steps.audit(service, batch, "policy")
    service.database.write(lambda c: requests.lock_model(c, "fake"))
    import sqlalchemy as sa

    from expunge.service.tables import models

    service.database.write(lambda c: c.execute(sa.update(models).values(version=7)))
    with pytest.raises(ExpungeError, match="another version came into force"):
        steps.release(service, batch, "policy", made, found)
    assert service.get(one)["state"] == "running" and service.get(one)["certificate"] is None


def test_batches_take_no_more_than_they_may(with_settings):
    service = with_settings(more="batch_requests = 3")
    ones = [submit(service, ids=[n]) for n in range(8)]
    step_until_done(service)
    sizes = sorted(Counter(service.get(one)["batch"] for one in ones).values())
    assert sizes == [2, 3, 3]


def test_identifiers_by_their_beginning(service):
    one = submit(service, ids=[1])
    assert service.get(one[:20])["id"] == one
    two = submit(service, ids=[2])
    with pytest.raises(NotFound, match="several"):
        service.get(one[:2])
    for bad in ("zzzz", "../x", "%", "", "0' OR 1=1", two + "0"):
        with pytest.raises(NotFound):
            service.get(bad)


def test_cancelling_while_it_is_carried_out_is_refused(service):
    one = submit(service, ids=[1])
    steps.resolve(service, one), steps.plan(service, one)
    (batch,) = waiting(service)
    steps.claim(service, batch)
    with pytest.raises(Conflict, match="running"):
        service.cancel(one)
    other = submit(service, ids=[2])
    service.cancel(other, "a mistake")
    assert not steps.resolve(service, other)
    assert history(service, other) == ["received", "cancelled"]


def test_a_version_appears_whole_or_not_at_all(tmp_path):
    class Killed(BaseException):
        pass

    def half(folder):
        (folder / "a").write_text("a")
        raise Killed

    with pytest.raises(Killed):
        versions.make(tmp_path, "v", half)
    assert not list(tmp_path.iterdir())
    # what a process that was killed with -9 leaves
    (tmp_path / ".v.dead").mkdir()
    record = versions.make(tmp_path, "v", lambda f: (f / "a").write_text("a") and {"weights": "x"})
    assert [p.name for p in tmp_path.iterdir()] == ["v"] and versions.read(tmp_path / "v") == record
    again = versions.make(tmp_path, "v", half)  # not made again
    assert again == record
    assert versions.clean(tmp_path, lambda: []) == ["v"]


def test_certificates_form_a_chain(service):
    from expunge.report.certificate import fingerprint

    found = []
    for n in range(3):
        one = submit(service, ids=[n])
        step_until_done(service)
        found.append(service.get(one)["certificate"])
    named = [statement_of(c)["predicate"]["predecessor"] for c in found]
    assert named == [None, fingerprint(found[0]), fingerprint(found[1])]
    heads = [statement_of(c)["predicate"]["ledger"] for c in found]
    named = [ledger.Head(**h) for h in heads]
    assert ledger.verify(service.database.engine, named=named) == []


def test_run_batch_of_nothing_is_empty(service):
    one = submit(service, ids=[1])
    steps.resolve(service, one), steps.plan(service, one)
    service.cancel(one)
    (batch,) = waiting(service)
    assert run_batch(service, batch) == "empty"


def test_a_key_with_another_content_is_refused_after_the_end_too(service):
    one = submit(service, ids=[1], key="k")
    step_until_done(service)
    assert service.get(one)["state"] == "released"
    with pytest.raises(Reused):  # else the caller believes that 2 was deleted
        submit(service, ids=[2], key="k")
    assert submit(service, ids=[1], key="k") == one
    with service.database.engine.begin() as connection:
        ledger.purge(connection, one)
    with pytest.raises(Reused):  # nobody can tell any more what it asked for
        submit(service, ids=[1], key="k")


def test_a_key_stands_for_large_numbers_too(service):
    one = submit(service, ids=[2**60], key="k")
    assert submit(service, ids=[2**60], key="k") == one


def test_two_that_use_a_key_at_once_get_one_request(service, monkeypatch):
    first = submit(service, ids=[1], key="k")
    real, looks = requests.submit, []

    def blind(connection, identifier, *rest, key):
        looks.append(key)  # the other's row is not visible yet, as on Postgres
        if len(looks) == 1:
            connection.execute(
                requests.requests.insert().from_select(
                    list(requests.requests.c.keys()),
                    requests.requests.select().where(requests.requests.c.id == first),
                )
            )
        return real(connection, identifier, *rest, key=key)

    monkeypatch.setattr(requests, "submit", blind)
    assert submit(service, ids=[1], key="k") == first and len(looks) == 2


def written(service, *ids):
    """A batch for a request that is written and not yet audited."""
    one = submit(service, ids=list(ids))
    steps.resolve(service, one), steps.plan(service, one)
    (batch,) = waiting(service)
    steps.claim(service, batch)
    return one, batch, steps.forget(service, batch, "policy")


def test_a_version_that_vanished_passes_no_audit_and_is_not_released(service):
    one, batch, made = written(service, 1)
    found = steps.audit(service, batch, "policy")
    versions.clean(service.versions("fake"), lambda: [])
    with pytest.raises(ExpungeError, match="not there"):
        steps.audit(service, batch, "policy")
    with pytest.raises(ExpungeError, match="not there"):
        steps.release(service, batch, "policy", made, found)
    assert service.current("fake") is None and service.get(one)["state"] == "running"


def test_a_late_cleaning_spares_what_another_batch_has_written(service, monkeypatch):
    one = submit(service, ids=[1])
    step_until_done(service)
    old = service.get(one)["batch"]
    _, batch, made = written(service, 2)
    parent = service.versions("fake")
    draft = parent / f".{batch}-retrain.abcd"
    draft.mkdir()
    assert steps.clean(service, old) == [] and draft.exists()
    # it stood still while the other one was released
    read = service.database.read

    def late(work, **more):
        if work.__name__ == "keep":
            steps.release(service, batch, "policy", made, steps.audit(service, batch, "policy"))
        return read(work, **more)

    monkeypatch.setattr(service.database, "read", late)
    steps.clean(service, old)
    assert service.current_folder(service.current("fake")).is_dir()
    monkeypatch.undo()
    steps.clean(service, batch)
    assert [p.name for p in parent.iterdir()] == [made["folder"]]


def test_a_version_that_went_away_while_it_was_read_is_tried_again(service, monkeypatch):
    from dbos import DBOS

    from expunge.core.errors import StoreError
    from expunge.service import workflow

    asked = []
    monkeypatch.setattr(DBOS, "run_step", lambda options, *_: asked.append(options["should_retry"]))
    workflow.bind(service)
    workflow._step("resolve", 3, steps.resolve, "x")
    (again,) = asked
    assert (
        again(StoreError("there is no model")) and again(OSError()) and not again(RequestError("x"))
    )


# ------------------------------------------------------------------ a key that signs, and parts of a large request


def without_key(service):
    keys = Keys(service.keys)
    keys.revoke(keys.signer().id, "lost")
    return keys


def test_while_no_key_can_sign_requests_wait_and_say_so(service):
    done = submit(service, ids=[1])
    step_until_done(service)
    keys = without_key(service)
    one, withdrawn, covered = (submit(service, ids=ids) for ids in ([2, 3], [4], [1]))
    for request in (one, withdrawn):
        assert steps.resolve(service, request)
        steps.plan(service, request)
    before = len(entries(service))
    assert steps.resolve(service, covered) is None  # its answer alone would need a signature
    (batch,) = waiting(service)
    for _ in range(2):  # as often as the workflow looks
        assert steps.claim(service, batch) == {"waits": True}
    for request, state in ((one, "planned"), (withdrawn, "planned"), (covered, "received")):
        row = service.get(request)
        assert row["state"] == state and "waits for a key" in row["error"]
        assert str(service.keys) not in row["error"]
    assert len(entries(service)) == before  # nothing happened that the ledger would tell
    assert service.public_keys()["keys"][0]["revoked"]  # can still be read
    assert service.cancel(withdrawn)["error"] is None
    new = keys.create()
    step_until_done(service)
    for request in (one, covered):
        row = service.get(request)
        assert row["state"] == "released" and row["error"] is None
        assert row["certificate"]["signatures"][0]["keyid"] == new.id
    assert (
        service.get(done)["state"] == "released" and service.get(withdrawn)["state"] == "cancelled"
    )


def test_a_key_that_is_revoked_under_way_keeps_the_old_version_in_force(service):
    submit(service, ids=[1])
    step_until_done(service)
    one = submit(service, ids=[2])
    assert steps.resolve(service, one)
    steps.plan(service, one)
    (batch,) = waiting(service)
    assert steps.claim(service, batch)["requests"] == [one]
    made = steps.forget(service, batch, "policy")
    found = steps.audit(service, batch, "policy")
    keys, before = without_key(service), service.current("fake")
    assert steps.release(service, batch, "policy", made, found) == {"waits": True}
    row = service.get(one)
    assert row["state"] == "running" and "waits for a key" in row["error"]
    assert service.current("fake") == before
    keys.create()
    assert steps.release(service, batch, "policy", made, found)["version"] == 2
    assert service.get(one)["state"] == "released" and service.get(one)["error"] is None


def holding(policy, more):
    policy.write_text(
        policy.read_text().replace(
            '[models.fake]\nkind = "custom"\n', f'[models.fake]\nkind = "custom"\n{more}\n'
        )
    )
    return Service(policy, patience=5)


def test_a_large_request_does_not_pass_in_small_parts(policy):
    service = holding(policy, "hold_above = 5")
    parts = [submit(service, ids=[3 * n, 3 * n + 1, 3 * n + 2]) for n in range(3)]
    small = submit(service, ids=[100])
    step_until_done(service)
    states_ = [service.get(one)["state"] for one in parts]
    # in the order in which they were planned: 3, then 6 with it
    assert sorted(states_) == ["planned", "planned", "released"]
    held = next(one for one in parts if service.get(one)["state"] == "planned")
    assert service.get(held)["hold"] and history_notes(service, held)[-1]["recent"] >= 3
    assert service.get(small)["state"] == "released"  # 4 in all
    service.approve(held, by="me")
    step_until_done(service)
    assert service.get(held)["state"] == "released"
    # what somebody has looked at is not counted; one more makes 5
    fifth, sixth = submit(service, ids=[200]), submit(service, ids=[201])
    step_until_done(service)
    assert sorted(service.get(one)["state"] for one in (fifth, sixth)) == ["planned", "released"]
    other = submit(service, model="held", ids=[1])  # another model's own
    step_until_done(service)
    assert "recent" not in history_notes(service, other)[-1]
    service.close()


def test_withdrawn_and_old_requests_are_not_counted(policy, monkeypatch):
    service = holding(policy, "hold_above = 5\nhold_hours = 1")
    gone = submit(service, ids=[1, 2, 3, 4])
    assert steps.resolve(service, gone)
    steps.plan(service, gone)
    service.cancel(gone)
    first, second = submit(service, ids=[5, 6, 7, 8]), submit(service, ids=[9, 10, 11])
    step_until_done(service)
    ended = {service.get(one)["state"]: one for one in (first, second)}
    assert set(ended) == {"released", "planned"}
    service.database.write(
        lambda c: c.execute(
            sa.update(tables.requests).values(updated="2020-01-01T00:00:00.000+00:00")
        )
    )
    third = submit(service, ids=[12, 13, 14, 15, 16])
    step_until_done(service)
    assert service.get(third)["state"] == "released"
    service.close()


def test_parts_that_lay_waiting_for_long_count_when_they_go_on(policy):
    service = holding(policy, "hold_above = 5\nhold_hours = 1")
    parts = [submit(service, ids=[3 * n, 3 * n + 1, 3 * n + 2]) for n in range(3)]
    service.database.write(  # no worker ran for a while
        lambda c: c.execute(
            sa.update(tables.requests).values(
                created="2020-01-01T00:00:00.000+00:00", updated="2020-01-01T00:00:00.000+00:00"
            )
        )
    )
    step_until_done(service)
    found = sorted(service.get(one)["state"] for one in parts)
    assert found == ["planned", "planned", "released"]
    service.close()


def test_one_that_was_withdrawn_meanwhile_waits_for_no_key(service, monkeypatch):
    one = submit(service, ids=[1])
    step_until_done(service)
    keys = without_key(service)
    again = submit(service, ids=[1])
    cannot = steps.certificates

    def late(*given, **more):
        service.cancel(again)  # between the look and the note
        return cannot(*given, **more)

    monkeypatch.setattr(steps, "certificates", late)
    assert steps.resolve(service, again) is None
    row = service.get(again)
    assert row["state"] == "cancelled" and row["error"] is None
    keys.create()
    assert steps.resolve(service, again) is False and service.get(one)["state"] == "released"


def test_each_request_by_itself(policy):
    service = holding(policy, "hold_above = 2\nhold_hours = 0")
    ones = [submit(service, ids=[2 * n, 2 * n + 1]) for n in range(4)]
    large = submit(service, ids=[50, 51, 52])
    step_until_done(service)
    assert all(service.get(one)["state"] == "released" for one in ones)
    assert service.get(large)["state"] == "planned"
    service.close()

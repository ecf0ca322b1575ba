"""States: every request can end, ends are ends, and moves outside the table are refused."""

from __future__ import annotations

import pytest

from expunge.service import states


def reachable(start):
    seen, todo = set(), [start]
    while todo:
        state = todo.pop()
        if state not in seen:
            seen.add(state)
            todo += states.NEXT[state]
    return seen


def test_all_states_are_reached_and_all_can_end():
    assert reachable(states.RECEIVED) == set(states.STATES)
    for state in states.STATES:
        assert reachable(state) & states.FINAL
    assert {"released", "rejected", "failed", "cancelled"} == states.FINAL


def test_nothing_is_released_unseen():
    # every way to released leads over audited, but for what had been deleted before
    before = {s for s in states.STATES if states.may(s, states.RELEASED)}
    assert before == {states.AUDITED, states.RESOLVED}
    assert not any(states.may(s, states.CANCELLED) for s in (states.RUNNING, states.AUDITED))
    assert {s for s in states.STATES if states.may(s, states.CANCELLED)} == states.CANCELLABLE


def test_a_move_that_the_table_lacks_is_a_fault_of_ours(service):
    import expunge as xp
    from expunge.service import requests

    one = service.submit("fake", xp.forget(ids=[1]))[0]["id"]
    with pytest.raises(AssertionError):
        service.database.write(lambda c: requests.move(c, one, states.RECEIVED, states.RELEASED))
    assert service.get(one)["state"] == "received"

"""States of a request and the moves between them.

received → resolved → planned → (approved) → running → audited → released | rejected | failed | cancelled
"""

from __future__ import annotations

from typing import Final

RECEIVED: Final = "received"
RESOLVED: Final = "resolved"
PLANNED: Final = "planned"
APPROVED: Final = "approved"
RUNNING: Final = "running"
AUDITED: Final = "audited"
RELEASED: Final = "released"
REJECTED: Final = "rejected"
FAILED: Final = "failed"
CANCELLED: Final = "cancelled"

NEXT: Final[dict[str, frozenset[str]]] = {
    # released at once: everything asked for had been deleted before
    RECEIVED: frozenset({RESOLVED, REJECTED, FAILED, CANCELLED}),
    RESOLVED: frozenset({PLANNED, RELEASED, REJECTED, FAILED, CANCELLED}),
    PLANNED: frozenset({APPROVED, RUNNING, REJECTED, FAILED, CANCELLED}),
    APPROVED: frozenset({RUNNING, REJECTED, FAILED, CANCELLED}),
    # back to where it waited: carried out again alone, after a failure together with others
    RUNNING: frozenset({AUDITED, PLANNED, APPROVED, REJECTED, FAILED}),
    # running again: audits failed and the policy escalates to retraining
    AUDITED: frozenset({RELEASED, RUNNING, REJECTED, FAILED}),
    RELEASED: frozenset(),
    REJECTED: frozenset(),
    FAILED: frozenset(),
    CANCELLED: frozenset(),
}
STATES: Final = tuple(NEXT)
FINAL: Final = frozenset(state for state, after in NEXT.items() if not after)
"""States that nothing leaves."""
CANCELLABLE: Final = frozenset({RECEIVED, RESOLVED, PLANNED, APPROVED})
"""States in which no weights have been touched yet."""


def may(before: str, after: str) -> bool:
    """Whether a request may go from one state to another."""
    return after in NEXT[before]

"""Identifiers of runs and suites: sortable by time, unique without asking anybody."""

from __future__ import annotations

import re
import secrets
import threading
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PATTERN = re.compile(f"[0-7][{_ALPHABET}]{{25}}")
_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """Return a new identifier of 26 characters (a ULID in lower case).

    48 bits of milliseconds since 1970 and 80 random bits in Crockford's base 32, so that sorting
    by text sorts by time. Within one process each identifier sorts after the one before, even in
    the same millisecond or when the clock is set back.
    """
    global _last
    with _lock:
        now = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
        # A random step, not 1: a forked process starts from the same last value as its parent.
        _last = max(now, _last + 1 + secrets.randbits(40))
        value = _last
    letters = []
    for _ in range(26):
        value, digit = divmod(value, 32)
        letters.append(_ALPHABET[digit])
    return "".join(reversed(letters))


def is_id(text: object) -> bool:
    """Whether something has the form of an identifier."""
    return isinstance(text, str) and _PATTERN.fullmatch(text) is not None

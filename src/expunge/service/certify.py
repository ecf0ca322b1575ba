"""Certificates of released requests: what the deletion's record says, signed with the service's key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expunge.service.deleter import Json
from expunge.service.requests import Row
from expunge.service.service import Service


def certificates(
    service: Service,
    model: str,
    covered: Mapping[str, Sequence[int]],
    record: Mapping[str, object],
    predecessor: Row | None,
    *,
    again: bool = False,
) -> dict[str, Json]:
    """Sign a certificate for each request."""
    return {}
